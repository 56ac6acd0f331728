"""Options: the fields of a settings dataclass that a config may set, and what they may be."""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from dmd_jax.errors import UserError

Settings = TypeVar("Settings")


class Option(NamedTuple):
    """What one value of a config may be, and when it may change."""

    least: float | None = None  # the smallest value, itself allowed
    above: float | None = None  # a lower bound that is not allowed itself
    most: float | None = None  # the largest value, itself allowed
    below: float | None = None  # an upper bound that is not allowed itself
    choices: tuple[str, ...] = ()
    may_change: bool = False  # when a run goes on
    when_asked: bool = False  # when a run goes on, by an override of the command that does so
    staged: bool = False  # a stage of a run may set it for itself


def option(default: Any = dataclasses.MISSING, *, factory: Any = dataclasses.MISSING, **of: Any):
    """A dataclass field that a config may set. Fields of other kinds are set by code alone.

    Args:
      of: fields of Option.
    """
    metadata = {Option: Option(**of)}
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def options_of(kind: type) -> dict[str, tuple[Option, Any]]:
    """{name: (its Option, its type)} of a settings dataclass."""
    hints = typing.get_type_hints(kind)
    return {
        field.name: (field.metadata[Option], hints[field.name])
        for field in dataclasses.fields(kind)
        if Option in field.metadata
    }


def defaults_of(kind: type) -> dict[str, Any]:
    """{name: default} of the options of a settings dataclass; settings in it are dicts as well."""
    values = {}
    for field in dataclasses.fields(kind):
        if Option in field.metadata:
            made = field.default_factory is not dataclasses.MISSING
            value = field.default_factory() if made else field.default
            values[field.name] = (
                dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
            )
    return values


def make(kind: type[Settings], values: Mapping[str, Any], where: str, **given: Any) -> Settings:
    """An instance of a settings dataclass.

    Args:
      values: of its options, by name; an option that is not there has its default.
      where: the name of the whole in messages, such as "config.pairs".
      given: its fields that are no options.

    Raises:
      UserError: a value of another type, or out of range.
    """
    options = options_of(kind)
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.name not in {**values, **given} and _has_no_default(field)
    ]
    if missing or values.keys() - options.keys():
        unknown = sorted(map(str, values.keys() - options.keys()))
        raise UserError(f"{where}: missing keys {missing}, unknown keys {unknown}")
    checked = {name: _checked(*options[name], v, f"{where}.{name}") for name, v in values.items()}
    return kind(**checked, **given)


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _checked(of: Option, hint: Any, value: Any, where: str) -> Any:
    """The value as its type says.

    Raises:
      UserError: it is of another type, or not what the option may be.
    """
    if isinstance(hint, types.UnionType):  # X | None
        return None if value is None else _checked(of, typing.get_args(hint)[0], value, where)
    if dataclasses.is_dataclass(hint):
        return make(hint, _of_type(value, Mapping, "a dict", where), where)
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is dict:
        value = _of_type(value, Mapping, "a dict", where)
        each = inner[1] if inner else Any
        return {
            name: one if each is Any else _checked(of, each, one, f"{where}.{name}")
            for name, one in value.items()
        }
    if origin is tuple:
        value = _of_type(value, Sequence, "a sequence", where)
        if inner[-1] is not Ellipsis and len(value) != len(inner):
            raise UserError(f"{where} is {value!r:.200}; expected {len(inner)} numbers")
        return tuple(value if inner[0] is Any else [_number(of, float, v, where) for v in value])
    if hint in (int, float):
        return _number(of, hint, value, where)
    value = _of_type(value, hint, {str: "text", bool: "True or False"}[hint], where)
    if of.choices and value not in of.choices:
        raise UserError(f"{where} is {value!r}; expected one of {', '.join(of.choices)}")
    return value


def _of_type(value: Any, kind: type, expected: str, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, str) and kind is not str):
        raise UserError(f"{where} is {value!r:.200}; expected {expected}")
    return value


def _number(of: Option, kind: type, value: Any, where: str) -> int | float:
    """A finite number in the option's range."""
    real = {int: numbers.Integral, float: numbers.Real}[kind]
    fits = isinstance(value, real) and not isinstance(value, bool)
    if fits:  # a whole number may be larger than any float
        whole = isinstance(value, numbers.Integral)
        fits = abs(value) < 1 << 63 if whole else math.isfinite(value)
    if not fits:
        number = {int: "a whole number", float: "a finite number"}[kind]
        raise UserError(f"{where} is {value!r:.200}; expected {number}")
    if of.least is not None and value < of.least:
        raise UserError(f"{where} is {value}; expected at least {of.least}")
    if of.above is not None and value <= of.above:
        raise UserError(f"{where} is {value}; expected more than {of.above}")
    if of.most is not None and value > of.most:
        raise UserError(f"{where} is {value}; expected at most {of.most}")
    if of.below is not None and value >= of.below:
        raise UserError(f"{where} is {value}; expected less than {of.below}")
    return kind(value)
