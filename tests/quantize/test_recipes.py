"""Which module gets how many bits: recipes, rules, and the published files' lists of tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from moshi_mlx_quantize.plan.recipes import RECIPES, Module, Rule, make_plan, modules_of, part_of, uniform
from moshi_mlx_quantize.run import find_recipe
from moshi_mlx_quantize.source import Source
from moshi_mlx_quantize.write.convert import planned_entries, quantization_block, weights_name

from moshi_mlx.checkpoint.fit import guess_config
from moshi_mlx.checkpoint.quantization import MODES, Quantization
from moshi_mlx.config import ModelConfig
from moshi_mlx.errors import ConfigError
from moshi_mlx.models.lm import Lm

from ..helpers.checkpoints import conditioned_config, manifest_tensors, read_manifest, small_config

Q4 = RECIPES["q4"]


def modules(**changes: object) -> list[Module]:
    return modules_of(Lm(ModelConfig.from_dict(small_config(**changes)).lm))


def as_source(name: str, fit: Callable[..., object] | None = None) -> Source:
    """A published bf16 checkpoint by its list of tensors."""
    from moshi_mlx.checkpoint.fit import fit_lm, flat_parameters
    from moshi_mlx.checkpoint.layouts import stored_names

    tensors = manifest_tensors(read_manifest(name))
    config = guess_config({key: tuple(value.shape) for key, value in tensors.items()})
    model = fit_lm(config, tensors, dtype=mx.bfloat16)

    def aliases(module: str) -> list[str]:
        return [key.removesuffix(".weight") for key in stored_names(f"{module}.weight", "mlx", config.lm)]

    found = modules_of(model, aliases)
    return Source(config, {}, flat_parameters(model), found, {}, mx.bfloat16, False)


@pytest.mark.parametrize(
    ("source", "target", "recipe", "file"),
    [
        ("moshiko_mlx_bf16", "moshiko_mlx_q4", "q4", "model.q4.safetensors"),
        ("moshiko_mlx_bf16", "moshiko_mlx_q8", "q8", "model.q8.safetensors"),
        ("moshiko_pytorch_bf16", "moshiko_mlx_q4", "q4", "model.q4.safetensors"),
        ("moshiko_candle_bf16", "moshiko_mlx_q8", "q8", "model.q8.safetensors"),
        ("helium_1_preview_2b_mlx_bf16", "helium_1_preview_2b_mlx_q4", "4:64", "model.q4.safetensors"),
        ("helium_1_preview_2b_mlx_bf16", "helium_1_preview_2b_mlx_q8", "q8", "model.q8.safetensors"),
    ],
)
def test_published_files(source: str, target: str, recipe: str, file: str) -> None:
    """Broken: what is written for a published model differs from Kyutai's file in a name, a shape or a type."""
    opened = as_source(source)
    plan = make_plan(opened.modules, find_recipe(recipe))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    planned = planned_entries(opened, plan)
    published = manifest_tensors(read_manifest(target))
    assert {name: (entry.shape, entry.dtype) for name, entry in planned.items()} == {
        name: (tuple(value.shape), value.dtype) for name, value in published.items()
    }
    assert weights_name(plan, helium=source.startswith("helium")) == file
    assert mx.get_peak_memory() - before < 2**20


def test_every_mode_and_no_other() -> None:
    """Broken: a combination that MLX has is refused, or one that it lacks is not."""
    for mode, (bits, groups) in MODES.items():
        for b in range(1, 17):
            for group in (16, 32, 64, 128, 256):
                if b in bits and group in groups:
                    assert uniform(b, group, mode) == Quantization(b, group, mode)
                else:
                    with pytest.raises(ConfigError, match="do not exist"):
                        uniform(b, group, mode)
    assert uniform() == Quantization(4, 64)  # as mlx_lm.convert
    assert uniform(mode="nvfp4") == Quantization(4, 16, "nvfp4")
    with pytest.raises(ConfigError, match="is not known"):
        uniform(mode="int4")


def test_rules_come_after_the_recipe_and_the_last_one_wins() -> None:
    """Broken: exceptions by name or part are ignored, or applied in another order."""
    rules = [
        Rule.parse("transformer=8"),
        Rule.parse("transformer.layers.1.gating.*=3:32"),
        Rule.parse("audio heads=mxfp8"),
        Rule.parse("text_emb=keep"),
    ]
    plan = make_plan(modules(), Q4, rules)
    assert plan.choices["transformer.layers.0.gating.linear_in"] == Quantization(8, 64)
    assert plan.choices["transformer.layers.1.gating.linear_in"] == Quantization(3, 32)
    assert plan.choices["depformer.linear_out.2"] == Quantization(8, 32, "mxfp8")
    assert plan.choices["text_emb"] is None
    assert plan.choices["text_linear"] == Quantization(4, 32)


