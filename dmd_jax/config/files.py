"""Where a config comes from, and where it is kept: a Python file, overrides, config.json."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from dmd_jax.config.checks import (
    check_keys,
    check_same_run,
    check_values,
    flatten,
    lasting,
    unknown,
    value_of,
    when_asked,
)
from dmd_jax.config.moved import drop_gone, place_of, places, with_places
from dmd_jax.config.parts import FREE, OBJECTIVE, run_defaults
from dmd_jax.config.stages import stages_of
from dmd_jax.errors import UserError
from dmd_jax.objectives.kinds import KINDS
from dmd_jax.storage.files import local_path
from dmd_jax.storage.real_files import check_real_file, is_there
from dmd_jax.storage.seals import read_sealed, write_sealed

# Of config.json's form, for readers to come.
SCHEMA = 2  # 1: before a config had parts


def default_config(objective: str = OBJECTIVE) -> ConfigDict:
    """Every key that a config with this objective has, with its default (see `parts`)."""
    return ConfigDict(run_defaults(objective))


def with_objective(config: ConfigDict, objective: str) -> ConfigDict:
    """A copy of the config with another objective: its settings and players with their defaults.

    All else stays, such as the network, the data, the batch size and the optimisers of players that
    both have; but there are no stages, which may set what the other objective does not have.

    Raises:
      UserError: there is no such objective.
    """
    if objective not in KINDS:
        raise UserError(f"objective {objective!r}; expected one of {', '.join(KINDS)}")
    values, fresh = config.to_dict(), run_defaults(objective)
    for part in ("optimizer", "start"):
        values[part] = {name: values[part].get(name, one) for name, one in fresh[part].items()}
    return ConfigDict(values | {"objective": fresh["objective"], "stages": ()})


def shipped_config(name: str) -> Path:
    """The file of configs/ in the checkout, or where an installation puts it.

    Raises:
      UserError: there is none of that name.
    """
    folders = (Path(__file__).parents[2] / "configs", Path(sys.prefix) / "share/dmd_jax/configs")
    for folder in folders:
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
    raise UserError(f"no {name}.py in {' or '.join(map(str, folders))}; expected a whole install")


def load_config(path: str, overrides: Sequence[str]) -> ConfigDict:
    """Runs the file's get_config() and applies `--config.KEY=VALUE` overrides.

    Raises:
      UserError: the file is missing or fails, a key is unknown, or a value has the wrong type.
    """
    file, colon, argument = path.partition(":")
    file = local_path(file)
    try:
        check_real_file(file, "a Python file with get_config()")
        config = _parse(config_flags.DEFINE_config_file, f"--config={file}{colon}{argument}")
    except UserError as error:
        raise UserError(f"--config {error}") from error
    except (Exception, SystemExit) as error:  # The file is code and may raise anything.
        raise UserError(f"--config {path}: {_told_of_file(error, file)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config {path}: get_config() gave {type(config)}; expected a ConfigDict")
    return apply_overrides(_whole(config.to_dict(), f"--config {path}"), overrides)


def apply_overrides(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """A copy of `config` with the values of `--config.KEY=VALUE` arguments.

    A key of an earlier version is taken at its place, which is said on stderr, so that launch
    scripts go on working.

    Raises:
      UserError: an argument of another form, an unknown key, or a value of the wrong type.
    """
    known = _keys(config)
    for override in overrides:
        if (found := places(override)) != [override]:
            print(f"dmd-jax: {override} has moved: it is {' '.join(found)}", file=sys.stderr)
    overrides = [place for override in overrides for place in places(override)]
    for override in overrides:
        if not override.startswith("--config.") or "=" not in override:
            raise UserError(f"unexpected argument {override!r}; overrides are --config.KEY=VALUE")
        key = _key_of(override)
        if key not in known:
            raise UserError(f"{override}: {unknown(key, config)}")
        if isinstance(value_of(config, key), ConfigDict) and key not in FREE:
            raise UserError(f"{override}: {key} is a part; expected --config.{key}.KEY=VALUE")
    define = functools.partial(config_flags.DEFINE_config_dict, config=ConfigDict(config.to_dict()))
    try:
        config = _parse(define, *overrides)
    except flags.Error as error:
        raise UserError(_one_line(error).removeprefix("IllegalFlagValueError: flag ")) from error
    check_keys(config)
    check_values(config)
    stages_of(config)
    # Open, for a config file that goes on from here.
    return ConfigDict(config.to_dict())


def resolve_config(
    path: str | None, overrides: Sequence[str], workdir: Path, *, command: str
) -> ConfigDict:
    """The config of a run that writes to `workdir`, which keeps it in config.json.

    A workdir that has one is gone on with: without `path` its config is taken as it is, with
    overrides of what may change, which for `train` and `teacher` are the learning rates too. A file
    without a digest, as earlier versions wrote it, is compared with that of `path`, and not gone on
    with alone.

    Args:
      command: that the workdir belongs to.

    Raises:
      UserError: no config anywhere, or one that would make another run of what is in the workdir.
    """
    saved, trusted = _read_saved(workdir / "config.json", command)
    if path:
        config = load_config(path, overrides)
    elif saved is None:
        raise UserError(f"{workdir} holds no run to go on with; expected --config FILE")
    elif not trusted:
        raise UserError(
            f"{workdir / 'config.json'} has no sha256 that tells whether it is as it was written; "
            "expected --config FILE as well, with the run's config"
        )
    else:
        config = apply_overrides(saved, overrides)
    if saved is not None:
        overridden = {_key_of(place) for override in overrides for place in places(override)}
        asked = set()
        if command in ("train", "teacher"):
            keys = overridden & flatten(config.to_dict()).keys()
            asked = when_asked(keys, config.objective.name)
        check_same_run(lasting(saved), lasting(config), workdir, asked=asked)
    return config


def save_config(config: ConfigDict, workdir: Path, *, command: str) -> None:
    """Writes WORKDIR/config.json; to be called once nothing in the config can be refused any more.

    Raises:
      UserError: the folder cannot be written.
    """
    try:
        write_sealed(
            workdir / "config.json",
            {"schema": SCHEMA, "command": command, "config": config.to_dict()},
        )
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error}") from error


def _read_saved(path: Path, command: str) -> tuple[ConfigDict | None, bool]:
    """The config of a workdir, None where there is none, and whether a digest vouches for it."""
    if not is_there(path):
        return None, True
    content, trusted = read_sealed(path, "a run's config")
    schema, saved, written_by = (content.get(key) for key in ("schema", "config", "command"))
    if schema not in (SCHEMA, 1, None) or not isinstance(saved, dict):  # None: before schema 1
        raise UserError(f"{path} is of schema {schema!r:.50}; expected {SCHEMA}, with a config")
    if written_by != command:
        raise UserError(
            f"{path.parent} is the workdir of `dmd-jax {written_by}`; expected one of {command}"
        )
    return _whole(_nested(with_places(flatten(saved))), path), trusted


def _whole(values: dict[str, Any], where: Any) -> ConfigDict:
    """A config of these values, with the defaults of its objective's config for all others.

    Raises:
      UserError: a key that there is not, or an objective.
    """
    drop_gone(values, where)
    objective = values.get("objective")
    name = objective.get("name", OBJECTIVE) if isinstance(objective, dict) else OBJECTIVE
    config = ConfigDict(
        _completed(
            values, run_defaults(name if isinstance(name, str) and name in KINDS else OBJECTIVE)
        )
    )
    try:
        check_keys(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return config


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """The tree whose values have these dotted names."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parts, name = key.split(".")
        inner = tree
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[name] = value
    return tree


