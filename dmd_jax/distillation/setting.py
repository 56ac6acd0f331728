"""What a run works with: its objective by stages, the frozen parameters, and the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmd_jax.data.loader import Together, batches
from dmd_jax.data.sources import ClassNames
from dmd_jax.method.types import Params
from dmd_jax.objectives import Need, Objective
from dmd_jax.parallel.sharding import own_rows
from dmd_jax.teachers.teacher import Frozen, Teacher

# Frozen parts that encode a batch, be it in the step or before it.
AHEAD = ("text_encoder",)
# The stages before one: how many steps each had, and its config.
Earlier = Sequence[tuple[int, ConfigDict]]


class Method(NamedTuple):
    """The functions and shapes of a run, from its config alone."""

    objective: Callable[[ConfigDict], Objective]  # a stage's config -> its objective
    # As ShapeDtypeStructs; a full-size network takes seconds to trace, and training needs none.
    frozen: Callable[[], Frozen]
    # What each batch goes through before the step: (AHEAD of the frozen, batch) -> batch.
    ahead: Callable[[Frozen, Any], Any] | None
    teacher: Teacher | None = None  # of a distillation
    judged: bool = False  # whether LPIPS is among the frozen

    def split(self, frozen: Frozen) -> tuple[dict[str, Any], dict[str, Any]]:
        """The frozen parts that the step takes, and those that `ahead` takes."""
        before = {} if self.ahead is None else {name: frozen[name] for name in AHEAD}
        return {name: part for name, part in frozen.items() if name not in before}, before

    def batch(self, stage: ConfigDict) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """The whole batch of a stage, before `ahead`."""
        return {name: dict(need.arrays) for name, need in self.objective(stage).needs.items()}


class Setting(NamedTuple):
    """A run with its weights and its data."""

    method: Method
    frozen: Frozen  # host arrays
    starts: Mapping[str, Params]  # of players that start from other weights, host arrays
    # A stage's config -> by the names of its objective's needs: source[i] -> one row
    sources: Callable[[ConfigDict], Mapping[str, Any]]
    identity: dict[str, Any]  # what a resumed run must share
    network: Mapping[str, Any]  # of the player that is kept
    class_names: ClassNames
    description: str  # of the weights, with "{step}" in it
    preview: Mapping[str, Mapping[str, Any]]  # the batch of pictures
    preview_count: int  # of images in each of their rows


def data_of(
    setting: Setting, mesh: Mesh, stage: ConfigDict, earlier: Earlier
) -> Iterator[dict[str, Any]]:
    """This process's rows of a stage's endless batches, from where earlier stages have come to."""
    objective, sources = setting.method.objective, setting.sources(stage)
    needs = objective(stage).needs
    done = sum(steps for steps, _ in earlier)

    def of_source(name: str, need: Need):
        def rows(of_stage: Mapping[str, Need]) -> int:
            return len(next(iter(of_stage[name].arrays.values()))) if name in of_stage else 0

        count = rows(needs)
        return batches(
            _Columns(sources[name], need.arrays),
            batch_size=count,
            seed=stage.seed,
            start=sum(steps * rows(objective(one).needs) for steps, one in earlier),
            rows=own_rows(mesh, count),
            used=lambda number: (done + number) % need.every == 0,
        )

    return Together({name: of_source(name, need) for name, need in needs.items()})


class _Columns:
    """A source with these columns of it alone."""

    def __init__(self, source: Any, names: Mapping[str, Any]):
        self._source, self._names = source, tuple(names)
        self.at_once = getattr(source, "at_once", 1)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._source[index]
        return {name: row[name] for name in self._names}
