"""Write the language-model goldens of `tests/golden/lm` with Kyutai's PyTorch package `moshi` 0.2.13.

Run it from the root of the repository with the Python of an environment that holds the reference
(``pip install moshi==0.2.13``, CPU torch is enough; torch 2.13 was used)::

    python tests/golden/make_lm.py                # everything, about two minutes on one core
    python tests/golden/make_lm.py moshi hibiki   # only the named ones

Nothing of this project is imported: the numbers come from the reference alone. Every model is written to
disk in the published layout first and then read back through the reference's own loader, so each folder is
also a proof that its ``config.json`` and ``model.safetensors`` are what the reference accepts. What the
files hold, and how frames, positions and outputs are aligned, is told in `tests/golden/README.md`.

The reference needs no change to run on torch 2.13; only its compiler and CUDA-graph wrappers are switched
off below, before the import. Two things it cannot do itself are done here with its own parts and nothing
else: teacher forcing when ``dep_q`` is 0 (its ``forward`` insists on a depth transformer) and Helium, which
is not in the package (a short plain-torch model at the end of this file).
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["NO_TORCH_COMPILE"] = "1"
os.environ["NO_CUDA_GRAPH"] = "1"

import moshi.models.lm as reference_lm
import moshi.utils.sampling as reference_sampling
import torch
from moshi.conditioners import ConditionAttributes, TensorCondition
from moshi.models.lm import LMGen, LMModel
from moshi.models.lm_utils import _delay_sequence, _undelay_sequence
from moshi.models.loaders import CheckpointInfo, get_moshi_lm
from safetensors.torch import save_file

OUT = Path(__file__).parent / "lm"
ZERO = -1  # embeds to exact zeros
FREE = -2  # nothing there: not generated yet, not forced
STEPS = 500  # frames of a generation run
TAIL = 16  # positions whose logits are kept, at the end of a run
MIN_GAP = 5e-4  # least distance between the two best logits of any greedy decision

Tensors = dict[str, torch.Tensor]


# ------------------------------------------------------------------------------------------ the cases


def base_config(**changes: Any) -> dict[str, Any]:
    """A config.json like Moshi 7B's, small, with `changes` laid over it."""
    config: dict[str, Any] = {
        "moshi_name": "model.safetensors",
        "mimi_name": "tokenizer-e351c8d8-checkpoint125.safetensors",
        "tokenizer_name": "tokenizer_spm_32k_3.model",
        "model_type": "moshi",
        "dim": 32,
        "text_card": 48,
        "existing_text_padding_id": 3,
        "n_q": 6,
        "dep_q": 3,
        "card": 28,
        "num_heads": 2,
        "num_layers": 2,
        "hidden_scale": 4.125,
        "causal": True,
        "layer_scale": None,
        "context": 32,
        "max_period": 10000,
        "gating": "silu",
        "norm": "rms_norm_f32",
        "positional_embedding": "rope",
        "depformer_dim": 16,
        "depformer_dim_feedforward": 66,
        "depformer_num_heads": 2,
        "depformer_num_layers": 2,
        "depformer_layer_scale": None,
        "depformer_multi_linear": True,
        "depformer_context": 8,
        "depformer_max_period": 10000,
        "depformer_gating": "silu",
        "depformer_pos_emb": "none",
        "depformer_weights_per_step": True,
        "delays": [0, 0, 1, 1, 0, 1, 1],
    }
    config.update(changes)
    return config


NO_FUSER = {"cross_attention_pos_emb": False, "cross_attention_pos_emb_scale": 1, "sum": [], "prepend": [], "cross": []}


def lut(n_bins: int, dim: int, values: list[str] | None) -> dict[str, Any]:
    """A look-up-table conditioner's entry in config.json."""
    return {"type": "lut", "lut": {"n_bins": n_bins, "dim": dim, "tokenizer": "noop", "possible_values": values}}


@dataclass
class Case:
    """One golden set: a model, teacher-forced tokens for it, and perhaps generation runs.

    `conditions` and `generation_conditions` list one item per batch row (twice the batch for generation with
    classifier-free guidance, conditional rows first): the texts of the LUT conditioners by name, and for
    tensor conditioners the number of valid slots, from which random tensors are drawn.
    """

    features: str
    config: dict[str, Any]
    seed: int
    time: int = 40
    batch: int = 2
    scale: float = 1.0  # of all that enters the temporal residual stream; small ones tell epsilons apart
    depth_scale: float = 1.0  # the same in the depth transformer
    zero_tokens: bool = False  # sprinkle -1 over text and audio rows
    split_projections: bool = False  # keep in_projs.S.weight / out_projs.S.weight
    conditions: list[dict[str, Any]] | None = None
    greedy: bool = False
    forced: dict[str, str] = field(default_factory=dict)  # file name -> kind, see `draw_forcing`
    generation_batch: int = 1
    generation_conditions: list[dict[str, Any]] | None = None
    cfg_coef: float = 1.0
    notes: list[str] = field(default_factory=list)


QUALITY = ["very_bad", "bad", "neutral", "good", "very_good"]