def test_rules_by_the_names_in_the_file() -> None:
    """Broken: a rule must use names that nobody sees in a checkpoint."""
    module = Module("depformer.linear_in.0", 64, 128, ("depformer.slices.0.linear_in",))
    plan = make_plan([module], Q4, [Rule.parse("depformer.slices.*.linear_in=8")])
    assert plan.choices[module.name] == Quantization(8, 64)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("depformer", "should read"),
        ("=4", "should read"),
        ("depformer=", "should read"),
        ("depformer=many", "neither"),
        ("depformer=7", "do not exist"),
        ("depformer=4:48", "do not exist"),
        ("depformer=4:64:mxfp4", "do not exist"),
        ("decoder=4", "matches no module"),
        ("text_emb=4:128", "use groups of 32 or 64"),
    ],
)
def test_bad_rules(rule: str, message: str) -> None:
    """Broken: a rule with a slip in it is taken for something else, or ends in a traceback."""
    with pytest.raises(ConfigError, match=message):
        make_plan(modules(dim=192, num_heads=2), Q4, [Rule.parse(rule)])


def test_narrow_modules_stay_dense() -> None:
    """Broken: the conditions' tables, 16 wide, stop a recipe; or a rule that asks for them is passed over."""
    found = modules_of(Lm(ModelConfig.from_dict(conditioned_config()).lm))
    plan = make_plan(found, Q4)
    dense = {name for name, q in plan.choices.items() if q is None}
    assert dense == set(plan.skipped) == {m.name for m in found if m.part in ("conditions", "cross-attention")}
    with pytest.raises(ConfigError, match="16 wide.*no group size does"):
        make_plan(found, Q4, [Rule.parse("condition_provider.conditioners.mood.embed=4:32")])


def test_a_width_without_a_group_is_listed() -> None:
    """Broken: a width that no group divides ends quantizing, or stays dense in silence."""
    odd = Module("transformer.layers.0.gating.linear_out", 64, 200)
    narrow = Module("transformer.layers.0.gating.linear_in", 64, 96)
    plan = make_plan([odd, narrow], RECIPES["q8"])
    assert plan.choices == {odd.name: None, narrow.name: Quantization(8, 32)}
    assert plan.skipped == {odd.name: "200 wide, no multiple of 32, 64 or 128"}


def test_named_recipes() -> None:
    """Broken: a recipe does not do what its line says."""
    found = modules(num_layers=16)
    by_name = {name: make_plan(found, recipe) for name, recipe in RECIPES.items()}
    for module in found:
        protected = module.layer is None
        assert by_name["protect-8"].choices[module.name] == Quantization(8 if protected else 4, 64)
        assert (by_name["protect-dense"].choices[module.name] is None) == protected
    ends = by_name["ends-8"].choices
    attention = [ends[f"transformer.layers.{i}.self_attn.in_proj"] for i in range(16)]
    assert [i for i, q in enumerate(attention) if q is not None and q.bits == 8] == [0, 15]
    # The layers that mlx-lm's own function picks for 16 layers.
    outs = [by_name["mixed_3_6"].choices[f"transformer.layers.{i}.gating.linear_out"] for i in range(16)]
    assert [i for i, q in enumerate(outs) if q is not None and q.bits == 6] == [0, 1, 4, 7, 10, 13, 14, 15]


def test_the_block_names_exceptions_only() -> None:
    """Broken: config.json grows by a line for every module of a uniform file, or lacks an exception."""
    found = modules()
    assert quantization_block(found, make_plan(found, Q4)) == {"group_size": 32, "bits": 4, "mode": "affine"}
    plan = make_plan(found, Q4, [Rule.parse("text_linear=keep"), Rule.parse("text_emb=8")])
    block = quantization_block(found, plan)
    assert block == {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        "text_emb": {"group_size": 64, "bits": 8, "mode": "affine"},
        "text_linear": False,
    }
    assert quantization_block(found, make_plan(found, Q4, [Rule.parse("*=keep")])) == {}


def test_sizes_are_what_a_file_takes(tmp_path: Path) -> None:
    """Broken: sizes that recipes are chosen by differ from those that MLX makes."""
    for mode, (bits, groups) in MODES.items():
        for q in (Quantization(b, g, mode) for b in bits for g in groups):
            parts = mx.quantize(mx.zeros((3, 256), mx.bfloat16), group_size=q.group_size, bits=q.bits, mode=q.mode)
            assert Module("m", 3, 256).bytes(q) == sum(part.nbytes for part in parts)
    assert part_of("depformer.layers.0.norm1.weight") == "norms"
