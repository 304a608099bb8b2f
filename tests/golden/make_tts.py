"""Write `tests/golden/tts`: texts spoken by small random models with Kyutai's own `TTSModel.generate`, greedily.

Run it from the root of the repository with the Python of an environment that holds PyTorch moshi 0.2.13::

    python tests/golden/make_tts.py

`script.json`: what `script_to_entries` makes of some scripts, with a tokenizer that takes three letters for a token.
`plain`: a model with two-row guidance; `muxed`: one with a second text stream and guidance in its conditions. Both ask
for a word now and then.
`NAME.safetensors`, `runs.json`: codes [frames, batch, 1 + codebooks], entries, conditions, prefixes, words and ends of
each run. Every greedy decision that matters is clear by MIN_GAP.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import make_lm
import torch
from moshi.conditioners import ConditionAttributes, TensorCondition
from moshi.models import lm as reference_lm
from moshi.models.tts import StateMachine, TokenIds, TTSModel, script_to_entries
from safetensors.torch import load_file, save_file

OUT = Path(__file__).parent / "tts"
MIN_GAP = 2e-4
SEED = 0  # another one draws other models and runs

SCRIPTS: list[list[str]] = [
    ["Hello wonderful world now"],
    ["Hi: (you)", "Yes"],
    ["", "The other begins", "then   me", "then it\n"],
    ['One <break time="0.5s"/> two', 'It\u2019s<break time="2s" />over'],
    ["half <break and 3 < 4", " a:b "],
]
TEXTS = [["Hello wonderful world now", "Yes, indeed it is"], ['One <break time="0.5s"/> two three']]


class Letters:
    """Three letters for a token."""

    def encode(self, word: str) -> list[int]:
        return [4 + sum(map(ord, word[at : at + 3])) % 36 for at in range(0, len(word), 3)]


PLAIN = make_lm.Case(
    "one text stream, guidance in two rows, a speaker and one named condition",
    make_lm.base_config(
        model_type="tts",
        n_q=4,
        dep_q=4,
        text_card=40,
        text_card_out=5,
        card=24,
        delays=[0, 0, 2, 2, 2],
        depformer_num_layers=1,
        depformer_dim_feedforward=48,
        cross_attention=True,
        conditioners={"speaker_wavs": {"type": "tensor", "tensor": {"dim": 12}}, "control": make_lm.lut(1, 32, ["ok"])},
        fuser=make_lm.NO_FUSER | {"sum": ["control"], "cross": ["speaker_wavs"]},
        tts_config={"audio_delay": 1.28},
        lm_gen_config={"temp": 0.6, "text_temp": 0.6},
        model_id={"sig": "00000000", "epoch": 3},
    ),
    seed=41,
    zero_tokens=True,
    conditions=[{"control": "ok", "speaker_wavs": 9}, {"control": "ok", "speaker_wavs": 6}],
    greedy=False,
    generation_batch=1,
    generation_conditions=[{"control": "ok", "speaker_wavs": 7}],
)


def model(folder: Path, ahead: int, **options: Any) -> TTSModel:
    lm = make_lm.load_reference(folder)
    machine = StateMachine(TokenIds(lm.text_card + 1), second_stream_ahead=ahead, max_padding=8, initial_padding=2)
    mimi: Any = SimpleNamespace(frame_rate=12.5, sample_rate=24000)
    return TTSModel(
        lm=lm, mimi=mimi, tokenizer=Letters(), voice_suffix="", voice_repo="", machine=machine, delay_steps=16,
        temp=0.0, **options,
    )  # fmt: skip


def run(folder: Path, ahead: int, seed: int, prefixes: list[int] | None, cfg: str | None, **options: Any) -> Any:
    """One run: what it gave, and how clear its closest decision was."""
    gen = torch.Generator().manual_seed(seed)
    tts = model(folder, ahead, **options)
    tensors: dict[str, torch.Tensor] = {}
    attributes, voices = [], []
    for index in range(len(TEXTS)):
        speakers, mask = torch.randn(1, 15, 12, generator=gen), torch.zeros(1, 15, dtype=torch.bool)
        mask[:, : 3 * (2 - index)] = True
        text = {"control": "ok"} | ({"cfg": cfg} if cfg else {})
        attributes.append(ConditionAttributes(text=text, tensor={"speaker_wavs": TensorCondition(speakers, mask)}))
        voices.append((speakers, mask))
    tensors["speakers"] = torch.cat([one for one, _ in voices])
    tensors["mask"] = torch.cat([one for _, one in voices]).int()
    given = None
    if prefixes is not None:
        given = []
        for index, length in enumerate(prefixes):
            codes = torch.randint(0, 24, (4, length), generator=gen)
            tensors[f"prefix{index}"] = codes.int()
            given.append(torch.cat([torch.full((1, length), -1), codes]))
    entries = [tts.prepare_script(text, padding_between=1) for text in TEXTS]
    saved = [[[list(e.tokens), e.text, e.padding] for e in each] for each in entries]
    gap = [torch.tensor(9.0)]
    original = reference_lm.sample_token

    def sample_token(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        if logits.shape[-1] == 5:  # of the text only whether a word starts
            best = logits[..., 1:].amax(-1)
            gap.append((best - logits[..., 0]).abs().min())
        else:
            top = logits.topk(2).values
            gap.append((top[..., 0] - top[..., 1]).min())
        return original(logits, *rest)

    reference_lm.sample_token = sample_token
    try:
        result = tts.generate(entries, attributes, given)
    finally:
        reference_lm.sample_token = original
    tensors["frames"] = torch.stack(result.frames)[..., 0].int()
    tensors["logged"] = torch.tensor(result.logged_text_tokens).int()
    about = {
        "model": folder.name, "ahead": ahead, "cfg": cfg, "entries": saved,
        "prefixes": prefixes, "ends": result.end_steps, "words": result.all_transcripts, "seed": seed, **options,
    }  # fmt: skip
    return tensors, about, float(torch.stack(gap).min())


def balance(folder: Path, ahead: int, options: dict[str, Any]) -> None:
    """Let a model ask for a word about every other time: the head of token 0 becomes that of the most frequent token,
    moved in a direction in which outputs are as often positive as negative."""
    seen: list[torch.Tensor] = []
    load = make_lm.load_reference

    def watched(path: Path, with_weights: bool = True) -> Any:
        lm = load(path, with_weights)
        lm.text_linear.register_forward_hook(lambda module, given, out: seen.append(given[0].reshape(-1, 32)[:2]))
        return lm

    make_lm.load_reference = watched
    tensors, _, _ = run(folder, ahead, 0, None, "2.0" if ahead else None, **options)
    make_lm.load_reference = load
    hidden = torch.cat(seen)
    mean = hidden.mean(0)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    direction -= mean * (direction @ mean) / (mean @ mean)
    usual = int(tensors["logged"][..., 0].flatten().mode().values)
    state = load_file(folder / "model.safetensors")
    state["text_linear.weight"][0] = state["text_linear.weight"][usual] + direction / (hidden @ direction).std()
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def main() -> None:
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    cases = []
    for script in SCRIPTS:
        for multi in (True, False):
            for between in (0, 1):
                entries = script_to_entries(Letters(), TokenIds(41), 12.5, script, multi, between)  # type: ignore[arg-type]
                found = [[list(entry.tokens), entry.text, entry.padding] for entry in entries]
                cases.append({"script": script, "speakers": multi, "padding": between, "entries": found})
    (OUT / "script.json").write_text(json.dumps(cases) + "\n")
    muxed, plain = OUT / "muxed", OUT / "plain"
    for folder, case in ((plain, PLAIN), (muxed, make_lm.CASES["tts"])):
        make_lm.write_model(folder, replace(case, seed=case.seed + SEED))
        balance(folder, 0 if case is PLAIN else 2, {"n_q": 4} | ({"cfg_coef": 2.0} if case is PLAIN else {}))
    runs = {
        "distilled": (muxed, 2, None, "2.0", {}),
        "few_codebooks": (muxed, 2, None, "3.5", {"n_q": 2, "padding_bonus": 1.0}),
        "guided": (plain, 0, None, None, {"cfg_coef": 2.0}),
        "prefix": (plain, 0, [5, 9], None, {"cfg_coef": 1.5}),
    }
    told = {}
    for name, (folder, ahead, prefixes, cfg, options) in runs.items():
        for seed in range(SEED, SEED + 200):
            tensors, about, gap = run(folder, ahead, seed, prefixes, cfg, **({"n_q": 4} | options))
            asked = (tensors["logged"][..., 0] == 0).float().mean(dim=1)
            print(name, seed, f"{gap:.1e}", asked.tolist(), flush=True)
            if gap > MIN_GAP and 0.02 < asked.min() and asked.max() < 0.95:
                break
        else:
            raise RuntimeError(f"{name}: no seed keeps every decision clear")
        told[name] = about | {"smallest_gap": gap}
        print(name, seed, gap, tensors["frames"].shape, about["ends"])
        save_file({key: value.contiguous() for key, value in tensors.items()}, OUT / f"{name}.safetensors")
    (OUT / "runs.json").write_text(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
