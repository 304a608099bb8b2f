"""The same numbers as moshi-finetune: rows, losses, the learning rate's curve, and files in both directions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from moshi_mlx_finetune.data.rows import TimedWord, cut_words, frames_in, masked_tail, text_row
from moshi_mlx_finetune.learn.adapters import Adapter, add_adapter, file_names, flat, save_adapter
from moshi_mlx_finetune.learn.loss import Weights, losses, weighted_mean
from moshi_mlx_finetune.learn.schedule import one_cycle

from moshi_mlx.builtin import __path__ as BUILTIN
from moshi_mlx.checkpoint.fit import load_config, load_lm
from moshi_mlx.checkpoint.readers import read_safetensors
from moshi_mlx.engine.text import TextTokenizer

from ..helpers import golden_lm

GOLDEN = Path(__file__).parents[1] / "golden" / "finetune"
BASE = golden_lm.FOLDER / "moshi"
ROWS: dict[str, Any] = json.loads((GOLDEN / "rows.json").read_text())
CURVES: list[dict[str, Any]] = json.loads((GOLDEN / "curve.json").read_text())["curves"]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(Path(next(iter(BUILTIN))) / "small" / "tokenizer.model")


def main_words(entries: list[Any]) -> list[TimedWord]:
    return [TimedWord(text, *times) for text, times, speaker in entries if speaker == "SPEAKER_MAIN"]


@pytest.mark.parametrize("case", ROWS["cases"], ids=range(len(ROWS["cases"])))
def test_text_rows(case: dict[str, Any], tokenizer: TextTokenizer) -> None:
    """If this fails, text is learnt at other frames than moshi-finetune's, or other tokens of it."""
    words = cut_words(main_words(case["words"]), 0.0, case["seconds"], case["ahead"])
    row = text_row(words, frames_in(case["seconds"]), tokenizer.encode)
    assert row.tolist() == case["row"]


def test_the_cases_hold_what_they_are_for() -> None:
    """If this fails, the rows above prove nothing of overlaps, words in one frame, or a start at 0."""
    rows = [case["row"] for case in ROWS["cases"]]
    assert any(row[0] > 3 for row in rows) and any(0 in row for row in rows)
    starts = [[int(t[0] * 12.5) for _, t, s in case["words"] if s == "SPEAKER_MAIN"] for case in ROWS["cases"]]
    assert any(len(set(frames)) < len(frames) for frames in starts)


def test_a_short_tail_is_masked(tokenizer: TextTokenizer) -> None:
    """If this fails, silence is learnt where a recording has ended: moshi-finetune's text row goes on there."""
    tail = ROWS["tail"]
    theirs, frames, real = tail["text"], frames_in(tail["piece"]), frames_in(tail["seconds"])
    assert theirs[real:] == [3] * (frames - real)  # their bug: seconds and frames are mixed up
    assert tail["audio"][real:] == [-1] * (frames - real)  # and the sound is masked
    row = text_row(cut_words(main_words(tail["words"]), 0.0, tail["seconds"]), real, tokenizer.encode)
    ours = masked_tail(row[None], frames)[0].tolist()
    assert ours[:real] == theirs[:real] and ours[real:] == [-1] * (frames - real)


def test_losses_of_random_logits() -> None:
    """If this fails, padding, the first codebook or masked entries count otherwise."""
    arrays, _ = read_safetensors(GOLDEN / "loss.safetensors")
    text_target, audio_target = arrays["text_target"], arrays["audio_target"]
    for padding, first, text_loss, audio_loss in arrays["losses"].tolist():
        padded = (text_target == 3) | (text_target == 0)
        counted = arrays["text_mask"].astype(mx.float32) * mx.where(padded, padding, 1.0)
        assert weighted_mean(arrays["text"], text_target, counted).item() == pytest.approx(text_loss, rel=1e-5)
        by_book = mx.array([first, 1.0, 1.0, 1.0])[None, :, None]
        counted = arrays["audio_mask"].astype(mx.float32) * by_book
        assert weighted_mean(arrays["audio"], audio_target, counted).item() == pytest.approx(audio_loss, rel=1e-5)


