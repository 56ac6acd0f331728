"""Checks of a config: keys that there are, values that they may have, and what may change."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dmd_jax.config.moved import place_of
from dmd_jax.config.parts import Run, run_defaults
from dmd_jax.errors import UserError, differing
from dmd_jax.objectives.kinds import KINDS
from dmd_jax.options import Option, make, options_of


def check_keys(config: ConfigDict) -> None:
    """Raises a UserError that names an unknown objective, or every unknown key."""
    objective = config.get("objective")
    name = objective.get("name") if isinstance(objective, ConfigDict) else None
    if not isinstance(name, str) or name not in KINDS:
        raise UserError(f"config.objective.name is {name!r}; expected one of {', '.join(KINDS)}")
    keys = [key for key in _walk(config.to_dict()) if option_of(key, name) is None]
    if keys:
        raise UserError("; ".join(unknown(key, config) for key in keys))


def check_values(config: ConfigDict, where: str = "config") -> None:
    """Raises a UserError that names the first value that no config can have.

    Args:
      where: the config's name in the message, such as "config.stages[0]".
    """
    values = config.to_dict()
    flatten(values)  # config.json takes all of them
    make(Run, values, where)
    settings_of(config, where)
    kind = KINDS[config.objective.name]
    for each in ("optimizer", "start"):
        for player in values[each].keys() - set(kind.players):
            raise UserError(
                f"{where}.{each}.{player} is of no player of {config.objective.name}; expected "
                f"some of {', '.join(kind.players)}"
            )


def option_of(key: str, objective: str) -> Option | None:
    """The option of a dotted key in a config with that objective; None where there is none."""
    first, *rest = key.split(".")
    if first == "objective" and rest:
        options = {"name": (Option(), str)} | options_of(KINDS[objective].settings)
        return _option_in(options, rest)
    return _option_in(options_of(Run), [first, *rest])


def _option_in(options: Mapping[str, tuple[Option, Any]], path: list[str]) -> Option | None:
    name, *rest = path
    if name not in options:
        return None
    option, hint = options[name]
    for part in typing.get_args(hint):
        # Toy | None, and the players of a dict[str, AdamW].
        if dataclasses.is_dataclass(part):
            rest = rest[1:] if typing.get_origin(hint) is dict else rest
            return _option_in(options_of(part), rest) if rest else option
    if dataclasses.is_dataclass(hint):
        return _option_in(options_of(hint), rest) if rest else option
    # A network's options and a player's start are the network's and the objective's to check.
    return option if not rest or (typing.get_origin(hint) or hint) is dict else None


def unknown(key: str, config: ConfigDict) -> str:
    """The message about a dotted key that `config` does not have."""
    if place := place_of(key):
        return f"{key} has moved: it is {place}"
    objective = config.objective.name
    names = {**flatten(config.to_dict()), **flatten(run_defaults(objective))}
    known = [name for name in names if option_of(name, objective) is not None]
    near = difflib.get_close_matches(key, known, n=1)
    return f"the config has no key {key}" + (f"; did you mean {near[0]}?" if near else "")


def value_of(config: ConfigDict, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def settings_of(config: ConfigDict, where: str = "config") -> Any:
    """The settings of the config's objective, or of a stage's.

    Args:
      where: as of `check_values`.

    Raises:
      UserError: a value that they cannot have.
    """
    values = config.objective.to_dict()
    kind = KINDS[values.pop("name")].settings
    return make(kind, values, f"{where}.objective", batch_size=config.batch_size)


def lasting(config: ConfigDict) -> dict[str, Any]:
    """The values, by their dotted names, that make a run what it is: all that may not change."""

    def fixed(values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: value
            for key, value in values.items()
            if key == "until" or not option_of(key, config.objective.name).may_change
        }

    values = fixed(flatten(config.to_dict()))
    return values | {"stages": [fixed(stage) for stage in values["stages"]]}


def when_asked(values: Mapping[str, Any], objective: str) -> set[str]:
    """The dotted keys among these that may change when an override asks for it."""
    return {key for key in values if option_of(key, objective).when_asked}


def check_same_run(
    before: dict[str, Any], after: dict[str, Any], workdir: Path, *, asked: Collection[str] = ()
) -> None:
    """Raises a UserError that names the values in which two runs, as `lasting`, differ.

    Args:
      asked: keys that may differ.
    """
    before, after = (
        {key: value for key, value in values.items() if key not in asked}
        for values in (before, after)
    )
    if changed := differing(before, after, "{} is {!r} there, {!r} here"):
        raise UserError(
            f"{workdir} holds a run with another config: {changed}; expected the same values (a "
            "learning rate may change by an override --config.KEY=VALUE), or another --workdir"
        )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's values by their dotted names, JSON-able: lists stand for tuples."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            # JSON knows no tuples, at any depth.
            try:
                flat[f"{prefix}{key}"] = json.loads(json.dumps(value))
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"config.{prefix}{key} is {value!r:.200}; expected plain Python numbers, text, "
                    "or sequences and dicts of these"
                ) from error
    return flat


def _walk(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted names of a config's values, an empty dict being one."""
    keys = []
    for key, value in tree.items():
        inner = _walk(value, f"{prefix}{key}.") if isinstance(value, Mapping) else []
        keys += inner or [f"{prefix}{key}"]
    return keys