CASES: dict[str, Case] = {
    "moshi": Case(
        "Moshi 7B's shape: own and user streams, acoustic delay 1, one weight set per depth step; "
        "T > context; greedy on a batch of two; forced own text and audio",
        base_config(),
        seed=1,
        greedy=True,
        generation_batch=2,
        forced={"forced": "mixed"},
    ),
    "hibiki": Case(
        "Hibiki 1B's shape: delay 2, LUT condition summed into the input, null feed-forward of the depformer, "
        "model_type hibiki (text row 2 replaced by row 3 at load), guidance 3 between very_good and very_bad",
        base_config(
            model_type="hibiki",
            max_period=100000,
            dim=40,
            num_heads=4,
            depformer_num_layers=1,
            depformer_dim_feedforward=None,
            delays=[0, 0, 2, 2, 0, 2, 2],
            conditioners={"description": lut(31, 16, QUALITY)},
            fuser=NO_FUSER | {"sum": ["description"]},
            cross_attention=False,
            lm_gen_config={"temp": 0.8, "temp_text": 0.8, "top_k": 250, "top_k_text": 25},
        ),
        seed=2,
        conditions=[{"description": "very_good"}, {"description": None}],
        greedy=True,
        generation_conditions=[{"description": "very_good"}, {"description": "very_bad"}],
        cfg_coef=3.0,
        notes=[
            "the loader copies text_emb row 3 over row 2 because model_type is hibiki; the file holds the "
            "rows as drawn, the outputs were made after the copy"
        ],
    ),
    "personaplex": Case(
        "PersonaPlex's shape: dep_q == n_q, depformer_context smaller than dep_q (the reference ignores it), "
        "user half forced after the depth transformer ran, and, in another run, while it runs",
        base_config(
            n_q=4,
            dep_q=4,
            delays=[0, 0, 1, 0, 1],
            depformer_context=2,
            depformer_num_layers=1,
            model_type="personaplex",
        ),
        seed=3,
        time=36,
        zero_tokens=True,
        forced={"forced": "user_half", "forced_inside": "user_half_inside"},
    ),
    "stt": Case(
        "speech-to-text shape: dep_q 0, no delays, extra heads, an empty fuser with no conditioners; "
        "greedy text with the heads' probabilities",
        base_config(
            model_type="stt",
            n_q=5,
            dep_q=0,
            dim=40,
            num_heads=4,
            text_card=52,
            card=32,
            max_period=100000.0,
            delays=[0] * 6,
            extra_heads_num_heads=4,
            extra_heads_dim=6,
            conditioners={},
            fuser=NO_FUSER,
            cross_attention=False,
            demux_second_stream=False,
            text_card_out=None,
            stt_config={"audio_delay_seconds": 0.5, "audio_silence_prefix_seconds": 0.0},
            lm_gen_config={"temp": 0.0, "temp_text": 0.0, "top_k": 250, "top_k_text": 50},
            model_id={"sig": "00000000", "epoch": 1},
        ),
        seed=4,
        zero_tokens=True,
        conditions=[{}, {}],
        greedy=True,
        generation_batch=2,
        generation_conditions=[{}, {}],
    ),
    "tts": Case(
        "TTS 1.6B's shape: muxed second text stream (temporal and depth), low-rank depth embeddings, schedule, "
        "text_card_out, two LUT sums, tensor conditioner by cross-attention with positions; "
        "greedy free and as the TTS loop forces it",
        base_config(
            model_type="tts",
            n_q=4,
            dep_q=4,
            text_card=40,
            text_card_out=5,
            card=24,
            delays=[0, 0, 2, 2, 2],
            demux_second_stream=True,
            depformer_low_rank_embeddings=8,
            depformer_weights_per_step_schedule=[0, 1, 2, 2],
            depformer_num_layers=1,
            depformer_dim_feedforward=48,
            cross_attention=True,
            conditioners={
                "speaker_wavs": {"type": "tensor", "tensor": {"dim": 12}},
                "cfg": lut(7, 16, ["1.0", "1.5", "2.0", "2.5", "3.0", "3.5", "4.0"]),
                "control": lut(1, 32, ["ok"]),
            },
            fuser=NO_FUSER | {"cross_attention_pos_emb": True, "sum": ["control", "cfg"], "cross": ["speaker_wavs"]},
            tts_config={"audio_delay": 1.28, "second_stream_ahead": 2},
            lm_gen_config={"temp": 0.6, "text_temp": 0.6},
            model_id={"sig": "00000000", "epoch": 2},
        ),
        seed=5,
        zero_tokens=True,
        conditions=[
            {"control": "ok", "cfg": "2.0", "speaker_wavs": 9},
            {"control": "ok", "cfg": None, "speaker_wavs": 6},
        ],
        greedy=True,
        forced={"forced": "tts"},
        generation_conditions=[{"control": "ok", "cfg": "3.5", "speaker_wavs": 7}],
    ),
    "schedule": Case(
        "schedule with fewer sets than steps, low-rank depth embeddings, one feed-forward size per set "
        "(a list), projections stored as in_projs.S / out_projs.S; hidden_scale 5.1",
        base_config(
            n_q=5,
            dep_q=4,
            hidden_scale=5.1,
            delays=[0, 0, 1, 1, 1, 0],
            depformer_weights_per_step_schedule=[0, 1, 1, 2],
            depformer_low_rank_embeddings=6,
            depformer_dim_feedforward=[66, 48, 57],
        ),
        seed=6,
        split_projections=True,
        zero_tokens=True,
        greedy=True,
    ),
    "odd_delays": Case(
        "text delayed by 2, uneven and decreasing acoustic delays, user delays up to 4, another padding id, "
        "text_card_out smaller than text_card, deprecated depformer_causal",
        base_config(
            n_q=5,
            delays=[2, 3, 0, 1, 4, 0],
            depformer_num_layers=1,
            existing_text_padding_id=5,
            text_card_out=44,
            depformer_causal=True,
            quantize=False,
        ),
        seed=7,
        greedy=True,
    ),
    "rope_concat": Case(
        "Hibiki-Zero's traits: split-half rotary positions, hidden_scale 6 with a null depformer_dim_feedforward, "
        "kv_repeat 2 in the temporal transformer only, schedule, a LayerNorm per depth step",
        base_config(
            positional_embedding="rope_concat",
            hidden_scale=6,
            kv_repeat=2,
            num_heads=4,
            depformer_kv_repeat=1,
            depformer_dim_feedforward=None,
            depformer_weights_per_step_schedule=[0, 1, 1],
            depformer_norm="layer_norm",
            delays=[0, 0, 2, 2, 0, 2, 2],
        ),
        seed=8,
        depth_scale=0.003,
        zero_tokens=True,
    ),
    "ff4": Case(
        "hidden_scale 4.0 in both transformers (the 21/8 special case), norm rms_norm with eps 1e-5 and "
        "activations small enough for eps to matter",
        base_config(
            hidden_scale=4.0, depformer_dim_feedforward=None, norm="rms_norm", n_q=4, dep_q=2, delays=[0, 0, 1, 0, 1]
        ),
        seed=9,
        time=24,
        scale=0.003,
        depth_scale=0.003,
    ),
    "gqa": Case(
        "kv_repeat 2 inherited by the depformer, layer_norm_f32 (eps 1e-8) per depth step, context 7, "
        "activations small enough for the eps 1e-8 of both to matter",
        base_config(
            kv_repeat=2, num_heads=4, n_q=4, dep_q=2, context=7, delays=[0, 0, 1, 0, 1], depformer_norm="layer_norm_f32"
        ),
        seed=10,
        time=24,
        scale=1e-4,
        depth_scale=1e-3,
    ),
    "conditions": Case(
        "two LUT sums (one hashed, for want of possible_values), two cross-attention tensors of unequal length "
        "joined in the fuser's order with scaled positions; guidance 2 on sum and cross, batch of two",
        base_config(
            n_q=4,
            dep_q=2,
            depformer_num_layers=1,
            delays=[0, 0, 1, 0, 1],
            cross_attention=True,
            conditioners={
                "place": lut(9, 8, None),
                "mood": lut(3, 8, ["calm", "glad"]),
                "voice": {"type": "tensor", "tensor": {"dim": 6}},
                "scene": {"type": "tensor", "tensor": {"dim": 10}},
            },
            fuser={
                "cross_attention_pos_emb": True,
                "cross_attention_pos_emb_scale": 0.5,
                "sum": ["mood", "place"],
                "prepend": [],
                "cross": ["scene", "voice"],
            },
        ),
        seed=11,
        conditions=[
            {"place": "harbour", "mood": "glad", "voice": 5, "scene": 3},
            {"place": "attic", "mood": None, "voice": 2, "scene": 4},
        ],
        greedy=True,
        generation_batch=2,
        generation_conditions=[
            {"place": "harbour", "mood": "glad", "voice": 5, "scene": 3},
            {"place": "attic", "mood": "calm", "voice": 3, "scene": 4},
            {"place": "harbour", "mood": None, "voice": 0, "scene": 3},
            {"place": "attic", "mood": None, "voice": 0, "scene": 0},
        ],
        cfg_coef=2.0,
    ),
    "wide": Case(
        "other shapes: head_dim 20, depth head_dim 24, one temporal and three depth layers, context beyond T",
        base_config(
            dim=40,
            num_heads=2,
            num_layers=1,
            n_q=3,
            dep_q=2,
            context=500,
            delays=[0, 0, 1, 0],
            depformer_dim=24,
            depformer_num_heads=1,
            depformer_num_layers=3,
            depformer_dim_feedforward=60,
        ),
        seed=12,
        time=20,
        zero_tokens=True,
    ),
}


