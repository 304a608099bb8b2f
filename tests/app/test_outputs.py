"""What a command writes: never over something else, never two runs at once, never by half."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from moshi_mlx_app.cli import main
from moshi_mlx_app.recording.outputs import Claim

from tests.app.conftest import FakeModel
from tests.app.test_device import until
from tests.app.test_file import ask, names
from tests.app.test_talk import ENVIRONMENT, card, parrot  # noqa: F401

PROGRAM = """
import os, resource, sys, time
import moshi_mlx
from tests.app.conftest import FakeModel
fake = FakeModel()
pause, largest = float(sys.argv[1]), int(sys.argv[2])
if largest:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
def on_frame(index):
    time.sleep(abs(pause))
    while pause < 0 and index > 2 and not os.path.exists("go"):
        time.sleep(0.01)
fake.on_frame = on_frame
moshi_mlx.load = fake.load
from moshi_mlx_app.cli import main
sys.exit(main(sys.argv[3:]))
"""


def begun(*arguments: str, pause: float = 0.0, largest: int = 0) -> subprocess.Popen[bytes]:
    """The program with the model that costs nothing.

    ``pause`` seconds a frame (below 0: until the file `go` is there), files of ``largest`` bytes at most.
    """
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(pause), str(largest), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors.decode()


def belong(wav: Path, words: Path) -> bool:
    """Whether a wav and a transcript are of one run: every run here has a question of its own length."""
    about = json.loads(words.read_text())
    return abs(about["duration"] - soundfile.info(wav).duration) < 1e-3


REFUSED = {
    ("-o", "a.wav", "--trace", "q.wav"): (1, "the trace would be written over the question"),
    ("-o", "a.wav", "--trace", "a.wav"): (2, "--trace a.wav: that is where the answer goes"),
    ("-o", "a.wav", "--trace", "a.json"): (2, "--trace a.json: that is where the transcript goes"),
    ("-o", "a.wav", "--trace", "a.partial.wav"): (2, "that is where the answer goes"),
    ("-o", "a.wav", "--trace", "sub/../a.partial.json"): (2, "that is where the transcript goes"),
    ("-o", "a.wav", "--transcript", "t.json", "--trace", "T.JSON"): (2, "that is where the transcript goes"),
    ("-o", "a.wav", "--trace", "link/q.wav"): (1, "the trace would be written over the question"),
    ("-o", "a.wav", "--trace", "soft.wav"): (1, "the trace would be written over the question"),
    ("-o", "a.wav", "--trace", "hard.wav"): (1, "the trace would be written over the question"),
    ("-o", "a.wav", "--trace", "dangling"): (2, "that is where the answer goes"),
    ("-o", "link/a.wav", "--trace", "a.json"): (2, "that is where the transcript goes"),
    ("-o", "soft.wav"): (1, "the answer would be written over the question"),
    ("-o", "a.wav", "--transcript", "soft.wav"): (1, "the transcript would be written over the question"),
    ("-o", "a.wav", "--trace", "pipe"): (1, "pipe is a device or a pipe; name a file for the trace"),
    ("-o", "a.wav", "--transcript", "pipe"): (1, "pipe is a device or a pipe; name a file for the transcript"),
}


@pytest.mark.parametrize("options", REFUSED, ids=" ".join)
def test_nothing_is_written_over_something_else(
    options: tuple[str, ...], here: Path, model: FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this fails, a slip in a name costs somebody the question, or one result is written over the other."""
    ask(0.1)
    os.mkdir("sub")
    os.symlink(".", "link")
    os.symlink("q.wav", "soft.wav")
    os.link("q.wav", "hard.wav")
    os.symlink("a.wav", "dangling")
    os.mkfifo("pipe")
    before, question = names(here), Path("q.wav").read_bytes()
    status, words = REFUSED[options]
    for force in ((), ("--force",)):
        assert main(["file", "q.wav", *options, *force]) == status
        assert words in (said := capsys.readouterr().err) and "Traceback" not in said
    assert not model.loaded and names(here) == before and Path("q.wav").read_bytes() == question


