"""Configurations that are not trusted, read into dataclasses by the annotations of their fields.

::

    @dataclass(frozen=True)
    class Config:
        dim: Annotated[int, Range(1, 65536)] = 4096
        norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
        delays: tuple[int, ...] | None = None

        def __post_init__(self) -> None:
            check_fields(self)

    Config(**read_fields(Config, json.loads(text)))

A key that no field reads is an error, and so is a value of another type or outside its range; the message names it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from reprlib import repr as show
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import ConfigError

__all__ = ["Range", "check_fields", "expect_keys", "mapping", "read_fields", "read_value"]

_KINDS: dict[Any, tuple[Any, str]] = {
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    bool: (bool, "true or false"),
    str: (str, "a string"),
}


@dataclass(frozen=True)
class Range:
    """Bounds of a number; with ``above`` it must not be ``least`` itself."""

    least: float
    most: float
    above: bool = False


def read_fields(
    cls: Any, data: Any, where: str = "", *, whole: str = "config.json", hidden: Collection[str] = ()
) -> dict[str, Any]:
    """Arguments for a dataclass from a JSON object.

    Parameters
    ----------
    cls : type
        A dataclass; fields that are dataclasses themselves are read by their ``from_dict``, if they have one.
    data : mapping
    where : str
        Name of the object, where it is a part of a larger one.
    whole : str
        What it is called where it is not.
    hidden : collection of str
        Fields that are not keys of the object.

    Raises
    ------
    ConfigError
        Names the first key that is unknown or missing, or whose value cannot be used.
    """
    whole, hints = where or whole, _hints(cls)
    known = {entry.name: entry for entry in fields(cls) if entry.name not in hidden}
    expect_keys(whole, data, known)
    for name, entry in known.items():
        if entry.default is MISSING and entry.default_factory is MISSING and name not in data:
            raise ConfigError(f"{whole} lacks {name}")
    return {key: read_value(_dotted(where, key), value, hints[key]) for key, value in data.items()}


def check_fields(config: Any, where: str = "") -> None:
    """Check what a dataclass was made of, as :func:`read_fields` does: for ``__post_init__``."""
    cls: Any = type(config)
    for name, hint in _hints(cls).items():
        read_value(_dotted(where, name), getattr(config, name), hint)


def read_value(name: str, value: Any, hint: Any) -> Any:
    """``value`` as an annotation wants it: lists become tuples, objects become dataclasses.

    Raises
    ------
    ConfigError
        If it is of another type, or outside a :class:`Range`.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        listed = isinstance(value, (list, tuple))
        hint = next((one for one in arguments if listed and get_origin(one) is tuple), arguments[0])
        return read_value(name, value, hint)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{name} must be a list, not {show(value)}")
        return tuple(read_value(f"{name}[{index}]", item, arguments[0]) for index, item in enumerate(value))
    if origin is Mapping:
        return {key: read_value(f"{name}.{key}", item, arguments[1]) for key, item in mapping(name, value).items()}
    if origin is Literal:
        if not any(type(one) is type(value) and one == value for one in arguments):
            raise ConfigError(f"{name} {show(value)} is not supported; use {' or '.join(map(repr, arguments))}")
        return value
    if is_dataclass(hint):
        made: Any = hint
        if isinstance(value, made):
            return value
        return made.from_dict(value, name) if hasattr(made, "from_dict") else made(**read_fields(made, value, name))
    return value if hint is Any else _scalar(name, value, hint)


def _scalar(name: str, value: Any, hint: Any) -> Any:
    kind, *bounds = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    types, wanted = _KINDS[kind]
    if not isinstance(value, types) or (kind is not bool and isinstance(value, bool)) or value != value:
        raise ConfigError(f"{name} must be {wanted}, not {show(value)}")
    if kind is float and not bounds and not abs(value) <= sys.float_info.max:
        raise ConfigError(f"{name} must be a finite number")
    for bound in bounds:
        if value < bound.least or (bound.above and value == bound.least):
            least = "above" if bound.above else "at least"
            raise ConfigError(f"{name} must be {least} {bound.least:g}, not {show(value)}")
        if value > bound.most:
            raise ConfigError(f"{name} must be at most {bound.most:g}, found {show(value)}")
    return value


def mapping(where: str, value: Any) -> Mapping[str, Any]:
    """``value``, if it is a JSON object."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be an object, not a {type(value).__name__}")
    return value


def expect_keys(where: str, data: Any, known: Iterable[str]) -> None:
    """Refuse an object with keys that nothing reads: settings that are ignored are how ports go wrong."""
    unknown = sorted(mapping(where, data).keys() - set(known))
    if unknown:
        names = f"key{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}"
        raise ConfigError(f"{where} has unknown {names}: this version does not know what that means")


def _dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)