# ---------------------------------------------------------------------------------------- the weights


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_weight(name: str, shape: torch.Size, case: Case, gen: torch.Generator) -> torch.Tensor:
    """A random tensor for the parameter `name` that keeps activations, and attention, away from trivial."""
    noise = torch.randn(shape, generator=gen)
    if name.endswith("alpha") or re.search(r"(norm_cross|depformer_norms\.\d+)\.weight$", name):
        return 1 + 0.2 * noise
    if name.endswith("bias"):
        return 0.2 * noise
    if name.endswith("learnt_padding"):
        return 0.5 * noise
    if re.match(r"(emb\.\d+|text_emb)\.weight$", name):
        return 0.6 * case.scale * noise
    if re.match(r"depformer_(emb\.\d+|text_emb)\.weight$", name):
        return case.depth_scale * noise
    if name.endswith("embed.weight"):
        return noise
    noise = noise / math.sqrt(shape[-1])
    if "in_projs" in name or "linear_in" in name:
        return 1.3 * noise
    if re.match(r"transformer\..*(out_projs\.\d+|linear_out)\.weight$", name):
        return case.scale * noise
    if re.match(r"depformer(\..*(out_projs\.\d+|linear_out)|_in\.\d+)\.weight$", name):
        return case.depth_scale * noise
    return noise