def test_files_that_exist_are_replaced_when_asked(
    here: Path, model: FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this fails, --trace writes over whatever has that name, or --force no longer allows it."""
    ask(0.1)
    Path("trace.json").write_text("precious")
    os.symlink("loop", "loop")
    options = ["file", "q.wav", "-o", "a.wav", "--quiet", "--trace"]
    for name in ("trace.json", "loop"):
        assert main([*options, name]) == 1
        assert f"{name} exists; replace it with --force" in capsys.readouterr().err
    os.unlink("loop")
    assert not model.loaded and Path("trace.json").read_text() == "precious"
    assert main([*options, "trace.json", "--force"]) == 0
    assert json.loads(Path("trace.json").read_text())["traceEvents"]
    assert names(here) == {"q.wav", "a.wav", "a.json", "trace.json"}


def test_the_question_on_standard_input_is_no_target(here: Path) -> None:
    """If this fails, `file - -o q.wav --force < q.wav` answers the question and then loses it."""
    ask(0.1)
    with open("q.wav", "rb") as question:
        arguments = [sys.executable, "-c", PROGRAM, "0", "0", "file", "-", "-o", "q.wav", "--force"]
        done = subprocess.run(arguments, stdin=question, capture_output=True, env=ENVIRONMENT, timeout=60)
    assert done.returncode == 1 and b"the answer would be written over the question" in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trace", "talks/recordings.jsonl", "--force"], "the trace would be written over the list of recordings"),
        (["--trace", "talks", "--force"], "talks is a folder"),
        (["--trace", "old.trace"], "old.trace exists; replace it with --force"),
        (["--trace", "nowhere/a.trace"], "nowhere: there is no such folder for the trace"),
        (["--record", "q.wav"], "--record q.wav: q.wav is a file; name a folder"),
        (["--record", "q.wav/talks"], "--record q.wav/talks: q.wav is a file; name a folder"),
        (["--record", "new", "--trace", "new"], "the trace would be written over the folder of recordings"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_paths_of_a_talk(
    options: list[str],
    words: str,
    here: Path,
    card: object,  # noqa: F811
    parrot: object,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If this fails, a talk's trace is written over something, or a wrong folder is found after a download."""
    import moshi_mlx

    monkeypatch.setattr(moshi_mlx, "load", None)  # before any work
    ask(0.1)
    os.mkdir("talks")
    Path("talks/recordings.jsonl").write_text("precious")
    Path("old.trace").write_text("precious")
    before = names(here)
    record = [] if "--record" in options else ["--record", "talks"]
    assert main(["talk", "--no-aec", "--seconds", "1", *record, *options]) == 1
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert names(here) == before
    assert Path("talks/recordings.jsonl").read_text() == Path("old.trace").read_text() == "precious"


def test_a_benchmarks_picture(here: Path, model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, `bench --picture` writes over a drawing that somebody made."""
    Path("drawn.svg").write_text("precious")
    assert main(["bench", "--picture", "drawn.svg"]) == 1
    assert "drawn.svg exists; replace it with --force" in capsys.readouterr().err and not model.loaded


def test_two_runs_on_one_output(here: Path) -> None:
    """If this fails, two runs write into one file, or leave a wav beside the other one's words."""
    ask(2.0)
    ask(1.0, name="other.wav")
    first = begun("file", "q.wav", "-o", "a.wav", "--tail", "0", pause=-0.01)
    try:
        assert until(lambda: Path("a.partial.wav").exists() and Path("a.partial.wav").stat().st_size > 44, 60)
        for options in (
            ["-o", "a.wav", "--force"],
            ["-o", "b.wav", "--transcript", "a.json", "--force"],
            ["-o", "b.wav", "--trace", "a.json", "--force"],
        ):
            status, said = ended(begun("file", "other.wav", *options, "--tail", "0"))
            assert status == 1 and said.count("\n") == 1, said
            assert "another run is writing it" in said
    finally:
        Path("go").touch()
        status, said = ended(first)
    assert status == 0, said
    assert names(here) == {"q.wav", "other.wav", "a.wav", "a.json", "go"}
    assert soundfile.info("a.wav").duration == 2.0 and belong(Path("a.wav"), Path("a.json"))


def test_many_runs_on_one_output(here: Path) -> None:
    """If this fails, runs that begin in one moment all write the same file."""
    for number in range(1, 6):
        ask(0.2 * number, name=f"q{number}.wav")
    runs = [begun("file", f"q{n}.wav", "-o", "a.wav", "--tail", "0", "--force", pause=0.02) for n in range(1, 6)]
    results = [ended(run) for run in runs]
    assert {status for status, _ in results} <= {0, 1} and any(status == 0 for status, _ in results)
    for status, said in results:
        assert (status == 0) != ("another run is writing it" in said), said
    assert belong(Path("a.wav"), Path("a.json"))
    assert names(here) == {"a.wav", "a.json", *(f"q{n}.wav" for n in range(1, 6))}


@pytest.mark.parametrize("seed", range(int(os.environ.get("MOSHI_INTERRUPTS", "4"))))
def test_a_killed_run_is_in_nobodys_way(seed: int, here: Path) -> None:
    """If this fails, a killed run blocks its output for good, or leaves half a file, or words of another sound."""
    ask(0.4)
    ask(0.8, name="other.wav")
    assert ended(begun("file", "q.wav", "-o", "a.wav", "--tail", "0"))[0] == 0
    generator = np.random.default_rng(seed)
    process = begun("file", "other.wav", "-o", "a.wav", "--tail", "0", "--force", pause=0.01)
    try:
        assert until(lambda: Path("a.partial.wav").exists() or process.poll() is not None, 30)
        time.sleep(float(generator.uniform(0.0, 0.15)))
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    for wav in here.glob("*.wav"):
        assert wav.stat().st_size == 0 or soundfile.info(wav).samplerate
    for words in here.glob("*.json"):
        assert json.loads(words.read_text())["complete"]
    if Path("a.json").exists():
        assert belong(Path("a.wav"), Path("a.json"))
    status, said = ended(begun("file", "q.wav", "-o", "a.wav", "--tail", "0.5", "--force"))
    assert status == 0, said
    assert names(here) == {"q.wav", "other.wav", "a.wav", "a.json"}
    assert soundfile.info("a.wav").duration == 0.9 and belong(Path("a.wav"), Path("a.json"))


def test_a_claim(here: Path) -> None:
    """If this fails, two programs have a file at once, or what one left behind keeps everybody out."""
    held = Claim(here / "a.wav")
    with pytest.raises(BlockingIOError):
        Claim(here / "a.wav")
    Claim(here / "b.wav").release()
    held.release()
    assert not names(here)
    (here / ".a.wav.lock").touch()  # of a run that was killed
    again = Claim(here / "a.wav")
    assert again.sure
    again.release(keep=True)
    assert names(here) == {".a.wav.lock"}
    Claim(here / "a.wav").release()
    assert not names(here)


def test_where_there_are_no_locks(here: Path, model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, the program does not work on a network drive."""
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    ask(0.1)
    assert main(["file", "q.wav", "-o", "a.wav", "--quiet"]) == 0
    assert names(here) == {"q.wav", "a.wav", "a.json"}


@pytest.mark.parametrize(
    ("largest", "words"),
    [
        (
            100_000,
            [
                "kept: the first 1.0 s of the answer are in a.partial.wav, the words in a.partial.json",
                "error: a.partial.wav: File too large",
            ],
        ),
        (44, ["error: a.partial.wav: File too large"]),
    ],
)
def test_a_full_disk(largest: int, words: list[str], here: Path) -> None:
    """If this fails, a full disk costs the answer so far, hides what was kept, or does not say what was full."""
    ask(4.0)
    status, said = ended(begun("file", "q.wav", "-o", "a.wav", "--quiet", largest=largest))
    assert status == 1 and said.splitlines() == words
    if largest > 44:
        frames = soundfile.info("a.partial.wav").frames
        assert frames == (largest - 44) // (4 * 1920) * 1920
        assert Path("a.partial.wav").stat().st_size == 44 + 4 * frames
        about = json.loads(Path("a.partial.json").read_text())
        assert about["duration"] == frames / 24_000 and not about["complete"]
    else:
        assert names(here) == {"q.wav"}


def test_no_room_for_the_words(here: Path, model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, an answer that is complete is lost, or not spoken of, because its words found no room."""
    ask(1.0)
    model.says = [" " + "word" * 20_000]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        ask(0.2)
        assert main(["file", "q.wav", "-o", "a.wav", "--quiet", "--tail", "0"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    said = capsys.readouterr().err
    assert (
        "kept: the first 0.2 s of the answer are in a.partial.wav, but the words could not be written: a.partial.json: "
        in said
    )
    assert "error: a.partial.json: " in said and names(here) == {"q.wav", "a.partial.wav"}
    assert soundfile.info("a.partial.wav").duration == 0.2
