"""Modules by the names that they had before the package had rooms, for code that uses these."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_PLACES = {
    **{
        name: f"method.{name}"
        for name in (
            *("denoisers", "discrete_samplers", "losses", "precision"),
            *("samplers", "schedules", "types"),
        )
    },
    **{name: f"training.{name}" for name in ("loop", "state", "train_step")},
    **{name: f"storage.{name}" for name in ("checkpoints", "files", "weights")},
    "data.pairs": "data.pair_shards",
    "data.prompts": "data.prompt_shards",
    "sharding": "parallel.sharding",
    "tokenizer": "teachers.tokenizer",
}


class _Former(MetaPathFinder, Loader):
    """Makes `dmd_jax.weights` a module with the names of `dmd_jax.storage.weights`, and so on."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "dmd_jax" and name in _PLACES else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None  # as Python makes one

    def exec_module(self, module: ModuleType) -> None:
        place = f"dmd_jax.{_PLACES[module.__name__.partition('.')[2]]}"
        warnings.warn(f"{module.__name__} is {place}", DeprecationWarning, stacklevel=2)
        names = vars(importlib.import_module(place))
        vars(module).update({name: v for name, v in names.items() if not name.startswith("__")})


def install() -> None:
    """Has Python find these modules, after all that it finds itself."""
    if not any(isinstance(finder, _Former) for finder in sys.meta_path):
        sys.meta_path.append(_Former())