def published_names(state: Tensors) -> Tensors:
    """Stack `in_projs.S` and `out_projs.S` on axis 0 under the names of the published checkpoints."""
    out: Tensors = {}
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for name, value in state.items():
        found = re.match(r"(.*)\.(in|out)_projs\.(\d+)\.weight$", name)
        if found is None:
            out[name] = value
            continue
        fused = f"{found[1]}.in_proj_weight" if found[2] == "in" else f"{found[1]}.out_proj.weight"
        stacks.setdefault(fused, {})[int(found[3])] = value
    for name, parts in stacks.items():
        out[name] = torch.cat([parts[i] for i in range(len(parts))])
    return out


def write_model(folder: Path, case: Case) -> None:
    """Write config.json and model.safetensors; output layers are scaled so that logits have std 2."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case.config, indent=2) + "\n")
    gen = generator(case.seed)
    shapes = load_reference(folder, with_weights=False).state_dict()
    state = {name: draw_weight(name, shapes[name].shape, case, gen) for name in sorted(shapes)}
    save_state(folder, state, case)

    model = load_reference(folder)
    tokens = draw_tokens(case, generator(1000 + case.seed))
    provided = provide(model, draw_conditions(case.conditions, case.config, generator(2000 + case.seed)))
    out = forward(model, tokens, provided)
    rescale = {"text_linear.weight": 2 / out["text_logits"].std()}
    for k in range(case.config["dep_q"]):
        rescale[f"linears.{k}.weight"] = 2 / out["logits"][:, k].std()
    for h in range(case.config.get("extra_heads_num_heads", 0)):
        rescale[f"extra_heads.{h}.weight"] = 1.5 / out["extra_logits"][:, h].std()
    for name, factor in rescale.items():
        state[name] = state[name] * factor
    save_state(folder, state, case)


def save_state(folder: Path, state: Tensors, case: Case) -> None:
    named = state if case.split_projections else published_names(state)
    save_file({k: v.contiguous() for k, v in named.items()}, folder / "model.safetensors", {"format": "pt"})


def load_reference(folder: Path, with_weights: bool = True) -> LMModel:
    """The model as the reference's own loader makes it from the folder, in float32 on the CPU."""
    info = CheckpointInfo.from_hf_repo(
        "none/none",
        moshi_weights=folder / "model.safetensors",
        mimi_weights=Path("unused"),
        tokenizer=Path("unused"),
        config_path=folder / "config.json",
    )
    if with_weights:
        return info.get_moshi("cpu", torch.float32)
    return get_moshi_lm(None, copy.deepcopy(info.lm_config), "cpu", torch.float32)


# ------------------------------------------------------------------------------------- teacher forcing


def draw_tokens(case: Case, gen: torch.Generator) -> torch.Tensor:
    """Random tokens [B, 1 + n_q, T]; the start ids occur too, and -1 where the case asks for it."""
    config, shape = case.config, (case.batch, 1, case.time)
    if config.get("demux_second_stream"):
        size = config["text_card"] + 1
        first = torch.randint(0, size, shape, generator=gen)
        second = torch.randint(-1, size, shape, generator=gen)
        text = (second.clamp(max=size - 1) + 1) * size + first
        text[:, :, ::3] = first[:, :, ::3]  # no second stream here
    else:
        text = torch.randint(0, config["text_card"] + 1, shape, generator=gen)
        text[:, :, 5::11] = 2  # end of sequence, which Hibiki's loader treats specially
    audio = torch.randint(0, config["card"] + 1, (case.batch, config["n_q"], case.time), generator=gen)
    tokens = torch.cat([text, audio], dim=1)
    if case.zero_tokens:
        tokens[torch.rand(tokens.shape, generator=gen) < 0.12] = ZERO
    return tokens


