"""``moshi-mlx-local file`` from its command line to its files."""

from __future__ import annotations

import io
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from moshi_mlx_app.cli import main

from moshi_mlx.engine.generator import GenerationConfig
from moshi_mlx.errors import CheckpointError, CodecError
from tests.app.conftest import FakeModel

ROOT = Path(__file__).resolve().parents[2]


def ask(seconds: float = 2.5, rate: int = 16000, name: str = "q.wav") -> np.ndarray:
    """Write a question, [samples], whose samples 16 bits can hold."""
    pcm = np.random.default_rng(0).integers(-9000, 9000, round(seconds * rate)).astype(np.int16)
    soundfile.write(name, pcm, rate)
    return (pcm / 32768).astype(np.float32)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_answer_and_transcript(here: Path, model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, the program's main job does not get done: sound, sides, text, words or their times are wrong."""
    question = ask(2.5)
    assert main(["file", "q.wav", "-o", "a.wav", "--trailing-silence", "1.5", "--seed", "3"]) == 0
    assert names(here) == {"q.wav", "a.wav", "a.json"}

    pcm, rate = soundfile.read("a.wav", dtype="float32")
    assert rate == 24000 and pcm.shape == (4 * 24000, 2)
    user = soxr.resample(question, 16000, 24000, quality="VHQ")
    assert np.abs(pcm[: len(user), 1] - user).max() < 1e-3 and not pcm[60000:, 1].any()
    assert np.abs(pcm[:, 0] + 0.5 * pcm[:, 1]).max() < 1e-4  # the fake's voice, in step with the question

    about = json.loads(Path("a.json").read_text())
    assert about["version"] == 1 and about["complete"] is True and about["trained"] is True
    assert about["model"] == "fake" and about["seed"] == 3 and about["sample_rate"] == 24000
    assert about["duration"] == 4.0 and about["text"] == "Hello there. Fine day. Hello end."
    assert [word["text"] for word in about["words"]] == ["Hello", "there.", "Fine", "day.", "Hello", "end."]
    starts = [word["start"] for word in about["words"]]
    assert starts == sorted(starts) and all(word["start"] <= word["end"] for word in about["words"])
    assert starts[:2] == [0.0, 0.8]
    assert about["question"] == {"file": "q.wav", "sample_rate": 16000, "channels": 1, "duration": 2.5}
    assert about["answer"] == {"file": "a.wav", "channels": ["moshi", "user"]}
    assert about["generation"]["text"]["temperature"] == 0.7 and about["generation"]["tail"] == 1.5
    assert about["real_time_factor"] >= 0 and about["warnings"] == []

    said = capsys.readouterr()
    assert said.out.splitlines() == ["    0.1 s  Hello there.", "    1.7 s  Fine day.", "    3.3 s  Hello end."]
    assert "a.wav: 4.0 s" in said.err and "real-time factor" in said.err
    assert "\x1b" not in said.out + said.err
    assert model.loaded[0][0] == "small" and model.closed == 1


@pytest.mark.parametrize("samples", [1, 1919, 1920, 1921])
def test_without_a_tail_the_answer_is_as_long_as_the_question(samples: int, here: Path, model: FakeModel) -> None:
    """If this fails, answers gain or lose part of a frame, and cannot be laid beside their question."""
    soundfile.write("q.wav", np.full(samples, 0.5), 24000)
    assert main(["file", "q.wav", "-o", "a.wav", "--tail", "0", "--quiet"]) == 0
    pcm, _ = soundfile.read("a.wav")
    assert pcm.shape == (samples, 2) and np.all(pcm[:, 1] == 0.5) and np.all(pcm[:, 0] == -0.25)


def test_options_reach_the_model(here: Path, model: FakeModel) -> None:
    """If this fails, an option on the command line is taken and ignored."""
    ask(0.2)
    options = [
        "--model",
        "org/repo@main",
        "--codec",
        "mlx",
        "--seed",
        "7",
        "--text-temperature",
        "0.5",
        "--top-p",
        "0.9",
    ]
    options += ["--audio-temperature", "0.6", "--text-top-k", "9", "--audio-top-k", "10", "--min-p", "0.05"]
    options += ["--repetition-penalty", "1.2", "--padding-bonus", "-1.5", "--kv-bits", "8"]
    assert main(["file", "q.wav", "-o", "a.wav", *options]) == 0
    source, given = model.loaded[0]
    assert source == "org/repo@main" and given["codec"] == "mlx"
    session = model.sessions[0]
    assert session.seed == 7 and session.kv_bits == 8
    text, audio = session.generation.text, session.generation.audio
    assert (text.temperature, text.top_k, text.top_p, text.min_p) == (0.5, 9, 0.9, 0.05)
    assert (audio.temperature, audio.top_k, audio.top_p, audio.min_p) == (0.6, 10, 0.9, 0.05)
    assert (session.generation.repetition_penalty, session.generation.padding_bonus) == (1.2, -1.5)

    assert main(["file", "q.wav", "-o", "b.wav"]) == 0
    assert model.sessions[1].generation == GenerationConfig()
    assert main(["file", "q.wav", "-o", "c.wav", "--greedy", "--audio-temperature", "0.3"]) == 0
    assert model.sessions[2].generation.text.temperature == 0
    assert model.sessions[2].generation.audio.temperature == 0.3


@pytest.mark.parametrize(
    "options",
    [
        [], ["q.wav"], ["-o", "a.wav"], ["q.wav", "-o", "a.mp3"], ["q.wav", "-o", "a.wav", "--trailing-silence", "-1"],
        ["q.wav", "-o", "a.wav", "--tail", "nan"], ["q.wav", "-o", "a.wav", "--seed", "1.5"],
        ["q.wav", "-o", "a.wav", "--seed", "-1"], ["q.wav", "-o", "a.wav", "--top-p", "1.1"],
        ["q.wav", "-o", "a.wav", "--text-temperature", "inf"], ["q.wav", "-o", "a.wav", "--repetition-penalty", "0"],
        ["q.wav", "-o", "a.wav", "--codec", "opus"], ["q.wav", "-o", "a.wav", "--transcript", "a.wav"],
        ["q.wav", "-o", "a.wav", "--demo"], ["q.wav", "-o", "a.wav", "--nonsense"],
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_2(
    options: list[str], here: Path, model: FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this fails, a typing error computes for minutes, or scripts cannot tell it from a failure."""
    ask(0.1)
    assert main(["file", *options]) == 2
    assert "usage: moshi-mlx-local file" in capsys.readouterr().err
    assert names(here) == {"q.wav"} and not model.loaded


def test_bad_questions_are_one_line_and_1(here: Path, model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, somebody who names a wrong file sees a traceback, or waits for a model first."""
    Path("words.wav").write_text("hello")
    Path("empty.wav").touch()
    soundfile.write("nan.wav", np.array([0.0, np.nan]), 24000, subtype="FLOAT")
    soundfile.write("none.wav", np.zeros(0), 24000)
    os.mkdir("folder.wav")
    questions = ["words.wav", "empty.wav", "nan.wav", "none.wav", "folder.wav", "missing.wav", "/dev/zero", "a\nb.wav"]
    for question in questions:
        assert main(["file", question, "-o", "out.wav"]) == 1
        said = capsys.readouterr()
        (line,) = said.err.splitlines()
        assert line.startswith(f"error: {question}".replace("\n", " ")), line
        assert not said.out
    assert not model.loaded and not any(name.startswith("out") for name in names(here))


def test_an_unreadable_question(
    here: Path, model: FakeModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, a file without read permission ends in a traceback. (Root may read everything: simulated.)"""
    ask(0.1)
    real = os.open

    def refuse(path: str, *rest: int) -> int:
        if path == "q.wav":
            raise PermissionError(13, "Permission denied", path)
        return real(path, *rest)

    monkeypatch.setattr(os, "open", refuse)
    assert main(["file", "q.wav", "-o", "a.wav"]) == 1
    assert capsys.readouterr().err == "error: q.wav: Permission denied\n"


def test_targets_are_checked_before_any_work(here: Path, model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, an old answer is lost without being asked, or the refusal comes after an hour of work."""
    ask(0.1)
    Path("a.wav").write_text("precious")
    Path("b.json").write_text("precious")
    os.mkdir("d.wav")
    os.link("q.wav", "same.wav")
    for options, words in {
        ("-o", "a.wav"): "a.wav exists; replace it with --force",
        ("-o", "b.wav"): "b.json exists; replace it with --force",
        ("-o", "no/such/a.wav"): "no/such: there is no such folder",
        ("-o", "c.wav", "--transcript", "no/c.json"): "no: there is no such folder",
        ("-o", "d.wav", "--force"): "d.wav is a folder",
        ("-o", "q.wav", "--force"): "q.wav: the answer would be written over the question",
        ("-o", "same.wav", "--force"): "same.wav: the answer would be written over the question",
        ("-o", "c.wav", "--transcript", "q.wav", "--force"): "q.wav: the transcript would be written over the question",
    }.items():
        assert main(["file", "q.wav", *options]) == 1, options
        said = capsys.readouterr().err
        assert said.startswith("error: ") and words in said and said.count("\n") == 1
    assert not model.loaded and Path("a.wav").read_text() == Path("b.json").read_text() == "precious"

    assert main(["file", "q.wav", "-o", "a.wav", "--force", "--transcript", "t.json"]) == 0
    assert soundfile.info("a.wav").channels == 2 and json.loads(Path("t.json").read_text())["complete"]


def test_a_read_only_folder_is_named(
    here: Path, model: FakeModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, the answer is lost at its end because nobody looked whether it can be written."""
    ask(0.1)
    os.mkdir("locked")
    os.chmod("locked", stat.S_IRUSR | stat.S_IXUSR)
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: real(path, mode) and Path(path).name != "locked")
    assert main(["file", "q.wav", "-o", "locked/a.wav"]) == 1
    assert "locked: the answer cannot be written there" in capsys.readouterr().err
    assert not model.loaded


def test_ctrl_c_keeps_what_there_is(here: Path, model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, a person who stops a long answer loses it, or takes half an answer for a whole one."""
    ask(4.0)
    Path("a.wav").write_text("older")

    def stop(index: int) -> None:
        if index == 25:
            raise KeyboardInterrupt

    model.on_frame = stop
    assert main(["file", "q.wav", "-o", "a.wav", "--force"]) == 130
    assert names(here) == {"q.wav", "a.wav", "a.partial.wav", "a.partial.json"}
    assert Path("a.wav").read_text() == "older"
    assert soundfile.info("a.partial.wav").frames == 25 * 1920
    about = json.loads(Path("a.partial.json").read_text())
    assert about["complete"] is False and about["duration"] == 2.0 and about["answer"]["file"] == "a.partial.wav"
    assert [word["text"] for word in about["words"]] == ["Hello", "there.", "Fine"]
    said = capsys.readouterr()
    assert "stopped: the first 2.0 s" in said.err and "a.partial.wav" in said.err
    assert "Fine" in said.out and "Traceback" not in said.err

    model.on_frame = lambda index: None  # and the next run is not in its way
    assert main(["file", "q.wav", "-o", "a.wav", "--force"]) == 0
    assert names(here) == {"q.wav", "a.wav", "a.json"}


def test_ctrl_c_while_loading_leaves_nothing(
    here: Path, model: FakeModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, giving up during a download leaves empty files or a traceback."""
    import moshi_mlx

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    ask(0.1)
    monkeypatch.setattr(moshi_mlx, "load", interrupted)
    assert main(["file", "q.wav", "-o", "a.wav"]) == 130
    assert names(here) == {"q.wav"} and "stopped: nothing was written" in capsys.readouterr().err


@pytest.mark.parametrize("error", [CodecError("the codec\nfell over"), OSError(28, "No space left on device")])
def test_a_failure_on_the_way_keeps_what_there_is(
    error: Exception, here: Path, model: FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this fails, an error after an hour costs the hour."""
    ask(2.0)

    def fail(index: int) -> None:
        if index == 12:
            raise error

    model.on_frame = fail
    assert main(["file", "q.wav", "-o", "a.wav"]) == 1
    assert names(here) == {"q.wav", "a.partial.wav", "a.partial.json"}
    said = capsys.readouterr().err
    assert "kept: the first 1.0 s" in said and "Traceback" not in said
    assert said.splitlines()[-1] in ("error: the codec fell over", "error: No space left on device")


def test_a_model_that_cannot_be_loaded(
    here: Path, model: FakeModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, a broken checkpoint shows a traceback; with --debug it must show one, or nobody can help."""
    import moshi_mlx

    def broken(*_: object, **__: object) -> None:
        raise CheckpointError("model.safetensors is cut short; fetch it again")

    ask(0.1)
    monkeypatch.setattr(moshi_mlx, "load", broken)
    assert main(["file", "q.wav", "-o", "a.wav"]) == 1
    assert capsys.readouterr().err == "error: model.safetensors is cut short; fetch it again\n"
    for arguments in (["--debug", "file", "q.wav", "-o", "a.wav"], ["file", "q.wav", "-o", "a.wav", "--debug"]):
        assert main(arguments) == 1
        assert "Traceback" in capsys.readouterr().err
    assert names(here) == {"q.wav"}


def test_an_untrained_model_says_so(here: Path, model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, somebody takes the noise of random weights for what this project can do."""
    ask(0.1)
    model.trained = False
    assert main(["file", "q.wav", "-o", "a.wav", "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.startswith("notice: ") and "not been trained" in said.err
    assert not said.out and json.loads(Path("a.json").read_text())["trained"] is False


def test_json_is_the_only_output(here: Path, model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, `--json | jq` breaks."""
    ask(1.0)
    model.says = [" \u00e9t\u00e9\x1b[2J", " \u4f60\u597d."]
    assert main(["file", "q.wav", "-o", "a.wav", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads(Path("a.json").read_text(encoding="utf-8"))
    assert said.out.isascii() and "\x1b" not in said.out and said.err == ""


def test_odd_recordings_are_remarked_on(here: Path, model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, a damaged or muted recording is answered without a word about it."""
    soundfile.write("q.wav", np.zeros(1000), 8000)
    assert main(["file", "q.wav", "-o", "a.wav"]) == 0
    assert "warning: q.wav: all of it is digital silence" in capsys.readouterr().err
    assert "digital silence" in json.loads(Path("a.json").read_text())["warnings"][0]


def test_speech_to_text_hears_its_silence(here: Path, model: FakeModel) -> None:
    """If this fails, speech-to-text loses the last words, or the answer does not begin with the question."""
    question = ask(1.0, 24000)
    model.config = SimpleNamespace(
        stt_config={"audio_silence_prefix_seconds": 1.0, "audio_delay_seconds": 2.5}, model_type="stt", lm_gen_config={}
    )
    heard: list[int] = []
    model.on_frame = heard.append
    assert main(["file", "q.wav", "-o", "a.wav", "--tail", "0", "--quiet"]) == 0
    pcm, _ = soundfile.read("a.wav", dtype="float32")
    assert len(pcm) == round(4.5 * 24000) and np.array_equal(pcm[:24000, 1], question)
    assert len(heard) == -(-round(4.5 * 24000) // 1920), "the session hears the silence before by itself"


def test_the_demo_asks_the_shipped_recording(here: Path, model: FakeModel) -> None:
    """If this fails, somebody without a recording cannot try the program."""
    assert main(["file", "--demo", "-o", "a.wav", "--tail", "0", "--quiet"]) == 0
    questions = json.loads((ROOT / "moshi_mlx" / "assets" / "questions.json").read_text())
    about = json.loads(Path("a.json").read_text())
    assert about["duration"] == pytest.approx(questions["duration"], abs=0.001)
    pcm, rate = soundfile.read("a.wav")
    for question in questions["questions"]:
        inside = pcm[round(question["start"] * rate) : round(question["end"] * rate), 1]
        after = pcm[round(question["end"] * rate) + 240 : round((question["end"] + 3) * rate), 1]
        assert np.sqrt(np.mean(inside**2)) > 0.05 and not after.any()


def test_the_shipped_questions_are_the_models_own() -> None:
    """If this fails, the demo asks what the small model was never taught."""
    from moshi_mlx_training.speech.dialogues import exchanges

    answers = {question: exchange.answer for exchange in exchanges() for question in exchange.questions}
    assets = ROOT / "moshi_mlx" / "assets"
    questions = json.loads((assets / "questions.json").read_text())
    assert len(questions["questions"]) >= 5
    for question in questions["questions"]:
        assert answers[question["text"]] == question["expected"] and "slt" not in question["voice"]
    info = soundfile.info(assets / "questions.wav")
    assert (info.samplerate, info.channels, info.subtype) == (24000, 1, "PCM_16")
    assert info.duration == pytest.approx(questions["duration"], abs=0.001)
    assert (assets / "questions.wav").stat().st_size < 2_000_000


def test_a_reader_that_leaves_does_not_cost_the_answer(here: Path) -> None:
    """If this fails, `moshi-mlx-local file ... | head -1` loses the answer, or complains about a broken pipe."""
    ask(40.0)
    code = (
        "import sys, moshi_mlx\n"
        "from tests.app.conftest import FakeModel\n"
        "fake = FakeModel()\n"
        "moshi_mlx.load = fake.load\n"
        "from moshi_mlx_app.cli import main\n"
        "sys.exit(main(['file', 'q.wav', '-o', 'a.wav']))"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "app")])
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 0, said
    assert "roken" not in said and "a.wav: 44.0 s" in said
    assert soundfile.info("a.wav").duration == 44.0


def test_moshi_alone(here: Path, model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, nobody can have an answer without the question beside it."""
    question = ask(0.5, rate=24000)
    assert main(["file", "q.wav", "-o", "a.wav", "--mono", "--tail", "0"]) == 0
    pcm, _ = soundfile.read("a.wav", dtype="float32")
    assert pcm.shape == (12000,) and np.abs(pcm + 0.5 * question).max() < 1e-4
    about = json.loads(Path("a.json").read_text())
    assert about["channels"] == ["moshi"] and about["answer"] == {"file": "a.wav", "channels": ["moshi"]}
    assert "a.wav: 0.5 s, Moshi alone; words in a.json" in capsys.readouterr().err


def test_the_form_is_moshi_finetunes(here: Path, model: FakeModel) -> None:
    """If this fails, an answer can no longer be trained on, or a program that reads `words` finds none."""
    ask(2.5)
    assert main(["file", "q.wav", "-o", "a.wav", "--tail", "1.5", "--quiet", "--kv-bits", "8"]) == 0
    about = json.loads(Path("a.json").read_text())
    assert about["words"][0] == {"text": "Hello", "start": 0.0, "end": 0.4, "speaker": "moshi"}
    assert about["alignments"][:2] == [["Hello", [0.0, 0.4], "SPEAKER_MAIN"], ["there.", [0.8, 1.2], "SPEAKER_MAIN"]]
    assert len(about["alignments"]) == len(about["words"]) and about["channels"] == ["moshi", "user"]
    assert about["generation"]["kv_bits"] == 8 and "text_conditions" not in about
    documented = set(re.findall(r"^\| `(\w+)` ", (ROOT / "docs" / "recordings.md").read_text(), re.MULTILINE))
    assert set(about) == documented


def test_speech_to_text_writes_the_users_words(here: Path, model: FakeModel) -> None:
    """If this fails, what the user said is trained on as if Moshi had said it."""
    ask(0.5)
    model.config = SimpleNamespace(stt_config={}, model_type="stt", lm_gen_config={})
    assert main(["file", "q.wav", "-o", "a.wav", "--quiet"]) == 0
    about = json.loads(Path("a.json").read_text())
    assert {word["speaker"] for word in about["words"]} == {"user"}
    assert {label for _, _, label in about["alignments"]} == {"SPEAKER_OTHER"}


def test_a_recorded_conversation_is_asked_again(
    here: Path, model: FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this fails, Moshi hears its own old answer mixed into the question, or the user's words are lost."""
    moshi, user = np.full(24000, 0.5, np.float32), np.linspace(-0.5, 0.5, 24000, dtype=np.float32)
    soundfile.write("talk.wav", np.stack([moshi, user], 1), 24000)
    odd = [["x", [1.0], "SPEAKER_OTHER"], 3, ["\ud800", [0.5, 0.6], 7], ["z", ["nan", 1], ""], ["w", [-1, 1], ""]]
    said = [["old", [0.1, 0.3], "SPEAKER_MAIN"], [" hello", [0.04, 0.3], "SPEAKER_OTHER"], *odd]
    for known in (
        {"alignments": said},  # as moshi-finetune has it
        {"alignments": said, "channels": ["moshi", "user"], "answer": {"file": "somewhere/talk.wav"}},
    ):
        Path("talk.json").write_text(json.dumps(known))
        assert main(["file", "talk.wav", "-o", "a.wav", "--tail", "0", "--quiet", "--force"]) == 0
        assert "the user's channel is the question" in capsys.readouterr().err
        pcm, _ = soundfile.read("a.wav", dtype="float32")
        assert np.abs(pcm[:, 1] - user).max() < 1e-4 and np.abs(pcm[:, 0] + 0.5 * user).max() < 1e-4
        about = json.loads(Path("a.json").read_text(encoding="utf-8"))
        assert about["question"]["channel"] == "user" and about["question"]["channels"] == 2
        assert [(word["text"], word["speaker"]) for word in about["words"][:3]] == [
            ("Hello", "moshi"), ("hello", "user"), ("?", "user"),
        ]  # fmt: skip
        assert "old" not in about["text"]
    assert main(["file", "talk.wav", "-o", "b.wav", "--transcript", "talk.json", "--force"]) == 1
    assert "the transcript would be written over the question's words" in capsys.readouterr().err
    assert main(["file", "a.wav", "-o", "b.wav", "--tail", "0", "--quiet"]) == 0
    assert json.loads(Path("b.json").read_text())["alignments"] == about["alignments"]


@pytest.mark.parametrize(
    "words",
    [
        "nonsense", "[]", '{"alignments": 3}', '{"alignments": [], "channels": ["moshi"]}', "[" * 100_000,
        '{"alignments": [], "channels": ["moshi", "user"], "answer": {"file": "another.wav"}}',
    ],
)  # fmt: skip
def test_json_beside_a_question_that_does_not_belong_to_it(words: str, here: Path, model: FakeModel) -> None:
    """If this fails, one side of somebody's stereo recording is not heard, or odd JSON ends the program."""
    soundfile.write("q.wav", np.stack([np.full(2400, 0.5), np.full(2400, 0.25)], 1), 24000)
    Path("q.json").write_text(words)
    assert main(["file", "q.wav", "-o", "a.wav", "--tail", "0", "--quiet"]) == 0
    pcm, _ = soundfile.read("a.wav", dtype="float32")
    assert np.all(pcm[:, 1] == 0.375) and "channel" not in json.loads(Path("a.json").read_text())["question"]


def test_the_answer_on_standard_output(here: Path, model: FakeModel, capfdbinary: Any) -> None:
    """If this fails, `file q.wav -o - | ffplay -` plays text, or the length in front is wrong."""
    ask(0.5)
    model.says = [" Hello"]
    assert main(["file", "q.wav", "-o", "-", "--tail", "0.3"]) == 0
    said = capfdbinary.readouterr()
    pcm, rate = soundfile.read(io.BytesIO(said.out), dtype="float32")
    assert rate == 24000 and pcm.shape == (19200, 2) and len(said.out) == 44 + 4 * 19200
    assert b"0.1 s  Hello" in said.err and b"standard output: 0.8 s" in said.err
    assert names(here) == {"q.wav"}

    assert main(["file", "q.wav", "-o", "-", "--mono", "--json", "--transcript", "t.json"]) == 0
    said = capfdbinary.readouterr()
    assert soundfile.info(io.BytesIO(said.out)).channels == 1
    assert json.loads(said.err) == json.loads(Path("t.json").read_text())
    assert json.loads(said.err)["answer"] == {"file": "standard output", "channels": ["moshi"]}
    assert names(here) == {"q.wav", "t.json"}


def test_no_sound_on_a_terminal(
    here: Path, model: FakeModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, a forgotten pipe floods somebody's terminal."""
    ask(0.1)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["file", "q.wav", "-o", "-"]) == 2
    assert "standard output is a terminal" in capsys.readouterr().err and not model.loaded


def test_a_listener_that_leaves(here: Path) -> None:
    """If this fails, `file q.wav -o - | head -c 10000` computes on for nobody, or ends in a traceback."""
    from tests.app.test_outputs import begun

    ask(400.0)
    process = begun("file", "q.wav", "-o", "-", "--transcript", "t.json", pause=0.001)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10_000)
    process.stdout.close()
    said = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(30) == 0 and "its reader has gone" in said.splitlines()[-1]
    assert "roken" not in said and "Traceback" not in said
    about = json.loads(Path("t.partial.json").read_text())
    assert not about["complete"] and 0 < about["duration"] < 400
    assert names(here) == {"q.wav", "t.partial.json"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_standard_output_is_full(here: Path) -> None:
    """If this fails, `file q.wav -o - > /full/disk/a.wav` ends in a traceback, or as if all were well."""
    from tests.app.test_outputs import ENVIRONMENT, PROGRAM

    ask(1.0)
    with open("/dev/full", "wb") as full:
        arguments = [sys.executable, "-c", PROGRAM, "0", "0", "file", "q.wav", "-o", "-", "--quiet"]
        done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, env=ENVIRONMENT, timeout=60)
    assert done.returncode == 1 and done.stderr.decode() == "error: standard output: No space left on device\n"


def test_a_seed_that_changes_nothing(here: Path, model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, somebody tries seed after seed on a model that draws nothing."""
    ask(0.1)
    command = ["file", "q.wav", "-o", "a.wav", "--quiet", "--force"]
    assert main([*command, "--seed", "3", "--greedy"]) == 0
    assert "seed: 3 has no effect" in capsys.readouterr().err
    for options in (["--seed", "3"], ["--greedy"], ["--seed", "3", "--greedy", "--audio-temperature", "0.5"]):
        assert main([*command, *options]) == 0
        assert capsys.readouterr().err == ""


def test_the_readmes_commands_run_one_after_the_other(here: Path, model: FakeModel) -> None:
    """If this fails, somebody who follows the README is refused, because an earlier step has made the file."""
    recipe = (ROOT / "Makefile").read_text().partition("\ntalk:")[2].splitlines()[1].split()
    assert recipe[:3] == ["$(BIN)/moshi-mlx-local", "file", "$(QUESTIONS)"]
    lines = re.findall(r"^    \S*moshi-mlx-local (file .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(lines) > 1
    ask(0.2, name="question.wav")
    for command in (["file", "question.wav", *recipe[3:]], *map(str.split, lines)):
        assert main([*command, "--quiet"]) == 0, command