def _completed(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A config's values, with the default of every key that they do not have."""
    return defaults | {
        key: _completed(value, defaults[key])
        if isinstance(value, dict) and isinstance(defaults.get(key), dict)
        else value
        for key, value in values.items()
    }


def _key_of(override: str) -> str:
    return override.removeprefix("--config.").partition("=")[0]


def _keys(config: ConfigDict, prefix: str = "") -> set[str]:
    """The dotted names of a config's entries, those of its parts included."""
    keys = set()
    for key, value in config.items():
        keys.add(prefix + key)
        if isinstance(value, ConfigDict):
            keys |= _keys(value, f"{prefix}{key}.")
    return keys


def _parse(define, *arguments: str) -> ConfigDict:
    argv = ["dmd-jax", *arguments]
    values = flags.FlagValues()
    define("config", flag_values=values, sys_argv=argv)
    values(argv)
    return values.config


def _told_of_file(error: BaseException, file: Path) -> str:
    """What a config file raised, at which line of it, and where a key that it took for there is."""
    each: BaseException | None = error
    where = ""
    while each is not None:
        frames = traceback.extract_tb(each.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file)]
        if lines:
            # ml_collections raises errors of the file again, with the whole traceback as text.
            error, where = each, f"line {lines[-1]}: "
            break
        each = each.__cause__ or each.__context__
    key = error.name if isinstance(error, AttributeError) else None
    place = place_of(key) if isinstance(key, str) else None
    moved = f"; config.{key} has moved: it is {place}" if place else ""
    return f"{where}{_one_line(error)}{moved}"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
