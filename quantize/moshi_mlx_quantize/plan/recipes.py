"""Recipes: which module gets how many bits.

A recipe is a default, exceptions by part of the model, and rules by name that the user adds; later rules win::

    rules = [Rule.parse("depformer=8:64"), Rule.parse("*.layers.0.*=keep")]
    plan = make_plan(modules, RECIPES["q4"], rules)

Modules are linear layers and embeddings by the names of :class:`moshi_mlx.models.lm.Lm`. Conditions and
cross-attention stay dense unless a rule names them: the conditions' tables are 16 wide, which no group size divides,
and Kyutai's program slices the weights of cross-attention. What a recipe would quantize but no group size fits stays
dense and is listed; where a rule asks for it by name, it is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import mlx.nn as nn

from moshi_mlx.checkpoint.quantization import MODES, Quantization
from moshi_mlx.errors import ConfigError

__all__ = ["PARTS", "RECIPES", "Module", "Plan", "Recipe", "Rule", "make_plan", "modules_of", "part_of", "uniform"]

DEFAULT_GROUPS = {"affine": 64, "mxfp4": 32, "nvfp4": 16, "mxfp8": 32}
DEFAULT_BITS = {"affine": 4, "mxfp4": 4, "nvfp4": 4, "mxfp8": 8}

_PARTS: Sequence[tuple[str, str]] = (
    (r"text_emb\b", "text embedding"),
    (r"audio_embs\b", "audio embeddings"),
    (r"transformer\.layers\.\d+\.self_attn\b", "attention"),
    (r"transformer\.layers\.\d+\.gating\b", "feed-forward"),
    (r"transformer\.layers\.\d+\.cross_attention\b", "cross-attention"),
    (r"text_linear\b", "text head"),
    (r"depformer\.embs\b", "depth embeddings"),
    (r"depformer\.linear_in\b", "depth input"),
    (r"depformer\.layers\.\d+\.(in_proj|out_proj)\b", "depth attention"),
    (r"depformer\.layers\.\d+\.gating\b", "depth feed-forward"),
    (r"depformer\.linear_out\b", "audio heads"),
    (r"extra_heads\b", "extra heads"),
    (r"condition_provider\b", "conditions"),
)
OTHER = "norms"
PARTS: tuple[str, ...] = (*(part for _, part in _PARTS), OTHER)
"""What the tables of a report are grouped by."""

DENSE_PARTS = ("conditions", "cross-attention")
"""What no recipe quantizes."""


def part_of(name: str) -> str:
    """The part of the model that a module or tensor belongs to."""
    if re.search(r"norm", name):
        return OTHER
    return next((part for pattern, part in _PARTS if re.match(pattern, name)), OTHER)


@dataclass(frozen=True)
class Module:
    """A linear layer or an embedding table.

    Attributes
    ----------
    name : str
        In :class:`moshi_mlx.models.lm.Lm`.
    rows, width : int
    aliases : tuple of str
        Its names in a file of Kyutai's MLX layout, several where depth steps share it.
    """

    name: str
    rows: int
    width: int
    aliases: tuple[str, ...] = ()

    @property
    def part(self) -> str:
        """Its part of the model."""
        return part_of(self.name)

    @property
    def copies(self) -> int:
        """How often the file holds it."""
        return max(1, len(self.aliases))

    @property
    def layer(self) -> int | None:
        """Its layer in the temporal transformer."""
        match = re.match(r"transformer\.layers\.(\d+)\.", self.name)
        return int(match[1]) if match else None

    def bytes(self, q: Quantization | None, float_bytes: int = 2) -> int:
        """Size in a file, all copies together."""
        return self.copies * self.rows * row_bytes(self.width, q, float_bytes)


def row_bytes(width: int, q: Quantization | None, float_bytes: int = 2) -> int:
    """Bytes of one row of weights with its scales and biases."""
    if q is None:
        return width * float_bytes
    scale = 2 * float_bytes if q.mode == "affine" else 1
    return width * q.bits // 8 + width // q.group_size * scale


def modules_of(model: nn.Module, aliases: Callable[[str], Iterable[str]] = lambda name: ()) -> list[Module]:
    """All modules of a model that MLX can quantize, quantized already or not, in the order of their names."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            width = module.weight.shape[-1] * 32 // module.bits
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            width = module.weight.shape[-1]
        else:
            continue
        found.append(Module(name, module.weight.shape[0], width, tuple(aliases(name))))
    return sorted(found, key=lambda module: natural(module.name))


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 10 after layer 9."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in name.split(".")]


# -------------------------------------------------------------------------------------------------- one choice


