"""Builds a pickle in the format of EDM's released networks, without PyTorch and without EDM.

    python tests/helpers/edm_pickle.py --config configs/cifar10_cond.py OUT.pkl

writes one with random weights for the config's network, so that the way from `dmd-jax convert edm`
to a distilled generator can be tried before anything is downloaded. Weights are drawn per
state-dict key, n = default_rng(crc32(key)).standard_normal(shape): 0.1 n for vectors, plus 1 for
norm weights; 16 n for Fourier frequencies; n / sqrt(prod(shape[1:])) for the rest.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from torch_bytes import Call, Global, dump, legacy_storage, rebuilt, tensor  # noqa: E402

# What the real files have here is EDM's own source, which unpickling them runs.
MODULE_SOURCE = "raise SystemExit('the source in the pickle was executed')\n"
MODEL_TYPES = {"songunet": "SongUNet", "dhariwal": "DhariwalUNet"}
_LAYERS = {"norm": "GroupNorm", "conv": "Conv2d", "affine": "Linear", "map": "Linear"}
_LAYERS |= {"skip": "Conv2d", "qkv": "Conv2d", "proj": "Conv2d", "out": "Conv2d"}


def write_edm_pickle(
    path: Path,
    kwargs: Mapping[str, Any],
    state_dict: Mapping[str, np.ndarray | Callable[[], np.ndarray]],
    *,
    class_name: str = "EDMPrecond",
    protocol: int = 4,
) -> None:
    """Writes {"ema": a network}.

    Args:
      kwargs: of EDMPrecond. state_dict: EDM's keys; a function is called when its turn comes, so
        that a large file takes little memory.
    """
    inner = _module(kwargs.get("model_type", "DhariwalUNet"), _nested(state_dict)["model"])
    attributes = {"sigma_data": 0.5, "_init_args": (), "_init_kwargs": dict(kwargs)}
    network = persistent(class_name, module_state(modules={"model": inner}) | attributes)
    with path.open("wb") as file:
        dump({"ema": network}, file, protocol)


def persistent(class_name: str, state: dict[str, Any], **changes: Any) -> Call:
    """An object of a class whose source travels with it."""
    meta = {"type": "class", "version": 6, "module_src": MODULE_SOURCE}
    meta |= {"class_name": class_name, "state": state} | changes
    return Call(Global("torch_utils.persistence", "_reconstruct_persistent_obj"), (meta,))


def module_state(parameters=(), buffers=(), modules=()) -> dict[str, Any]:
    """The __dict__ of a torch module."""
    state = {"training": False, "_parameters": OrderedDict(parameters)}
    state |= {"_buffers": OrderedDict(buffers), "_non_persistent_buffers_set": set()}
    hooks = ("_backward_hooks", "_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks")
    state |= {name: OrderedDict() for name in hooks} | {"_is_full_backward_hook": None}
    return state | {"_modules": OrderedDict(modules)}


def stored(array: np.ndarray, *, parameter: bool) -> Call:
    """A parameter or buffer, with its storage in the legacy format inside."""
    flat = Call(Global("torch.storage", "_load_from_bytes"), (legacy_storage(array.reshape(-1)),))
    value = rebuilt(tensor(array), flat)
    if not parameter:
        return value
    return Call(Global("torch._utils", "_rebuild_parameter"), (value, False, OrderedDict()))


def numpy_scalar(value: float) -> Call:
    """A float64 as NumPy pickles it."""
    state = (3, "<", None, None, None, -1, -1, 0)
    dtype = Call(Global("numpy", "dtype"), ("f8", False, True), state=state)
    content = struct.pack("<d", value)
    return Call(Global("numpy.core.multiarray", "scalar"), (dtype, content))


def _module(class_name: str, tree: dict[str, Any]) -> Call:
    """A module and those below it; functions and arrays are its own tensors."""
    parameters, buffers, modules = {}, {}, {}
    for name, value in tree.items():
        if isinstance(value, dict):
            modules[name] = _module(_class_of(name), value)
        elif name in ("resample_filter", "freqs"):
            buffers[name] = _lazily(value, parameter=False)
        else:
            parameters[name] = _lazily(value, parameter=True)
    if class_name == "Conv2d":
        buffers.setdefault("resample_filter", None)
    state = module_state(parameters, buffers, modules)
    if class_name == "ModuleDict":
        return Call(Global("torch.nn.modules.container", "ModuleDict"), (), state=state, new=True)
    if class_name == "UNetBlock":
        state["skip_scale"] = numpy_scalar(math.sqrt(0.5))
    return persistent(class_name, state | {"_init_args": (), "_init_kwargs": {}})


def _class_of(name: str) -> str:
    if name in ("enc", "dec"):
        return "ModuleDict"
    if name == "map_noise":
        return "FourierEmbedding"
    if name.endswith("aux_norm") or name == "out_norm":
        return "GroupNorm"
    if name.endswith(("_conv", "aux_residual", "aux_skip")):
        return "Conv2d"
    kinds = [kind for start, kind in _LAYERS.items() if name.startswith(start)]
    return kinds[0] if kinds else "UNetBlock"


def _lazily(value, *, parameter):
    return lambda: stored(as_array(value), parameter=parameter)


def as_array(value) -> np.ndarray:
    """The array, or what a function makes of it."""
    return value() if callable(value) else value


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for key, value in flat.items():
        *path, leaf = key.split(".")
        node = root
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    return root


def drawn_state_dict(network: Mapping[str, Any]) -> dict[str, Callable[[], np.ndarray]]:
    """A random state dict of the network, under EDM's keys and in PyTorch's layouts."""
    import flax.traverse_util
    import jax

    from dmd_jax.models import build_denoiser

    template = jax.eval_shape(build_denoiser(network).init, jax.random.key(0))
    shapes = {}
    for path, leaf in flax.traverse_util.flatten_dict(template).items():
        name = ".".join(path).replace("enc_", "enc.", 1).replace("dec_", "dec.", 1)
        name = name.replace(".kernel", ".weight").replace(".scale", ".weight")
        order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim]
        shapes[f"model.{name}"] = tuple(leaf.shape[axis] for axis in order)
    taps = np.array(network.get("resample_filter", (1, 1)), np.float32)
    kernel = np.outer(taps, taps)[None, None] / taps.sum() ** 2
    for name in list(shapes):
        block, _, rest = name.rpartition(".conv0.weight")
        if not rest and block.endswith(("_up", "_down")):
            shapes |= dict.fromkeys(f"{block}.{at}.resample_filter" for at in ("conv0", "skip"))
        if name.endswith("aux_residual.weight"):
            shapes[name.replace("weight", "resample_filter")] = None
    return {
        name: (lambda: kernel) if shape is None else (lambda n=name, s=shape: drawn(n, s))
        for name, shape in shapes.items()
    }


def drawn(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 weights of a state-dict key, of ordinary size in every layer."""
    n = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if key.endswith("freqs"):
        return 16 * n
    if len(shape) == 1:
        is_scale = "norm" in key.split(".")[-2] and key.endswith("weight")
        return np.float32(0.1) * n + np.float32(is_scale)
    return n / np.float32(math.sqrt(math.prod(shape[1:])))


def init_kwargs(network: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of the EDMPrecond around a network of ours."""
    options = json.loads(json.dumps(dict(network)))
    kwargs = {"model_type": MODEL_TYPES[options.pop("name")], "use_fp16": False}
    kwargs |= {"img_channels": options.pop("in_channels")}
    del options["out_channels"]
    return kwargs | options


def main() -> None:
    from dmd_jax.config import load_config

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    network = load_config(args.config, []).network.to_dict()
    write_edm_pickle(args.out, init_kwargs(network), drawn_state_dict(network))
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
