"""Training checkpoints: Orbax behind one door.

WORKDIR/checkpoints/STEP holds the state, the position in the data, and a digest of each leaf of the
state, by which reading finds what was changed since. Writing is asynchronous and atomic: a step's
folder has its name only once it is whole.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from dmd_jax.errors import UserError, first_line
from dmd_jax.parallel.processes import settle
from dmd_jax.parallel.sharding import named_leaves
from dmd_jax.storage.files import in_bucket, path_of
from dmd_jax.storage.leaf_digests import leaf_digests
from dmd_jax.storage.seals import sealed, unsealed

log = logging.getLogger(__name__)


class Former(NamedTuple):
    """A layout that checkpoints of an earlier version have."""

    is_in: Callable[[Any], bool]  # the tree that was found -> whether it is in this layout
    tree_of: Callable[[Any], Any]  # the state -> a tree in this layout
    state_of: Callable[[Any, Any], Any]  # such a tree, and a state like that -> the state


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: made if missing. keep: how many of the newest to keep.
    """

    def __init__(self, folder: Path, *, keep: int = 3):
        self.folder = path_of(folder).resolve()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
            self._manager = _manager(self.folder, options)
        except OSError as error:
            raise UserError(f"--workdir {folder.parent} cannot be written: {error}") from error

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Starts writing; the state may be donated as soon as this returns.

        Args:
          position: of the data iterator, JSON-able, the same on every process.

        Raises:
          UserError: this or the write before it failed, as on a full disk.
        """
        if step in self._manager.all_steps():
            return
        # A copy, since it is written while the run goes on, and changes what it gave.
        position = json.loads(json.dumps(position))
        record = sealed({"position": position, "digests": leaf_digests(state)})
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), position=ocp.args.JsonSave(record)
        )
        self._guard(step, lambda: self._manager.save(step, args=items))

    def wait(self) -> None:
        """Returns when everything is written; raises a UserError if it was not."""
        self._guard(None, self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits for what is being written and ends the writers."""
        self._guard(None, self._manager.close)

    def restore(
        self, abstract: Any, former: Former | None = None
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest whole checkpoint on the shardings of `abstract`, whatever mesh wrote it.

        A checkpoint that some process cannot read, or whose leaves are not those that were saved,
        is set aside as `broken-STEP` with a warning, and the one before it is taken, by all
        processes.

        Args:
          abstract: the state as ShapeDtypeStructs with shardings.
          former: the layout that a checkpoint of an earlier version may have.

        Returns:
          (step, state, position), or None where there is no checkpoint.

        Raises:
          UserError: the checkpoint is of another architecture, or none can be read.
        """
        broken = []
        for step in settle(self.steps[::-1], lambda every: every[0]):
            read, problem = self._read(step, abstract, former)
            # A process whose part of the files is torn must not fall back alone.
            problem = settle(problem, _first_of)
            if problem is None:
                tree, record, is_former = read
                # By all processes, since each leaf is summed where its parts are.
                problem = settle(_changed(record.get("digests"), leaf_digests(tree)), _first_of)
            if problem is None:
                self._set_aside(broken)
                if "digests" not in record:  # as in checkpoints of earlier versions
                    log.warning("checkpoint %s has no digests to check", self.folder / str(step))
                if is_former:
                    tree = former.state_of(tree, abstract)
                return step, tree, record.get("position", record)
            log.warning(
                "checkpoint %s is not whole (%s); falling back to the one before it",
                self.folder / str(step),
                problem,
            )
            broken.append(step)
        if broken:
            raise UserError(
                f"no whole checkpoint in {self.folder}: steps {broken} cannot be read; "
                "expected one, or an empty folder to start anew"
            )
        return None

    def _read(
        self, step: int, abstract: Any, former: Former | None
    ) -> tuple[tuple[Any, Any, bool] | None, str | None]:
        """(state, what is recorded with it, is former), or None and what is wrong with the files.

        The state is in the layout in which it was saved, which may be the former one. By the
        handlers of Orbax alone: its managers wait for all processes to have read, which never comes
        to pass where one cannot.

        Raises:
          UserError: it is of another architecture.
        """
        folder = self.folder / str(step)
        state = ocp.PyTreeCheckpointHandler()
        try:
            _check_regular(folder)
            found = state.metadata(folder / "state").tree
            is_former = former is not None and former.is_in(found)
            if is_former:
                abstract = former.tree_of(abstract)
            check_same_architecture(found, abstract, folder)
            args = ocp.args.PyTreeRestore(
                item=abstract,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            )
            record, _ = unsealed(ocp.JsonCheckpointHandler().restore(folder / "position"))
            return (state.restore(folder / "state", args=args), record, is_former), None
        except UserError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds for torn files.
            _ignore_late_callbacks()
            return None, first_line(error)

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Renames, so that the run can write these steps again and nothing is lost."""
        if not steps:
            return
        problem = None
        if jax.process_index() == 0:
            try:
                for step in steps:
                    self._set_one_aside(step)
            except OSError as error:
                problem = f"broken checkpoints in {self.folder} cannot be renamed: {error}"
        if problem := settle(problem, lambda every: every[0]):
            raise UserError(problem)
        self._manager.reload()

    def _set_one_aside(self, step: int) -> None:
        target = self.folder / f"broken-{step}"
        number = 1
        while target.exists():
            number += 1
            target = self.folder / f"broken-{step}-{number}"
        (self.folder / str(step)).rename(target)

    def _guard(self, step: int | None, action) -> None:
        try:
            action()
        except Exception as error:  # Asynchronous writers raise what their threads met.
            _ignore_late_callbacks()
            what = "a checkpoint" if step is None else f"checkpoint {step}"
            kept = [kept for kept in self.steps if kept != step]
            last = f"the last whole one is step {kept[-1]}" if kept else "there is no earlier one"
            raise UserError(
                f"{what} could not be written under {self.folder} ({first_line(error)}); {last}"
            ) from error


def restore_subtree(folder: Path, names: Sequence[str]) -> tuple[int, str, Any] | None:
    """The first of `names` ("ema", "generator/params", …) in the newest whole checkpoint.

    Returns:
      (step, name, params as NumPy arrays), or None where there is no checkpoint with such a part.
    """
    folder = path_of(folder).resolve()
    options = ocp.CheckpointManagerOptions(save_interval_steps=0, create=False, read_only=True)
    with _manager(folder, options) as manager:
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                _check_regular(folder / str(step))
                tree = manager.item_metadata(step).state.tree
                name = next((name for name in names if _descend(tree, name)), None)
                if name is None:
                    return None
                wanted = _nest(name, _descend(tree, name))
                args = ocp.args.PyTreeRestore(
                    item=wanted,
                    restore_args=jax.tree.map(
                        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted
                    ),
                    partial_restore=True,
                )
                restored = manager.restore(
                    step, args=ocp.args.Composite(state=args, position=ocp.args.JsonRestore())
                )
                state, (record, _) = restored.state, unsealed(restored.position)
                if problem := _changed(record.get("digests"), leaf_digests(state)):
                    raise ValueError(problem)
            except Exception as error:  # As in Checkpoints.restore.
                _ignore_late_callbacks()
                log.warning(
                    "checkpoint %s is not whole (%s); trying the one before it",
                    folder / str(step),
                    first_line(error),
                )
                continue
            return step, name, _descend(state, name)
    return None


def _check_regular(folder: Path) -> None:
    """Raises a ValueError if there is a pipe or the like in a checkpoint: to open it may hang."""
    for path in [] if in_bucket(folder) else folder.rglob("*"):
        if not path.is_dir() and not path.is_file():
            raise ValueError(f"{path.relative_to(folder)} is no regular file")


def _changed(saved: Any, found: dict[str, str]) -> str | None:
    """Which leaves, by their digests, are not those that were saved; None where all are.

    Args:
      saved: None for a checkpoint without digests.
    """
    if saved is None:
        return None
    names = [name for name, digest in found.items() if saved.get(name) != digest]
    more = f" and {len(names) - 1} more were" if len(names) > 1 else " was"
    return f"{names[0]}{more} changed since it was saved" if names else None


def _first_of(every: Sequence[str | None]) -> str | None:
    return next(filter(None, every), None)


def check_same_architecture(found: Any, expected: Any, where: Any) -> None:
    """Raises a UserError that lists the leaves in which two trees of shapes differ."""
    found, expected = _shapes(found), _shapes(expected)
    lines = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    lines += [f"{name} is not expected" for name in sorted(found.keys() - expected.keys())]
    lines += [
        f"{name} is {found[name]}, expected {expected[name]}"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name]
    ]
    if lines:
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise UserError(
            f"{where} is of another architecture than the config: {'; '.join(lines[:3])}{more}"
        )


@functools.cache
def _ignore_late_callbacks() -> None:
    """After a failed read or write, TensorStore reports to an event loop that Orbax has closed.

    Python would print a traceback of that from a thread where nobody can catch it.
    """
    previous = sys.unraisablehook

    def hook(unraisable) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            previous(unraisable)

    sys.unraisablehook = hook


def _manager(folder: Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    handlers = {
        "state": ocp.PyTreeCheckpointHandler(),
        "position": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = named_leaves(tree, is_leaf=lambda node: hasattr(node, "shape"))
    return {name: tuple(leaf.shape) for name, leaf in leaves.items()}


def _descend(tree: Any, name: str) -> Any:
    for part in name.split("/"):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _nest(name: str, tree: Any) -> Any:
    for part in reversed(name.split("/")):
        tree = {part: tree}
    return tree