@pytest.mark.parametrize("case", CURVES, ids=lambda case: str(case["steps"]))
def test_curve(case: dict[str, Any]) -> None:
    """If this fails, learning rate or momentum of a step are not OneCycleLR's."""
    ours = [one_cycle(step, case["steps"], case["peak"], case["rising"]) for step in range(case["steps"])]
    np.testing.assert_allclose(np.array(ours), np.array(case["curve"]), rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_curve_of_few_steps(steps: int) -> None:
    """If this fails, a short training ends with a division by zero, as PyTorch's schedule does for 20 steps."""
    for step in range(steps):
        rate, beta = one_cycle(step, steps, 1e-4)
        assert 0 < rate <= 1e-4 and 0.85 <= beta <= 0.95


def test_adamw_along_the_curve() -> None:
    """If this fails, MLX's optimizer as it is used here goes elsewhere than PyTorch's AdamW."""
    (case,) = [case for case in CURVES if "gradients" in case]
    parameter = {"x": mx.array([1.0, -2.0, 0.5])}
    optimizer = optim.AdamW(1e-3, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1, bias_correction=True)
    optimizer.init(parameter)
    for step, gradient in enumerate(case["gradients"]):
        rate, beta = one_cycle(step, case["steps"], case["peak"], case["rising"])
        optimizer.learning_rate, optimizer.betas = rate, [beta, 0.95]
        clipped, _ = optim.clip_grad_norm({"x": mx.array(gradient)}, 1.0)
        parameter = optimizer.apply_gradients(clipped, parameter)
    np.testing.assert_allclose(np.array(parameter["x"]), case["reached"], rtol=2e-6)


def close(ours: mx.array, theirs: mx.array, tolerance: float = 2e-4) -> None:
    np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=tolerance, rtol=tolerance)


def test_their_file_loads_here() -> None:
    """If this fails, an update of moshi-finetune gives other logits or losses here, merged."""
    arrays, _ = read_safetensors(GOLDEN / "forward.safetensors")
    config = load_config(GOLDEN / "config.json")
    assert (config.lora_rank, config.lora_scaling) == (3, 2.0)
    lm = load_lm(config, BASE / "model.safetensors", lora=GOLDEN / "lora.safetensors", dtype=mx.float32)
    tokens = arrays["tokens"].astype(mx.int32)
    out = lm(tokens)
    # Where no position predicts a token there is NaN there, 0 here.
    close(
        mx.where(out.text_mask[..., None], out.text_logits, 0),
        mx.where(out.text_mask[..., None], arrays["text_logits"], 0),
    )
    close(mx.where(out.mask[..., None], out.logits, 0), mx.where(out.mask[..., None], arrays["logits"], 0))
    close(mx.stack(losses(lm, tokens, Weights(0.5, 100.0))), arrays["losses"])


def with_their_values(adapter: Adapter) -> Any:
    """Our layers on the golden model, holding the update of their file."""
    lm = load_lm(load_config(BASE / "config.json"), BASE / "model.safetensors", dtype=mx.float32)
    add_adapter(lm, adapter)
    theirs, _ = read_safetensors(GOLDEN / "lora.safetensors")
    names = flat(lm.trainable_parameters())
    assert {file_names(name, lm.config) for name in names} == theirs.keys()
    values = [(name, theirs[file_names(name, lm.config)].astype(mx.float32).T) for name in names]
    lm.load_weights(values, strict=False)
    return lm


def test_our_layers_compute_the_same() -> None:
    """If this fails, what is trained here is not what moshi-finetune trains: the update beside the weights."""
    arrays, _ = read_safetensors(GOLDEN / "forward.safetensors")
    lm = with_their_values(Adapter(rank=3))
    close(mx.stack(losses(lm, arrays["tokens"].astype(mx.int32), Weights(0.5, 100.0))), arrays["losses"])


def test_bytes_of_our_file(tmp_path: Path) -> None:
    """If this fails, names, order, types or bytes of our file are not moshi-finetune's."""
    lm = with_their_values(Adapter(rank=3))
    base = json.loads((BASE / "config.json").read_text())
    save_adapter(tmp_path, flat(lm.trainable_parameters()), lm.config, Adapter(rank=3), base)
    assert (tmp_path / "lora.safetensors").read_bytes() == (GOLDEN / "lora.safetensors").read_bytes()
    ours, theirs = ((folder / "config.json").read_text() for folder in (tmp_path, GOLDEN))
    assert json.loads(ours) == json.loads(theirs)


def test_a_folder_with_our_file_is_a_checkpoint(tmp_path: Path) -> None:
    """If this fails, config.json beside an update does not say that it belongs to the model."""
    for name in ("lora.safetensors", "config.json"):
        shutil.copy(GOLDEN / name, tmp_path / name)
    shutil.copy(BASE / "model.safetensors", tmp_path / "model.safetensors")
    from moshi_mlx.checkpoint.resolve import resolve

    assert resolve(str(tmp_path)).lora == tmp_path / "lora.safetensors"