def uniform(bits: int | None = None, group_size: int | None = None, mode: str = "affine") -> Quantization:
    """A checked choice with mlx-lm's defaults: 4 bits in groups of 64, or what the mode prescribes.

    Raises
    ------
    ConfigError
        If MLX has no such combination.
    """
    if mode not in MODES:
        raise ConfigError(f"mode {mode!r} is not known; known are {', '.join(MODES)}")
    q = Quantization(bits or DEFAULT_BITS[mode], group_size or DEFAULT_GROUPS[mode], mode)
    allowed_bits, allowed_groups = MODES[mode]
    if q.bits not in allowed_bits or q.group_size not in allowed_groups:
        raise ConfigError(
            f"{q.bits} bits in groups of {q.group_size} ({mode}) do not exist: {mode} has "
            f"{_either(allowed_bits)} bits and groups of {_either(allowed_groups)}"
        )
    return q


def _either(values: Sequence[int]) -> str:
    return " or ".join(filter(None, [", ".join(map(str, values[:-1])), str(values[-1])]))


def describe(q: Quantization | None) -> str:
    """``4:32``, ``mxfp4`` or ``dense``, for tables."""
    if q is None:
        return "dense"
    return f"{q.bits}:{q.group_size}" if q.mode == "affine" else q.mode


@dataclass(frozen=True)
class Rule:
    """What to do with the modules that a pattern names; None keeps them dense."""

    pattern: str
    q: Quantization | None

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read ``PATTERN=BITS[:GROUP[:MODE]]``, ``PATTERN=MODE`` or ``PATTERN=keep``.

        Raises
        ------
        ConfigError
            If the text is something else.
        """
        pattern, equals, value = text.partition("=")
        if not equals or not pattern or not value:
            raise ConfigError(f"rule {text!r} should read PATTERN=BITS[:GROUP[:MODE]] or PATTERN=keep")
        if value == "keep":
            return cls(pattern, None)
        if value in MODES:
            return cls(pattern, uniform(mode=value))
        match = re.fullmatch(r"(\d+)(?::(\d+)(?::(\w+))?)?", value)
        if match is None:
            raise ConfigError(f"rule {text!r}: {value!r} is neither BITS[:GROUP[:MODE]] nor a mode nor keep")
        try:
            return cls(pattern, uniform(int(match[1]), int(match[2]) if match[2] else None, match[3] or "affine"))
        except ConfigError as error:
            raise ConfigError(f"rule {text!r}: {error}") from error

    def matches(self, module: Module) -> bool:
        """Whether the pattern (with ``*`` and ``?``) is one of the module's names, what it lies in, or its part."""
        names = (module.name, *module.aliases)
        patterns = (self.pattern, self.pattern + ".*")
        return module.part == self.pattern or any(fnmatchcase(name, p) for name in names for p in patterns)


# ----------------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Recipe:
    """A named choice for every module.

    Attributes
    ----------
    name, text : str
        The name, and one line about it.
    base : Quantization
        What most modules get.
    choose : callable
        (module, number of layers, base) -> its quantization, None for dense.
    """

    name: str
    text: str
    base: Quantization
    choose: Callable[[Module, int, Quantization], Quantization | None] = field(
        default=lambda module, layers, base: base, repr=False
    )


_Q8 = Quantization(8, 64)
_PROTECTED = (
    "text embedding", "audio embeddings", "text head", "audio heads", "extra heads",
    "depth embeddings", "depth input", "depth attention", "depth feed-forward",
)  # fmt: skip


def _protect(name: str, how: str, q: Quantization | None) -> Recipe:
    text = f"4 bits; heads, embeddings and depth transformer {how}"

    def choose(module: Module, layers: int, base: Quantization) -> Quantization | None:
        return q if module.part in _PROTECTED else base

    return Recipe(f"protect-{name}", text, Quantization(4, 64), choose)


def _ends(module: Module, layers: int, base: Quantization) -> Quantization:
    """More bits for the first and the last layer, embeddings and heads."""
    ends = module.layer in (0, layers - 1) or module.part in ("text embedding", "text head", "audio heads")
    return _Q8 if ends else base


def _mixed(high: int) -> Callable[[Module, int, Quantization], Quantization]:
    """The layers that mlx-lm's mixed recipes favour, after llama.cpp's Q4_K_M.

    The first and last eighth of the layers and every third between them get more bits where values and the second
    feed-forward matrix are; heads always do. Here queries, keys and values are one matrix, which gets the values' bits.
    """

    def choose(module: Module, layers: int, base: Quantization) -> Quantization:
        more = Quantization(high, base.group_size)
        if module.part in ("text head", "audio heads"):
            return more
        if module.layer is None or not re.search(r"self_attn\.in_proj$|gating\.linear_out$", module.name):
            return base
        eighth, i = layers // 8, module.layer
        return more if i < eighth or i >= 7 * layers // 8 or (i - eighth) % 3 == 2 else base

    return choose


