"""Write the goldens of `tests/golden/translate` with the translation loop of Kyutai's PyTorch package `moshi` 0.2.13.

Run it from the root of the repository with the Python of an environment that holds the reference
(``pip install moshi==0.2.13``, CPU torch is enough; torch 2.13 was used)::

    python tests/golden/make_translate.py       # a minute on one core

``moshi.run_inference.InferenceState.run`` itself decides what the model reads at the end of a file, which frames it
returns and when it stops. Its model is that of `tests/golden/lm/hibiki`, greedy; its codec is a stand-in whose codes
are written in the samples (:class:`Codec`). Nothing of this project is imported. What the files hold is told in
`tests/golden/README.md`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["NO_TORCH_COMPILE"] = "1"
os.environ["NO_CUDA_GRAPH"] = "1"

import torch
from moshi.models.loaders import CheckpointInfo
from moshi.run_inference import InferenceState
from safetensors.torch import save_file

MODEL = Path(__file__).parent / "lm" / "hibiki"
OUT = Path(__file__).parent / "translate"
CARD, BOOKS, FRAME = 28, 3, 1920
LIMIT = 60  # frames after the end of the file: where no end of text comes the reference would go on for ever
MIN_GAP = 5e-4  # least distance between the two best logits of any greedy decision
TAIL = 16


class _Endless(Exception):
    """The run was stopped: no end of text came."""


class Codec:
    """A codec whose codes are the first samples of a frame, in steps of 1 / card; silence is therefore code 0."""

    sample_rate, frame_rate, cardinality, num_codebooks, channels = 24000, 12.5, CARD, BOOKS, 1

    def __init__(self) -> None:
        self.heard = 0

    def streaming_forever(self, batch: int) -> None:
        pass

    def encode(self, pcm: torch.Tensor) -> torch.Tensor:
        self.heard += 1
        return (pcm[:, 0, :BOOKS, None] * CARD).round().long()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        assert (codes >= 0).all()
        return torch.zeros(len(codes), 1, FRAME)


def run(seed: int, frames: int, cfg_coef: float) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """One file of `frames` frames through the reference; None if a decision was too close."""
    torch.manual_seed(seed)
    raw = json.loads((MODEL / "config.json").read_text())
    known = {name: raw[name] for name in ("model_type", "lm_gen_config")}
    others = {"moshi_name", "mimi_name", "tokenizer_name", *known}
    sizes = {name: value for name, value in raw.items() if name not in others}
    info = CheckpointInfo(MODEL / "model.safetensors", MODEL, MODEL, sizes, raw, **known)
    lm = info.get_moshi(device="cpu", dtype=torch.float32)
    gaps: list[float] = []
    logits: list[torch.Tensor] = []

    def watch(found: torch.Tensor) -> None:
        best = found.flatten().topk(2).values
        gaps.append(float(best[0] - best[1]))
        logits.append(found.flatten().clone())

    codes = torch.randint(0, CARD, (frames, BOOKS))
    pcm = torch.zeros(frames, FRAME)
    pcm[:, :BOOKS] = codes / CARD
    codec = Codec()
    tokenizer = SimpleNamespace(eos_id=lambda: 2, id_to_piece=str)
    state = InferenceState(
        info, codec, tokenizer, lm, 1, cfg_coef, "cpu", use_sampling=False, on_text_logits_hook=watch,
        **info.lm_gen_config,
    )  # fmt: skip
    fed: list[torch.Tensor] = []
    out: list[torch.Tensor] = []
    step = state.lm_gen.step

    def noted(given: torch.Tensor) -> torch.Tensor | None:
        if len(fed) > frames + 1 + LIMIT:
            raise _Endless
        fed.append(given[0, :, 0].clone())
        found = step(given)
        if found is not None:
            out.append(found[0, :, 0].clone())
        return found

    state.lm_gen.step = noted
    stopped = True
    try:
        ((text, _),) = state.run(pcm.reshape(1, 1, -1))
        assert text.flatten().tolist() == [int(row[0]) for row in out], "the run returns every aligned row"
    except _Endless:
        stopped = False
    if min(gaps) < MIN_GAP:
        return None
    tokens = torch.stack(out)
    arrays = {
        "codes": codes.int(),
        "fed": torch.stack(fed[1:]).int(),  # without the first frame's first time, which no position reads
        "out": tokens.int(),
        "last_text_logits": torch.stack(logits[-TAIL:]),
    }
    about = {
        "seed": seed, "frames": frames, "cfg_coef": cfg_coef, "stopped": stopped, "limit": None if stopped else LIMIT,
        "end_frame": frames, "returned": len(tokens),
        "early_ends": int((tokens[: frames - 1, 0] == 2).sum()), "smallest_gap": min(gaps),
    }  # fmt: skip
    return arrays, about


def main() -> None:
    OUT.mkdir(exist_ok=True)
    # name: guidance, frames, what the run should show
    wanted = {
        "plain": (1.0, 21, lambda about: about["stopped"] and about["returned"] > 30 and not about["early_ends"]),
        "guided": (3.0, 21, lambda about: about["stopped"] and about["returned"] > 30 and not about["early_ends"]),
        "early": (3.0, 40, lambda about: about["stopped"] and about["early_ends"]),
        "endless": (1.0, 12, lambda about: not about["stopped"]),
    }
    told: dict[str, Any] = {"codec": f"code = round(sample * {CARD}), the first {BOOKS} samples of a frame"}
    for name, (cfg_coef, frames, good) in wanted.items():
        for seed in range(200):
            found = run(seed, frames, cfg_coef)
            if found is not None and good(found[1]):
                save_file(found[0], OUT / f"{name}.safetensors")
                (OUT / f"{name}.safetensors").chmod(0o644)
                told[name] = found[1]
                print(name, found[1], len(found[0]["out"]))
                break
        else:
            raise SystemExit(f"no seed gives what {name} is for")
    (OUT / "golden.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
