"""The command: from recordings to a file that loads, stopped and gone on with, in little memory."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from moshi_mlx_finetune import prepare as preparing
from moshi_mlx_finetune import run as running
from moshi_mlx_finetune.cli import main
from moshi_mlx_finetune.learn.trainer import Trainer

import moshi_mlx
from moshi_mlx.checkpoint.readers import read_safetensors
from moshi_mlx.engine.text import Word
from moshi_mlx.tasks.transcribe import SpeechToText

from .helpers import checkpoint, recording, recordings

SHORT = ["--duration", "2", "--rank", "2", "--rate", "0.01", "--validation-share", "0.2"]


def train(model: Path, data: Path, out: Path, *more: str) -> int:
    return main(["train", str(model), str(data), str(out), *SHORT, *more])


def test_a_training_that_is_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this fails, Ctrl-C loses work, or what is gone on with ends elsewhere than what was never stopped."""
    model, data = checkpoint(tmp_path / "model"), recordings(tmp_path / "data")
    assert train(model, data, tmp_path / "whole", "--steps", "4", "--sample-every", "4") == 0
    log = running._Run.log

    def stopped(self: Any, step: int, figures: Any) -> None:
        log(self, step, figures)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(running._Run, "log", stopped)
        assert train(model, data, tmp_path / "parts", "--steps", "4") == 130
    assert "2 of 4 steps are kept" in capsys.readouterr().err
    assert moshi_mlx.load(str(model), lora=tmp_path / "parts" / "lora.safetensors").trained
    assert train(model, data, tmp_path / "parts", "--steps", "4") == 0
    whole, parts = ((tmp_path / name / "lora.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    lines = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "text" in line] == [1, 2, 3, 4]
    assert (tmp_path / "parts" / "losses.svg").read_text().startswith("<svg")
    assert (tmp_path / "whole" / "samples" / "step-000004.wav").stat().st_size > 1000
    # Other settings would be another training.
    assert train(model, data, tmp_path / "parts", "--steps", "5") == 1
    assert "other settings (steps)" in capsys.readouterr().err


@pytest.mark.parametrize(("backend", "base"), [("mlx", "packed"), ("numpy", "unpacked")])
def test_a_packed_base(tmp_path: Path, backend: Any, base: str) -> None:
    """If this fails, the base is unpacked or changed by training, or its update is not applied when it is loaded."""
    model, data, out = checkpoint(tmp_path / "model", quantized=True), recordings(tmp_path / "data"), tmp_path / "out"
    assert train(model, data, out, "--steps", "3", "--base", base) == 0
    update, _ = read_safetensors(out / "lora.safetensors")
    assert any(mx.abs(value).max().item() > 0 for name, value in update.items() if "lora_B" in name)
    plain, tuned = (
        moshi_mlx.load(str(model)),
        moshi_mlx.load(str(model), lora=out / "lora.safetensors", backend=backend),
    )
    layer = tuned.lm.transformer.layers[0].gating.linear_in
    before = plain.lm.transformer.layers[0].gating.linear_in
    assert mx.array_equal(layer.linear.weight, before.weight) and layer.linear.weight.dtype == mx.uint32
    pcm = np.random.default_rng(0).normal(0, 0.1, 24000).astype(np.float32)
    replies = [m.reply(pcm, 24000, tail=0.5).text for m in (plain, tuned)]
    tokens = mx.array(np.random.default_rng(1).integers(0, 60, (1, 7, 10)))
    assert not mx.allclose(plain.lm(tokens).text_logits, tuned.lm(tokens).text_logits, atol=1e-4)
    assert isinstance(replies[1], str)


def test_numpy_and_mlx_agree_on_an_update(tmp_path: Path) -> None:
    """If this fails, a packed model with an update answers otherwise on the CPU than in MLX."""
    model, data, out = checkpoint(tmp_path / "model", quantized=True), recordings(tmp_path / "data"), tmp_path / "out"
    assert train(model, data, out, "--steps", "3") == 0
    pcm = np.random.default_rng(0).normal(0, 0.1, 48000).astype(np.float32)
    said = []
    for backend in ("numpy", "mlx"):
        tuned = moshi_mlx.load(str(model), lora=out / "lora.safetensors", backend=backend, codec="numpy")  # type: ignore[arg-type]
        settings = moshi_mlx.GenerationConfig(text=moshi_mlx.Sampling(0.0), audio=moshi_mlx.Sampling(0.0))
        with tuned.session(generation=settings) as session:
            steps = [session.step(pcm[at : at + 1920]).step for at in range(0, 48000, 1920)]
        said.append([int(step.text[0]) for step in steps if step is not None])
    assert said[0] == said[1]


def test_memory_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, a machine swaps or kills the training instead of getting shorter pieces or a clear word."""
    model, data = checkpoint(tmp_path / "model"), recordings(tmp_path / "data")
    assert train(model, data, tmp_path / "none", "--memory", "0.001") == 1
    assert "training needs" in capsys.readouterr().err and not (tmp_path / "none").exists()
    options = [str(model), str(data), str(tmp_path / "some"), "--steps", "1", "--rank", "2", "--duration", "60"]
    assert main(["train", *options, "--memory", "0.012"]) == 0
    told = capsys.readouterr().err
    assert "instead of 60 s, to fit into memory" in told and "measured, of 0.0 GB" in told


def test_embeddings_too(tmp_path: Path) -> None:
    """If this fails, --ft-embed writes a file that does not load, or trains no table."""
    model, data, out = checkpoint(tmp_path / "model", quantized=True), recordings(tmp_path / "data"), tmp_path / "out"
    assert train(model, data, out, "--steps", "2", "--ft-embed") == 0
    update, _ = read_safetensors(out / "lora.safetensors")
    assert {"text_emb.weight", "emb.0.weight", "depformer_text_emb.weight", "depformer_emb.0.weight"} <= update.keys()
    tuned = moshi_mlx.load(str(model), lora=out / "lora.safetensors")
    close = mx.allclose(tuned.lm.text_emb.weight, update["text_emb.weight"].astype(mx.float32), atol=1e-6)
    assert close


def test_what_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, a mistake is found late, or its message does not say what to do."""
    model, data = checkpoint(tmp_path / "model"), recordings(tmp_path / "data")

    def error(source: Path, out: str = "out", *more: str) -> str:
        assert train(model, source, tmp_path / out, *more) == 1
        return capsys.readouterr().err

    assert "there is no such file or folder" in error(tmp_path / "nothing")
    assert "two are needed" in error(recording(tmp_path / "mono" / "a.wav", 3.0, channels=1))
    silent = recording(tmp_path / "silent" / "a.wav", 3.0)
    silent.with_suffix(".json").unlink()
    assert "moshi-mlx-finetune prepare" in error(silent)
    assert "alignments is" in error(recording(tmp_path / "odd" / "a.wav", 3.0, [["word", "now"]]))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert "not of a training (letter.txt)" in error(data, "mine", "--force")
    assert "is larger than" in error(data, "out", "--rank", "400")
    assert main(["train", str(model), str(data), str(tmp_path / "out"), "--steps", "0"]) == 2


def test_prepare_adds_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, recordings without words cannot be learnt, or the wrong side is written down."""
    model = checkpoint(tmp_path / "model")
    path = recording(tmp_path / "data" / "a.wav", 3.0, [["user", [0.2, 0.5], "SPEAKER_OTHER"]])
    data = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**data, "title": "kept"}))
    heard: list[np.ndarray] = []

    def transcribe(pcm: np.ndarray, rate: int) -> Any:
        heard.append(pcm)
        return SimpleNamespace(words=(Word(" hello", 0.48, 0.9), Word(" moshi", 1.0, 1.4)))

    recogniser: Any = SpeechToText.__new__(SpeechToText)
    recogniser.codec, recogniser.transcribe = SimpleNamespace(sample_rate=24000), transcribe
    monkeypatch.setattr(moshi_mlx, "load", lambda *_, **__: recogniser)
    command = ["prepare", str(tmp_path / "data"), "--model", str(model)]
    assert main([*command, "--recogniser", "stt", "--again"]) == 0
    left, _ = preparing.read_piece(preparing.open_recording(path), 0.0, 3.0, 24000)
    np.testing.assert_array_equal(heard[0], left)
    told = capsys.readouterr().out
    assert "a.wav: 3.0 s, 24000 Hz, 2 words: hello moshi" in told and "0.48 " in told
    written = json.loads(path.with_suffix(".json").read_text())
    assert written["title"] == "kept" and [entry[2] for entry in written["alignments"]] == [
        "SPEAKER_OTHER", "SPEAKER_MAIN", "SPEAKER_MAIN",
    ]  # fmt: skip
    monkeypatch.setattr(moshi_mlx, "load", lambda *_, **__: SimpleNamespace(purpose="dialogue"))
    assert main([*command, "--recogniser", "stt", "--again"]) == 1
    assert "needs a speech-to-text model" in capsys.readouterr().err


def test_a_gradient_that_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """If this fails, numbers that are not finite are trained, and kept over what was good."""
    model, data = checkpoint(tmp_path / "model"), recordings(tmp_path / "data")
    made = Trainer.__init__

    def spoilt(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        gradient = self._gradient
        self._gradient = lambda *given: (gradient(*given)[0], {"x": mx.array([float("nan")])})

    monkeypatch.setattr(Trainer, "__init__", spoilt)
    assert train(model, data, tmp_path / "out", "--steps", "1") == 1
    assert "the gradient is not finite" in capsys.readouterr().err