def draw_conditions(
    items: list[dict[str, Any]] | None, config: dict[str, Any], gen: torch.Generator
) -> list[ConditionAttributes] | None:
    """One `ConditionAttributes` per item; a tensor condition of n slots has n - 1 valid ones and a masked one
    in the middle (all masked if n is 0)."""
    if items is None:
        return None
    out = []
    for item in items:
        attributes = ConditionAttributes()
        for name, conditioner in config["conditioners"].items():
            if conditioner["type"] == "lut":
                attributes.text[name] = item[name]
                continue
            slots = max(item[name], 1)
            mask = torch.ones(1, slots, dtype=torch.bool)
            mask[0, slots // 2] = False
            if item[name] == 0:
                mask[:] = False
            tensor = torch.randn(1, slots, conditioner["tensor"]["dim"], generator=gen)
            attributes.tensor[name] = TensorCondition(tensor, mask)
        out.append(attributes)
    return out


def provide(model: LMModel, attributes: list[ConditionAttributes] | None) -> Any:
    """Condition tensors as `LMModel.forward` and `LMGen` want them."""
    if attributes is None:
        return None
    with torch.no_grad():
        return model.condition_provider.prepare_and_provide(attributes)


def condition_record(model: LMModel, attributes: list[ConditionAttributes] | None) -> Tensors:
    """The tensors that went into the conditioners (padded as the reference pads) and what the fuser made."""
    if attributes is None:
        return {}
    out: Tensors = {}
    for name, prepared in model.condition_provider.prepare(attributes).items():
        if isinstance(prepared, TensorCondition):
            out[f"cond.{name}.tensor"], out[f"cond.{name}.mask"] = prepared.tensor, prepared.mask
    provided = provide(model, attributes)
    for key, value in (
        ("condition_sum", model.fuser.get_sum(provided)),
        ("condition_cross", model.fuser.get_cross(provided)),
    ):
        if value is not None:
            out[key] = value.detach()
    return out


@torch.no_grad()
def forward(model: LMModel, tokens: torch.Tensor, provided: Any) -> Tensors:
    """`LMModel.forward` with the hidden states and extra heads, NaN (positions past the end) set to 0."""
    out: Tensors = {}
    if model.dep_q > 0:
        caught: list[torch.Tensor] = []
        plain = model.forward_text

        def forward_text(*args: Any, **kwargs: Any) -> Any:
            result = plain(*args, **kwargs)
            caught.append(result[0])
            return result

        model.forward_text = forward_text  # type: ignore[method-assign]
        try:
            result = model(tokens, provided)
        finally:
            del model.forward_text
        hidden = caught[0]
        out |= {"logits": result.logits, "mask": result.mask}
        out |= {"text_logits": result.text_logits, "text_mask": result.text_mask}
    else:
        # The first half of the reference's forward, with its own functions: it has no way around the depformer.
        initial = model._get_initial_token().expand(len(tokens), -1, -1)
        delayed = torch.cat([initial, _delay_sequence(model.delays, tokens, initial)], dim=2)
        summed = None if provided is None else model.fuser.get_sum(provided)
        crossed = None if provided is None else model.fuser.get_cross(provided)
        hidden, text_logits = model.forward_text(delayed[:, :, :-1], summed, crossed)
        text_logits, text_mask = _undelay_sequence(model.delays[:1], text_logits)
        out |= {"text_logits": text_logits, "text_mask": text_mask & (tokens[:, :1] != ZERO)}
    out["hidden"] = hidden
    if len(model.extra_heads):
        out["extra_logits"] = torch.stack([head(hidden) for head in model.extra_heads], dim=1)
    for name, mask in (("text_logits", "text_mask"), ("logits", "mask")):
        if name in out:
            assert not out[name][out[mask]].isnan().any()
            out[name] = out[name].nan_to_num(nan=0.0)
    return out


# ------------------------------------------------------------------------------------------ generation


@dataclass
class Forcing:
    """What the hooks write over at each position; FREE leaves the model's own token.

    text [S, B], before the depth transformer runs; audio [S, B, dep_q], after it ran; inside [S, B, dep_q], while
    it runs, so that the next codebook is conditioned on the forced one; replace [S, B, dep_q], instead of running
    it (a position is replaced if its first entry is not FREE).
    """

    text: torch.Tensor
    audio: torch.Tensor
    inside: torch.Tensor
    replace: torch.Tensor


@contextlib.contextmanager
def recorded_logits(into: list[torch.Tensor], force: Callable[[int], torch.Tensor | None]) -> Iterator[None]:
    """Collect every tensor of logits that `LMGen` samples from (float32, after guidance).

    `force(k)` may give tokens [B] to put in place of the k-th decision of the step (0 is the text): the
    reference has no hook between two codebooks.
    """
    plain = reference_lm.sample_token

    def sample_token(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        into.append(logits.clone())
        token = plain(logits, *args, **kwargs)
        forced = force(len(into) - 1)
        return token if forced is None else torch.where(forced[:, None, None] == FREE, token, forced[:, None, None])

    reference_lm.sample_token = sample_token
    try:
        yield
    finally:
        reference_lm.sample_token = plain


@torch.no_grad()
def generate(
    model: LMModel, frames: torch.Tensor, provided: Any, cfg_coef: float, forcing: Forcing | None = None
) -> tuple[Tensors, float]:
    """Run `LMGen` greedily over `frames` [S, B, users] and record every call.

    Returns the record (see tests/golden/README.md) and the smallest distance between the best and the second
    best logit of all decisions that were taken.
    """
    steps, batch, _ = frames.shape
    logits: list[torch.Tensor] = []
    inputs: list[torch.Tensor] = []
    sampled_text: list[torch.Tensor] = []
    kept_text: list[torch.Tensor] = []
    kept_audio: list[torch.Tensor] = []
    step = 0

    def on_text(token: torch.Tensor) -> None:
        sampled_text.append(token.clone())
        if forcing is not None:
            force = forcing.text[step]
            token[:] = torch.where(force == FREE, token, force)
        kept_text.append(token.clone())

    def on_audio(tokens: torch.Tensor) -> None:
        if forcing is not None:
            force = forcing.audio[step]
            tokens[:] = torch.where(force == FREE, tokens, force)
        kept_audio.append(tokens.clone())

    def force_inside(decision: int) -> torch.Tensor | None:
        if forcing is None or decision == 0:
            return None
        return forcing.inside[step, :, decision - 1]

    plain = model.forward_text

    def forward_text(sequence: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        inputs.append(sequence[:batch, :, 0].clone())
        if cfg_coef != 1.0:
            assert torch.equal(sequence[:batch], sequence[batch:])
        return plain(sequence, *args, **kwargs)

    record: dict[str, list[torch.Tensor]] = {k: [] for k in ("out", "returned", "text_logits", "audio_logits", "extra")}
    least = math.inf
    # `check` asserts ids within the vocabulary, which muxed text ids are not.
    muxed = model.text_emb.demux_second_stream
    lm_gen = LMGen(
        model,
        use_sampling=False,
        cfg_coef=cfg_coef,
        check=not muxed,
        condition_tensors=provided,
        on_text_hook=on_text,
        on_audio_hook=on_audio,
    )
    model.forward_text = forward_text  # type: ignore[method-assign]
    try:
        with recorded_logits(logits, force_inside), lm_gen.streaming(batch):
            for step in range(steps):
                logits.clear()
                replace = None
                if forcing is not None and int(forcing.replace[step, 0, 0]) != FREE:
                    replace = forcing.replace[step, :, :, None].clone()
                if len(model.extra_heads):
                    out, extra = lm_gen.step_with_extra_heads(frames[step, :, :, None], replace)
                    record["extra"].append(torch.stack([e[:, 0] for e in extra], dim=1))
                else:
                    out = lm_gen.step(frames[step, :, :, None], replace)
                record["returned"].append(torch.tensor(out is not None))
                record["out"].append(torch.full((batch, 1 + model.dep_q), FREE) if out is None else out[:, :, 0])
                assert len(logits) == (1 if replace is not None else 1 + model.dep_q)
                for one in logits:
                    best = one.flatten(0, -2).topk(2, dim=-1).values
                    least = min(least, float((best[:, 0] - best[:, 1]).min()))
                record["text_logits"].append(logits[0][:, 0, 0])
                if len(logits) > 1:
                    record["audio_logits"].append(torch.stack([one[:, 0, 0] for one in logits[1:]], dim=1))
    finally:
        del model.forward_text

    tokens = torch.stack(kept_text)[:, :, None]
    if kept_audio:
        tokens = torch.cat([tokens, torch.stack(kept_audio)], dim=2)
    result = {
        "inputs": torch.stack(inputs),
        "tokens": tokens,
        "out": torch.stack(record["out"]),
        "returned": torch.stack(record["returned"]),
        "last_text_logits": torch.stack(record["text_logits"][-TAIL:]),
    }
    if frames.shape[2]:
        result["frames"] = frames
    if record["audio_logits"]:
        result["last_audio_logits"] = torch.stack(record["audio_logits"][-TAIL:])
    if record["extra"]:
        result["last_extra_probs"] = torch.stack(record["extra"][-TAIL:])
    if forcing is not None:
        result["sampled_text"] = torch.stack(sampled_text)
        for name in ("text", "audio", "inside", "replace"):
            value = getattr(forcing, name)
            if (value != FREE).any():
                result[f"force_{name}"] = value
    check_alignment(model, result)
    return result, least


def check_alignment(model: LMModel, run: Tensors) -> None:
    """Hold the README's account of positions, delays and outputs against a recorded run."""
    delays, last = model.delays, max(model.delays)
    steps = len(run["tokens"])
    start = [model.text_card] + [model.card] * model.n_q
    for p in range(steps):
        for k, delay in enumerate(delays):
            if p <= delay:
                expected = torch.full_like(run["inputs"][p, :, k], start[k])
            elif k <= model.dep_q:
                expected = run["tokens"][p - 1, :, k]  # sampled at the position before
            else:
                expected = run["frames"][p - delay, :, k - model.dep_q - 1]  # token index p - 1 - delay
            assert torch.equal(run["inputs"][p, :, k], expected), (p, k)
        assert bool(run["returned"][p]) == (p >= last)
        for k in range(1 + model.dep_q):
            if p >= last:
                assert torch.equal(run["out"][p, :, k], run["tokens"][p - last + delays[k], :, k]), (p, k)


def draw_forcing(kind: str, model: LMModel, batch: int, gen: torch.Generator) -> Forcing:
    """Random forcing of one of four kinds.

    mixed: text on a third of the frames, sometimes to -1; single codes, after the depth transformer, on a third of
    the frames after 60, all -1 on 300-309; no depth transformer on frames 0-7 (-1) and 40-47 (given codes).
    user_half: the second half of the codebooks, after the depth transformer.
    user_half_inside: the same while it runs, the first codebook too on every fifth frame, and the start id where
    a delayed codebook has no token yet (position < delay).
    tts: muxed text ids, no depth transformer for 16 frames, then -1 as long again as each codebook's delay.
    """
    depth = model.dep_q
    text = torch.full((STEPS, batch), FREE)
    audio, inside, replace = (torch.full((STEPS, batch, depth), FREE) for _ in range(3))
    codes = torch.randint(0, model.card, audio.shape, generator=gen)
    if kind == "mixed":
        pick = torch.rand(text.shape, generator=gen)
        words = torch.randint(0, model.text_card, text.shape, generator=gen)
        text = torch.where(pick < 0.33, words, text)
        text = torch.where(pick < 0.03, torch.full_like(text, ZERO), text)
        audio[60:] = torch.where(torch.rand(audio.shape, generator=gen) < 0.33, codes, audio)[60:]
        audio[300:310] = ZERO
        replace[:8] = ZERO
        replace[40:48] = codes[40:48]
    elif kind == "user_half":
        audio[:, :, depth // 2 :] = codes[:, :, depth // 2 :]
    elif kind == "user_half_inside":
        inside[:, :, depth // 2 :] = codes[:, :, depth // 2 :]
        inside[::5, :, 0] = codes[::5, :, 0]
        for k in range(depth):
            inside[: model.delays[1 + k], :, k] = model.card
    elif kind == "tts":
        size = model.text_card + 1
        first = torch.randint(0, size - 1, text.shape, generator=gen)
        second = torch.randint(-1, size - 1, text.shape, generator=gen)
        text = (second + 1) * size + first
        replace[:16] = ZERO
        for k in range(depth):
            audio[: 16 + model.delays[1 + k], :, k] = ZERO
    return Forcing(text, audio, inside, replace)


def find_run(model: LMModel, case: Case, forced: str | None, start: int) -> tuple[Tensors, dict[str, Any]]:
    """The first seed from which no greedy decision of the run is closer than MIN_GAP."""
    users = model.n_q - model.dep_q
    for attempt in range(60):
        seed = 10000 * case.seed + start + attempt
        gen = generator(seed)
        attributes = draw_conditions(case.generation_conditions, case.config, gen)
        frames = torch.randint(0, model.card, (STEPS, case.generation_batch, users), generator=gen)
        forcing = None
        if forced is not None:
            forcing = draw_forcing(forced, model, case.generation_batch, gen)
            frames[200:220] = ZERO
            frames[250:255] = model.card
        run, gap = generate(model, frames, provide(model, attributes), case.cfg_coef, forcing)
        print(f"    seed {seed}: smallest gap {gap:.2e}")
        if gap <= MIN_GAP:
            continue
        about: dict[str, Any] = {"seed": seed, "smallest_gap": gap, "cfg_coef": case.cfg_coef, "steps": STEPS}
        about["distinct_tokens"] = [len(run["tokens"][:, :, k].unique()) for k in range(1 + model.dep_q)]
        if attributes is not None:
            about["conditions"] = [a.text for a in attributes]
        return run | condition_record(model, attributes), about
    raise RuntimeError("no seed keeps every decision clear")


def save_tensors(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file; integers as int32, floats as float32."""
    plain = {}
    for name, value in tensors.items():
        if value.dtype == torch.int64:
            value = value.to(torch.int32)
        plain[name] = value.contiguous().clone()
    save_file(plain, path)


def make_case(name: str, case: Case) -> None:
    """Write one folder."""
    print(name)
    folder = OUT / name
    write_model(folder, case)
    model = load_reference(folder)
    tokens = draw_tokens(case, generator(1000 + case.seed))
    attributes = draw_conditions(case.conditions, case.config, generator(2000 + case.seed))
    golden = {"tokens": tokens} | condition_record(model, attributes)
    golden |= forward(model, tokens, provide(model, attributes))
    save_tensors(folder / "golden.safetensors", golden)
    info: dict[str, Any] = {"features": case.features, "notes": case.notes, "seed": case.seed}
    if attributes is not None:
        info["conditions"] = [a.text for a in attributes]

    runs: dict[str, str | None] = {"greedy": None} if case.greedy else {}
    for number, (file, forced) in enumerate((runs | case.forced).items()):
        run, info[file] = find_run(model, case, forced, start=100 * number)
        save_tensors(folder / f"{file}.safetensors", run)
    (folder / "golden.json").write_text(json.dumps(info, indent=2) + "\n")


# -------------------------------------------------------------------------------------------- sampling


def sampling_distribution(logits: torch.Tensor, temp: float, top_k: int, top_p: float) -> torch.Tensor:
    """The distribution that the reference's `sample_token` draws from, over token ids; shape of `logits`.

    Its draw is replaced by one that returns each rank in turn: the token that comes back names the rank's id,
    and the weights it would have drawn by are those it was handed.
    """
    plain = reference_sampling.multinomial
    probs = torch.zeros_like(logits)
    rank, ranks = 0, 1
    try:
        while rank < ranks:
            handed: list[torch.Tensor] = []

            def pick(
                weights: torch.Tensor,
                num_samples: int,
                *_: Any,
                _rank: int = rank,
                _handed: list[torch.Tensor] = handed,
                **__: Any,
            ) -> torch.Tensor:
                _handed.append(weights)
                return torch.full((*weights.shape[:-1], num_samples), _rank)

            reference_sampling.multinomial = pick
            token = reference_sampling.sample_token(logits.clone(), True, temp, top_k, top_p)
            if not handed:  # greedy
                return probs.scatter_(-1, token[..., None], 1.0)
            probs.scatter_(-1, token[..., None], handed[0][..., rank : rank + 1])
            rank, ranks = rank + 1, handed[0].shape[-1]
    finally:
        reference_sampling.multinomial = plain
    return probs / probs.sum(-1, keepdim=True)


def make_sampling() -> None:
    """Write sampling.safetensors: logits [R, V], settings [C] and distributions [C, R, V]."""
    print("sampling")
    gen = generator(77)
    logits = torch.randn(6, 40, generator=gen) * torch.tensor([[0.5], [1.0], [2.0], [3.0], [6.0], [12.0]])
    settings = [
        (1.0, 0, 0.0),
        (0.7, 25, 0.0),
        (0.8, 250, 0.0),
        (0.8, 5, 0.0),
        (0.8, 1, 0.0),
        (0.6, 40, 0.0),
        (1.0, 0, 0.95),
        (0.8, 0, 0.95),
        (0.8, 0, 0.5),
        (1.3, 0, 0.9),
        (0.8, 0, 0.01),
        (0.8, 0, 1.0),
        (0.8, 3, 0.9),
        (0.0, 25, 0.0),
        (2.0, 10, 0.0),
    ]
    probs = torch.stack([sampling_distribution(logits, *one) for one in settings])
    assert torch.allclose(probs.sum(-1), torch.ones(probs.shape[:-1]))
    columns = list(zip(*settings, strict=True))
    save_tensors(
        OUT / "sampling.safetensors",
        {
            "logits": logits,
            "probs": probs,
            "temp": torch.tensor(columns[0]),
            "top_k": torch.tensor(columns[1]),
            "top_p": torch.tensor(columns[2]),
        },
    )


# ---------------------------------------------------------------------------------------------- Helium


def helium_logits(weights: Tensors, config: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] of a Helium model in the Hugging Face layout for tokens [B, T].

    Pre-norm transformer; RMSNorm and softmax in float32; rotary positions on pairs (2i, 2i + 1); grouped keys
    and values; SiLU-gated feed-forward; head tied to the embedding if the config says so.
    """
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width, time = config["head_dim"], tokens.shape[1]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return weights[name] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"])

    angle = torch.arange(time)[:, None] * config["rope_theta"] ** (-torch.arange(0, width, 2) / width)
    turn = torch.polar(torch.ones_like(angle), angle)  # [T, width / 2], complex

    def rotate(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    def split(x: torch.Tensor, n: int) -> torch.Tensor:
        return x.unflatten(-1, (n, width)).transpose(1, 2)

    future = torch.ones(time, time, dtype=torch.bool).triu(1)
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        y = norm(x, at + "input_layernorm.weight")
        q = rotate(split(y @ weights[at + "self_attn.q_proj.weight"].T, heads))
        k = rotate(split(y @ weights[at + "self_attn.k_proj.weight"].T, kv_heads))
        v = split(y @ weights[at + "self_attn.v_proj.weight"].T, kv_heads)
        k, v = (one.repeat_interleave(heads // kv_heads, dim=1) for one in (k, v))
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(width)
        attention = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        x = x + attention.transpose(1, 2).flatten(2) @ weights[at + "self_attn.o_proj.weight"].T
        y = norm(x, at + "post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(y @ weights[at + "mlp.gate_proj.weight"].T)
        x = x + (gate * (y @ weights[at + "mlp.up_proj.weight"].T)) @ weights[at + "mlp.down_proj.weight"].T
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return norm(x, "model.norm.weight") @ weights[head].T


def make_helium(name: str, kv_heads: int, tied: bool, seed: int) -> None:
    """Write a small Helium: grouped keys and values, head tied or not, logits and a greedy continuation."""
    print(name)
    config = {
        "architectures": ["HeliumForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 72,
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "model_type": "helium",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": kv_heads,
        "pad_token_id": 3,
        "rms_norm_eps": 1e-08,
        "rope_theta": 20000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": 56,
    }
    gen = generator(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return gain * torch.randn(rows, columns, generator=gen) / math.sqrt(columns)

    def gain_vector() -> torch.Tensor:
        return 1 + 0.2 * torch.randn(32, generator=gen)

    weights: Tensors = {"model.embed_tokens.weight": matrix(56, 32, 2.0), "model.norm.weight": gain_vector()}
    if not tied:
        weights["lm_head.weight"] = matrix(56, 32, 2.0)
    for layer in range(2):
        at = f"model.layers.{layer}."
        weights |= {
            at + "input_layernorm.weight": gain_vector(),
            at + "post_attention_layernorm.weight": gain_vector(),
            at + "self_attn.q_proj.weight": matrix(32, 32, 1.3),
            at + "self_attn.k_proj.weight": matrix(8 * kv_heads, 32, 1.3),
            at + "self_attn.v_proj.weight": matrix(8 * kv_heads, 32, 1.3),
            at + "self_attn.o_proj.weight": matrix(32, 32),
            at + "mlp.gate_proj.weight": matrix(72, 32, 1.3),
            at + "mlp.up_proj.weight": matrix(72, 32, 1.3),
            at + "mlp.down_proj.weight": matrix(32, 72),
        }
    for attempt in range(60):
        gen.manual_seed(100 * seed + attempt)
        tokens = torch.randint(4, 56, (2, 24), generator=gen)
        tokens[:, 0] = 1
        logits = helium_logits(weights, config, tokens)
        sequence = tokens[:, :8]  # the prompt of the greedy run, start id included
        least = math.inf
        for _ in range(48):
            last = helium_logits(weights, config, sequence)[:, -1]
            best = last.topk(2, dim=-1).values
            least = min(least, float((best[:, 0] - best[:, 1]).min()))
            sequence = torch.cat([sequence, last.argmax(-1, keepdim=True)], dim=1)
        if least > MIN_GAP:
            break
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    save_tensors(
        folder / "golden.safetensors",
        {"tokens": tokens, "logits": logits, "prompt": tokens[:, :8].clone(), "greedy": sequence[:, 8:]},
    )
    info = {
        "features": f"text-only Helium in the Hugging Face layout, 4 heads, {kv_heads} key-value heads, "
        + ("head tied to the embedding" if tied else "own head"),
        "seed": seed,
        "greedy": {"smallest_gap": least},
    }
    (folder / "golden.json").write_text(json.dumps(info, indent=2) + "\n")


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    extra: dict[str, Callable[[], None]] = {
        "sampling": make_sampling,
        "helium": lambda: make_helium("helium", kv_heads=2, tied=False, seed=21),
        "helium_tied": lambda: make_helium("helium_tied", kv_heads=4, tied=True, seed=22),
    }
    for name in names or [*CASES, *extra]:
        if name in extra:
            extra[name]()
        else:
            make_case(name, CASES[name])


if __name__ == "__main__":
    main(sys.argv[1:])
