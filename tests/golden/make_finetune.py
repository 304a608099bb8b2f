"""Write the goldens of `tests/golden/finetune` with moshi-finetune's own code.

Run it from the root of the repository with the Python of an environment that holds PyTorch and `moshi` 0.2.13
(``make reference``), and the folder of a clone of https://github.com/kyutai-labs/moshi-finetune (commit 2acc879 was
used)::

    .venv-reference/bin/python tests/golden/make_finetune.py ../moshi-finetune

Nothing of this project is imported but its built-in tokenizer and a golden model.

``rows.json``        words, and the text rows that its ``Interleaver`` makes of them, with and without ``audio_delay``;
                     ``tail``: what its ``InterleavedTokenizer`` makes of a piece that ends early
``curve.json``       learning rate and beta1 of every step of ``OneCycleLR``, and parameters that ``AdamW`` and
                     ``clip_grad_norm_`` reached along it
``loss.safetensors`` logits, targets, masks; ``losses`` by its ``compute_loss_with_mask``
``lora.safetensors`` an update of the golden model `lm/moshi`, by its ``Checkpointer``; ``config.json`` beside it
``forward.safetensors`` tokens, the logits of the model with that update, and its losses
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["NO_TORCH_COMPILE"] = "1"
os.environ["NO_CUDA_GRAPH"] = "1"

import numpy as np
import sentencepiece
import torch
from moshi.models.loaders import get_moshi_lm
from safetensors.torch import save_file

HERE = Path(__file__).parent
OUT = HERE / "finetune"
TOKENIZER = HERE.parents[1] / "moshi_mlx" / "builtin" / "small" / "tokenizer.model"
WORDS = "The capital of France is Paris. Chocolate x parrot elephant I moo seventeen? Zürich 24".split()


def words(rng: random.Random, seconds: float) -> list[list[object]]:
    """Words that overlap, share a frame, start at 0, have no length, or are another speaker's."""
    out: list[list[object]] = [["The", [0.0, 0.1], "SPEAKER_MAIN"]] if rng.random() < 0.5 else []
    at = 0.0
    while at < seconds:
        at += rng.choice((0.0, 0.02, 0.08, 0.2, 0.7, rng.random()))
        length = rng.choice((0.0, -0.1, 0.05, 0.3, rng.random()))
        speaker = rng.choice(("SPEAKER_MAIN", "SPEAKER_MAIN", "SPEAKER_OTHER"))
        out.append([rng.choice((" ", "")) + rng.choice(WORDS), [round(at, 3), round(at + length, 3)], speaker])
    return out


def rows(folder: Path) -> None:
    from finetune.data.interleaver import InterleavedTokenizer, Interleaver

    spm = sentencepiece.SentencePieceProcessor(str(TOKENIZER))
    rng, cases = random.Random(1), []
    for number in range(24):
        ahead, seconds = (0.0, 0.16)[number % 2], rng.choice((2.0, 4.5, 9.96))
        given = words(rng, seconds)
        made = Interleaver(spm, 12.5, 3, 0, -1, keep_main_only=True, device="cpu", audio_delay=ahead)
        row = made.prepare_item([(w, tuple(t), s) for w, t, s in given if t[0] < seconds], seconds)
        cases.append({"words": given, "seconds": seconds, "ahead": ahead, "row": row.view(-1).tolist()})

    class Mimi:
        frame_rate = 12.5

        def encode(self, pcm: torch.Tensor) -> torch.Tensor:
            frames = -(-pcm.shape[-1] // 1920)
            return torch.zeros(2, 2, frames, dtype=torch.long)

    torch.Tensor.cuda = lambda self: self  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "a.json")
        given = [["The", [0.3, 0.5], "SPEAKER_MAIN"], ["capital", [0.6, 0.9], "SPEAKER_MAIN"]]
        path.write_text(json.dumps({"alignments": given}))
        interleaver = Interleaver(spm, 12.5, 3, 0, -1, keep_main_only=True, device="cpu")
        tokenizer = InterleavedTokenizer(Mimi(), interleaver, duration_sec=2.0)
        codes = tokenizer(np.zeros((2, 24000), np.float32), 0.0, str(path.with_suffix(".wav"))).codes[0]
    tail = {"words": given, "seconds": 1.0, "piece": 2.0, "text": codes[0].tolist(), "audio": codes[1].tolist()}
    (folder / "rows.json").write_text(json.dumps({"cases": cases, "tail": tail}))


