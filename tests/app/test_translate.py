"""The commands `translate` and `complete`, on small random models."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from moshi_mlx_app.cli import main
from moshi_mlx_app.commands.translate import CUT

from tests.app.test_talk import card  # noqa: F401
from tests.helpers.checkpoints import NO_FUSER, helium_config, small_config, write_checkpoint
from tests.helpers.signal import speechlike
from tests.helpers.tokenizer import train_tokenizer

QUALITY = ["very_bad", "bad", "neutral", "good", "very_good"]
LUT = {"type": "lut", "lut": {"n_bins": 31, "dim": 16, "tokenizer": "noop", "possible_values": QUALITY}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    hibiki = small_config(
        model_type="hibiki",
        delays=[0, 0, 2, 2, 0, 2, 2],
        conditioners={"description": LUT},
        fuser=NO_FUSER | {"sum": ["description"]},
    )
    helium = write_checkpoint(folder / "helium", helium_config(max_position_embeddings=128), "helium")
    train_tokenizer(helium / "tokenizer.model", 600)
    return {"hibiki": str(write_checkpoint(folder / "hibiki", hibiki, mimi=True)), "helium": str(helium)}


@pytest.fixture
def speech(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pcm = speechlike(24_000, 24_000, 0).astype(np.float32)
    soundfile.write("speech.wav", pcm, 24_000)
    return tmp_path


@pytest.mark.usefixtures("speech")
def test_a_file_is_translated(models: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, `translate` writes no translation, or does not say that it was cut."""
    options = ["--model", models["hibiki"], "--greedy"]
    assert main(["translate", "speech.wav", "-o", "out.wav", "--wait", "0.4", *options]) == 0
    pcm, rate = soundfile.read("out.wav")
    told = json.loads(Path("out.json").read_text())
    cut = CUT in told["warnings"]
    # 13 frames, the end, five of silence; a voice with delays of two frames lacks the last.
    assert rate == 24_000 and pcm.shape[1] == 2 and (len(pcm) == 1920 * 18) is cut
    assert told["complete"] and told["generation"]["wait"] == 0.4 and told["channels"] == ["moshi", "user"]
    assert ("cut there" in capsys.readouterr().err) is cut
    source, _ = soundfile.read("speech.wav")
    np.testing.assert_allclose(pcm[: len(source), 1], source, atol=1e-3)
    assert main(["translate", "speech.wav", "-o", "two.wav", "--wait", "0.4", "--mono", "--cfg", "3", *options]) == 0
    assert soundfile.info("two.wav").channels == 1
    assert json.loads(Path("two.json").read_text())["generation"]["cfg_coef"] == 3.0


@pytest.mark.usefixtures("speech", "card")
def test_the_microphone_is_translated(models: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, a speech is not ended by the end frame, or its translation is not kept."""
    options = ["--model", models["hibiki"], "--greedy", "--no-aec", "--seconds", "0.5", "--wait", "0.8"]
    assert main(["translate", "mic", "-o", "live.wav", *options]) == 0
    assert "is being completed" in capsys.readouterr().err
    told = json.loads(Path("live.json").read_text())
    pcm, _ = soundfile.read("live.wav")
    assert told["question"]["file"] == "mic" and told["complete"] and len(pcm) > 1920 * 4 and not len(pcm) % 1920


@pytest.mark.usefixtures("speech")
def test_models_of_another_purpose(models: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, a model that cannot do it is downloaded, loaded and then ends in a fault."""
    assert main(["translate", "speech.wav", "-o", "out.wav", "--model", models["helium"]]) == 1
    assert f"the command for it is moshi-mlx-local complete --model {models['helium']}" in capsys.readouterr().err
    assert main(["complete", "hello", "--model", models["hibiki"]]) == 1
    assert f"the command for it is moshi-mlx-local translate --model {models['hibiki']}" in capsys.readouterr().err
    assert main(["translate", "speech.wav", "-o", "out.wav", "--model", "small"]) == 1
    assert "is for dialogue" in capsys.readouterr().err
    assert not Path("out.wav").exists() and not Path("out.partial.wav").exists()


@pytest.mark.usefixtures("card")
def test_it_is_said_before_the_download(monkeypatch: pytest.MonkeyPatch, models: dict[str, str], capsys: Any) -> None:
    """If this fails, gigabytes are fetched for a command that cannot use them."""
    from moshi_mlx.checkpoint import resolve

    def far(source: str, **_: Any) -> resolve.DownloadPlan:
        config = Path(models["helium"]) / "config.json"
        return resolve.DownloadPlan(source, {"model.safetensors": (10**9, 10**9)}, Path("/"), config)

    def fetched(*_: Any, **__: Any) -> Any:
        raise AssertionError("fetched")

    monkeypatch.setattr(resolve, "plan_download", far)
    monkeypatch.setattr(resolve, "resolve", fetched)
    for verb in (["talk"], ["check", "--no-sound"], ["bench"]):
        assert main([*verb, "--model", "kyutai/helium-1-preview-2b"]) == 1
        error = capsys.readouterr().err
        assert "is a text model: it does not hear; the command for it is moshi-mlx-local complete" in error, error


def test_a_text_is_completed(models: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """If this fails, `complete` prints no text, or another one with the same seed."""
    options = ["--model", models["helium"], "--max-tokens", "8"]
    assert main(["complete", "the cat and", *options]) == 0
    first = capsys.readouterr()
    assert first.out.endswith("\n") and "tokens in" in first.err
    assert main(["complete", "the cat and", *options, "--quiet"]) == 0
    assert capsys.readouterr().out == first.out
    (tmp_path / "prompts.txt").write_text("the cat and\n\nthe dog\n")
    assert main(["complete", "--batch", str(tmp_path / "prompts.txt"), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line[:3] for line in lines) == ["[1]", "[2]"]
    alone = " ".join(first.out.split())
    assert any(" ".join(line.split()).endswith(alone) for line in lines if line.startswith("[1]"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [([""], "is empty"), (["a " * 200], "reads 128 with what it adds"), (["--batch", "missing.txt"], "No such file")],
)
def test_prompts_that_cannot_be(
    models: dict[str, str], capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    """If this fails, a bad prompt ends in a traceback."""
    assert main(["complete", *arguments, "--model", models["helium"]]) == 1
    error = capsys.readouterr().err
    assert reason in error and "unexpected" not in error


def test_a_closed_pipe_ends_it(models: dict[str, str]) -> None:
    """If this fails, `complete ... | head -1` ends in a traceback, or computes for nobody."""
    code = "import sys; from moshi_mlx_app.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "complete", "the cat", "--model", models["helium"], "--max-tokens", "100"]
    path = os.pathsep.join(["app", "quantize", "."])
    program = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    assert program.stdout is not None and program.stderr is not None
    program.stdout.close()
    error = program.stderr.read().decode()
    assert program.wait(timeout=120) == 0 and "Traceback" not in error


def test_standard_input(models: dict[str, str], capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If this fails, `complete -` does not read its prompt, or takes what is no text."""
    for content, status in ((b"the cat and", 0), (b"\xff\xfe", 1)):
        (tmp_path / "in").write_bytes(content)
        with open(tmp_path / "in", "rb") as file:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
            assert main(["complete", "-", "--model", models["helium"], "--max-tokens", "3"]) == status
    assert "no text in UTF-8" in capsys.readouterr().err