RECIPES: Mapping[str, Recipe] = {
    r.name: r
    for r in (
        Recipe("q4", "4 bits, groups of 32 (Kyutai's q4)", Quantization(4, 32)),
        Recipe("q6", "6 bits, groups of 64", Quantization(6, 64)),
        Recipe("q8", "8 bits, groups of 64 (Kyutai's q8)", Quantization(8, 64)),
        Recipe("mxfp4", "4-bit floats, groups of 32", Quantization(4, 32, "mxfp4")),
        Recipe("nvfp4", "4-bit floats, groups of 16", Quantization(4, 16, "nvfp4")),
        Recipe("mxfp8", "8-bit floats, groups of 32", Quantization(8, 32, "mxfp8")),
        _protect("8", "at 8", _Q8),
        _protect("5", "at 5", Quantization(5, 64)),
        _protect("6", "at 6", Quantization(6, 64)),
        _protect("dense", "not quantized", None),
        Recipe("ends-8", "4 bits; first and last layer, text embedding and heads at 8", Quantization(4, 64), _ends),
        Recipe("mixed_2_6", "2 and 6 bits, as mlx-lm mixes them", Quantization(2, 64), _mixed(6)),
        Recipe("mixed_3_4", "3 and 4 bits, as mlx-lm mixes them", Quantization(3, 64), _mixed(4)),
        Recipe("mixed_3_6", "3 and 6 bits, as mlx-lm mixes them", Quantization(3, 64), _mixed(6)),
        Recipe("mixed_4_6", "4 and 6 bits, as mlx-lm mixes them", Quantization(4, 64), _mixed(6)),
    )
}


# -------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Plan:
    """Every module's quantization, None for dense.

    Attributes
    ----------
    name : str
        The recipe's name, for people.
    choices : mapping of str to Quantization or None
    skipped : mapping of str to str
        Modules left dense because no group size fits, with the reason.
    """

    name: str
    choices: Mapping[str, Quantization | None]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def bytes(self, modules: Iterable[Module], float_bytes: int = 2) -> int:
        """Size of the modules in a file."""
        return sum(module.bytes(self.choices.get(module.name), float_bytes) for module in modules)

    def bits_per_weight(self, modules: Iterable[Module], float_bytes: int = 2) -> float:
        """Average over all modules; scales and biases count."""
        modules = list(modules)
        weights = sum(module.copies * module.rows * module.width for module in modules)
        return 8 * self.bytes(modules, float_bytes) / max(1, weights)

    @property
    def uniform(self) -> Quantization | None:
        """The one choice of all quantized modules; None if there are several, or none."""
        kinds = {q for q in self.choices.values() if q is not None}
        return kinds.pop() if len(kinds) == 1 else None


def make_plan(modules: Sequence[Module], recipe: Recipe, rules: Sequence[Rule] = (), name: str | None = None) -> Plan:
    """Apply a recipe, then the rules, in order.

    Raises
    ------
    ConfigError
        If a rule matches nothing, or asks for groups that do not divide a module's width.
    """
    layers = 1 + max((module.layer for module in modules if module.layer is not None), default=0)
    choices: dict[str, Quantization | None] = {}
    skipped: dict[str, str] = {}
    for module in modules:
        q = None if module.part in DENSE_PARTS else recipe.choose(module, layers, recipe.base)
        if module.part == "conditions":
            skipped[module.name] = "conditions stay dense"
        elif module.part == "cross-attention":
            skipped[module.name] = "cross-attention stays dense"
        elif q is not None and module.width % q.group_size:
            q, reason = _narrower(module.width, q)
            if reason:
                skipped[module.name] = reason
        choices[module.name] = q
    for rule in rules:
        hit = [module for module in modules if rule.matches(module)]
        if not hit:
            parts = sorted({module.part for module in modules})
            raise ConfigError(
                f"rule {rule.pattern!r} matches no module. Parts are {', '.join(parts)}; names look like "
                f"{modules[0].name}, {modules[-1].name}"
            )
        for module in hit:
            _check_width(module, rule)
            choices[module.name] = rule.q
            skipped.pop(module.name, None)
    return Plan(name or recipe.name, choices, skipped)


def _narrower(width: int, q: Quantization) -> tuple[Quantization | None, str]:
    """The largest smaller group that divides the width; None with the reason where there is none."""
    for group in sorted(MODES[q.mode][1], reverse=True):
        if group < q.group_size and width % group == 0:
            return Quantization(q.bits, group, q.mode), ""
    return None, f"{width} wide, no multiple of {_either(MODES[q.mode][1])}"


def _check_width(module: Module, rule: Rule) -> None:
    if rule.q is None or module.width % rule.q.group_size == 0:
        return
    fitting = [str(group) for group in MODES[rule.q.mode][1] if module.width % group == 0]
    way_out = f"use groups of {' or '.join(fitting)}" if fitting else "no group size does; keep it dense"
    raise ConfigError(
        f"rule {rule.pattern!r}: {module.name} is {module.width} wide, which groups of {rule.q.group_size} do not "
        f"divide: {way_out}"
    )