def curve(folder: Path) -> None:
    from torch.optim import AdamW, lr_scheduler

    out: dict[str, object] = {"curves": []}
    for steps, peak, rising in ((100, 1e-4, 0.05), (41, 2e-6, 0.05), (30, 1e-3, 0.3), (400, 1e-4, 0.05)):
        parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        optimizer = AdamW([parameter], lr=peak, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=peak, total_steps=steps, pct_start=rising)
        torch.manual_seed(steps)
        gradients = torch.randn(steps, 3) * 2
        found = []
        for gradient in gradients:
            group = optimizer.param_groups[0]
            found.append([group["lr"], group["betas"][0]])
            parameter.grad = gradient.clone()
            torch.nn.utils.clip_grad_norm_([parameter], 1.0)
            optimizer.step()
            if len(found) < steps:
                scheduler.step()
        entry = {"steps": steps, "peak": peak, "rising": rising, "curve": found}
        if steps == 30:
            entry |= {"gradients": gradients.tolist(), "reached": parameter.tolist()}
        out["curves"].append(entry)  # type: ignore[attr-defined]
    (folder / "curve.json").write_text(json.dumps(out))


def loss(folder: Path) -> None:
    from finetune.loss import compute_loss_with_mask

    torch.manual_seed(3)
    text, audio = torch.randn(2, 1, 20, 12) * 3, torch.randn(2, 4, 20, 9) * 3
    text_target, audio_target = torch.randint(0, 12, (2, 1, 20)), torch.randint(0, 9, (2, 4, 20))
    text_target[:, :, ::3] = 3
    text_target[:, :, 1::5] = 0
    text_mask, audio_mask = torch.rand(2, 1, 20) > 0.2, torch.rand(2, 4, 20) > 0.3
    text_target[1, :, 15:] = -1
    audio_target[1, :, 15:] = -1
    text_mask &= text_target >= 0
    audio_mask &= audio_target >= 0
    found = []
    for padding, first in ((0.5, 1.0), (1.0, 100.0), (0.1, 7.0)):
        one = compute_loss_with_mask(text, text_target, text_mask, "text", 1.0, padding, {0, 3})
        other = compute_loss_with_mask(audio, audio_target, audio_mask, "audio", first)
        found.append([padding, first, one.item(), other.item()])
    tensors = {"text": text, "audio": audio, "text_target": text_target, "audio_target": audio_target}
    masks = {"text_mask": text_mask, "audio_mask": audio_mask, "losses": torch.tensor(found)}
    save_file({**tensors, **masks}, str(folder / "loss.safetensors"))


def update(folder: Path) -> None:
    import finetune.checkpointing as checkpointing
    from finetune.loss import compute_loss_with_mask
    from finetune.utils import TrainState

    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:29512", rank=0, world_size=1)
    base = HERE / "lm" / "moshi"
    config = json.loads((base / "config.json").read_text())
    lm_keys = {key: value for key, value in config.items() if not key.endswith("_name") and key != "model_type"}
    settings = {"lora": True, "lora_rank": 3, "lora_scaling": 2.0}
    model = get_moshi_lm(base / "model.safetensors", {**lm_keys, **settings}, device="cpu", dtype=torch.float32)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora" in name
        if "lora" in name:
            parameter.data = (torch.randn_like(parameter) * 0.2).to(torch.bfloat16).float()
    with tempfile.TemporaryDirectory() as place:
        state = TrainState(100)
        writer = checkpointing.Checkpointer(model, state, Path(place), {**config, **settings}, None, None)
        writer.save_checkpoint(save_only_lora=True, dtype=torch.bfloat16)
        for name in ("lora.safetensors", "config.json"):
            shutil.copy(writer.dst_dir / name, folder / name)
    tokens = torch.randint(0, 28, (2, 1 + config["n_q"], 12))
    tokens[:, 0] = torch.randint(0, 48, (2, 12))
    tokens[:, 0, ::4] = 3
    tokens[1, :, 8:] = -1
    with torch.no_grad():
        out = model(tokens)
    text = compute_loss_with_mask(out.text_logits, tokens[:, :1], out.text_mask, "text", 1.0, 0.5, {0, 3})
    audio = compute_loss_with_mask(out.logits, tokens[:, 1:4], out.mask, "audio", 100.0)
    tensors = {
        "tokens": tokens,
        "text_logits": torch.nan_to_num(out.text_logits),
        "logits": torch.nan_to_num(out.logits),
        "losses": torch.stack([text, audio]),
    }
    save_file({name: value.contiguous() for name, value in tensors.items()}, str(folder / "forward.safetensors"))


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    OUT.mkdir(exist_ok=True)
    for make in (rows, curve, loss, update):
        make(OUT)
    for path in sorted(OUT.iterdir()):
        print(f"{path.name:24} {path.stat().st_size:8,} bytes")


if __name__ == "__main__":
    main()
