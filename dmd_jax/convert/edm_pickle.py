"""The pickles that EDM's networks are released as, read without running what they carry.

Such a file is a pickle of {"ema": EDMPrecond, ...}. Every module in it is a "persistent object":
the source text of its class, which unpickling would execute, its name, and its state, a torch
module's __dict__. The text is dropped here; name, state and the keyword arguments that the state
remembers are all that a network of ours needs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dmd_jax.convert.torch_tensors import TENSORS, Storage, Tensor, arrays_of, read_legacy
from dmd_jax.errors import UserError, first_line
from dmd_jax.storage.pickled_arrays import NUMPY
from dmd_jax.storage.real_files import check_real_file
from dmd_jax.storage.safe_pickle import load, shown

CLASS = "EDMPrecond"
_VERSION = 6
_ARGUMENTS = ("img_resolution", "img_channels", "label_dim", "use_fp16")  # that may have no name
_MOST_VALUES = 200  # of the keyword arguments together
_DEEPEST = 20
_MOST_PARTS = 100_000  # parameters, buffers and modules of all modules together


@dataclasses.dataclass
class _Module:
    """A persistent object, or one of torch's own containers."""

    class_name: str
    state: dict[str, Any] = dataclasses.field(default_factory=dict)

    def pickle_state(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ValueError("a module whose state is no dictionary")
        self.state = state

    def part(self, name: str) -> dict[str, Any]:
        """One of the dictionaries that a torch module keeps."""
        found = self.state.get(name)
        if not isinstance(found, dict):
            raise ValueError(f"no {name} in {shown(self.class_name)}")
        return found


def read_edm_pickle(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The network in a released EDM pickle.

    Returns:
      (the keyword arguments of its EDMPrecond, its state dict). The arrays are views of the file's
      own bytes, each of which is freed with its array.

    Raises:
      UserError: the file cannot be read, is damaged, asks for anything but the parts of a network,
        or is of another class than EDMPrecond.
    """
    where = str(path)
    allowed = TENSORS | NUMPY
    allowed["torch_utils.persistence", "_reconstruct_persistent_obj"] = _reconstruct
    for name in ("ModuleDict", "ModuleList"):
        allowed["torch.nn.modules.container", name] = lambda name=name: _Module(name)
    allowed["torch.storage", "_load_from_bytes"] = _storage_loader(where)
    try:
        check_real_file(path, "a pickle of EDM's release")
        with path.open("rb") as file:
            found = load(file, allowed=allowed, where=where)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    network = found.get("ema") if isinstance(found, dict) else None
    if not isinstance(network, _Module):
        raise UserError(f"{path} holds {shown(found)}; expected EDM's network under 'ema'")
    if network.class_name != CLASS:
        raise UserError(
            f"{path} is of the class {shown(network.class_name)}; expected {CLASS}, as EDM's "
            "released networks are"
        )
    try:
        kwargs = _keyword_arguments(network)
        inner = network.part("_modules").get("model")
        named = kwargs.get("model_type", getattr(inner, "class_name", None))
        if not isinstance(inner, _Module) or inner.class_name != named:
            raise ValueError(f"model_type {shown(named)} beside a network of another class")
        state_dict = arrays_of(_tensors(network))
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{path} holds no network of EDM's: {first_line(error)}") from error
    return kwargs, state_dict


def _reconstruct(meta: Any) -> _Module:
    """torch_utils.persistence._reconstruct_persistent_obj, without the reconstruction."""
    if not isinstance(meta, dict) or meta.get("type") != "class":
        raise ValueError("a persistent object that is of no class")
    if meta.get("version") != _VERSION:
        raise ValueError(f"a persistent object of version {shown(meta.get('version'))}")
    if not isinstance(meta.get("class_name"), str):
        raise ValueError("a persistent object whose class has no name")
    module = _Module(meta["class_name"])
    module.pickle_state(meta.get("state"))
    return module


def _storage_loader(where: str) -> Callable[[Any], Storage]:
    """torch.storage._load_from_bytes: a storage in a legacy file of its own."""
    known: dict[int, tuple[bytes, Storage]] = {}

    def load_from_bytes(content: Any) -> Storage:
        if not isinstance(content, bytes):
            raise ValueError("a storage that is not made of bytes")
        # The memo can hand the same bytes to every call; kept here, they keep their id.
        if id(content) not in known:
            found = read_legacy(content, f"{where}, in a storage")
            if not isinstance(found, Storage):
                raise ValueError(f"a {type(found).__name__} in place of a storage")
            known[id(content)] = content, found
        return known[id(content)][1]

    return load_from_bytes


def _keyword_arguments(network: _Module) -> dict[str, Any]:
    given, named = network.state.get("_init_args", ()), network.state.get("_init_kwargs")
    if not isinstance(given, tuple | list) or len(given) > len(_ARGUMENTS):
        raise ValueError("arguments without names")
    if not isinstance(named, dict):
        raise ValueError("no _init_kwargs")
    budget = iter(range(_MOST_VALUES))
    return _plain(dict(zip(_ARGUMENTS, given)) | named, budget, depth=3)


def _plain(value: Any, budget: Any, depth: int) -> Any:
    """The value, if it is what JSON could hold, and little of it."""
    if next(budget, None) is None or depth < 0:
        raise ValueError("keyword arguments beyond all measure")
    if isinstance(value, dict):
        return {_checked(key): _plain(each, budget, depth - 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, budget, depth - 1) for each in value]
    if isinstance(value, str):
        return shown(value)
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int) and abs(value) < 2**31:
        return value
    raise ValueError(f"a keyword argument of type {type(value).__name__}")


def _tensors(network: _Module) -> dict[str, Tensor]:
    """The parameters and buffers under the names that a state dict has for them."""
    found: dict[str, Tensor] = {}
    waiting, seen, parts = [("", network, _DEEPEST)], set(), 0
    while waiting:
        prefix, module, depth = waiting.pop()
        if depth < 0 or id(module) in seen:
            raise ValueError("a module inside itself, or in two places")
        seen.add(id(module))
        kinds = [module.part(kind) for kind in ("_parameters", "_buffers", "_modules")]
        parts += sum(map(len, kinds))
        if parts > _MOST_PARTS:  # one dictionary may be that of many modules
            raise ValueError(f"modules of more than {_MOST_PARTS:,} parts")
        parameters, buffers, modules = kinds
        fleeting = module.state.get("_non_persistent_buffers_set", set())
        if not isinstance(fleeting, set):
            raise ValueError(f"a {type(fleeting).__name__} in place of a set")
        lasting = {name: value for name, value in buffers.items() if name not in fleeting}
        for name, value in (parameters | lasting).items():
            if value is None:  # a layer without this parameter
                continue
            if not isinstance(value, Tensor):
                raise ValueError(f"a {type(value).__name__} in place of a tensor")
            found[prefix + _checked(name)] = value
        for name, inner in modules.items():
            if inner is None:
                continue
            if not isinstance(inner, _Module):
                raise ValueError(f"a {type(inner).__name__} in place of a module")
            waiting.append((f"{prefix}{_checked(name)}.", inner, depth - 1))
    return found


def _checked(name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"\w{1,100}", name, re.ASCII):
        raise ValueError("a module, parameter or argument without a plain name")
    return name
