"""`dmd-jax convert inception`: pytorch-fid's Inception from its .pth."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from dmd_jax.convert.torch_file import load_state_dict
from dmd_jax.errors import UserError
from dmd_jax.models.judges.inception import CLASSES, FEATURES, inception_template
from dmd_jax.storage.files import file_sha256, local_path
from dmd_jax.storage.judge_weights import INCEPTION, check_free, save_auxiliary
from dmd_jax.storage.strict import check_floating, check_names_and_shapes

# The published file bears the beginning of its SHA-256 in its name.
PUBLISHED_NAME = "pt_inception-2015-12-05-6726825d.pth"
PUBLISHED_SHA256 = "6726825d"
_EPSILON = 1e-3  # of the batch norms
_NORM = ("weight", "bias", "running_mean", "running_var")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=local_path, metavar="SRC.pth", help=f"{PUBLISHED_NAME}")
    parser.add_argument("out", type=local_path, metavar="OUT.safetensors", help="the file to write")
    parser.add_argument(
        "--accept-other",
        action="store_true",
        help="convert another file than the published one; every result then says so",
    )


def run(args: argparse.Namespace) -> None:
    check_free(args.out)
    state_dict = load_state_dict(args.source)
    params = params_from_state_dict(state_dict, str(args.source))
    sha256 = file_sha256(args.source)
    recognised = sha256.startswith(PUBLISHED_SHA256)
    if not recognised and not args.accept_other:
        raise UserError(
            f"{args.source} has SHA-256 {sha256[:8]}...; expected {PUBLISHED_SHA256}..., the "
            f"published {PUBLISHED_NAME}: distances in other features compare with nobody's "
            "(--accept-other converts it all the same)"
        )
    save_auxiliary(
        args.out,
        INCEPTION,
        params,
        source=args.source.name,
        source_sha256=sha256,
        recognised=recognised,
    )
    kind = "the published weights" if recognised else "NOT the published weights"
    print(f"{args.out}: the Inception of the Fréchet distance, {kind}")


def params_from_state_dict(state_dict: Mapping[str, np.ndarray], where: str) -> dict[str, Any]:
    """The parameters from pytorch-fid's state dict, its batch norms folded into the convolutions.

    Left out are fc.bias, which the Inception Score's logits go without, and counts of batches
    that a training saw.

    Args:
      state_dict: "Conv2d_1a_3x3.conv.weight" [out, in, H, W], "Conv2d_1a_3x3.bn.weight" [out] and
        so on. where: the file, for messages.

    Returns:
      Parameters of the shapes of `inception_template`; the folding is done in float64.

    Raises:
      UserError: arrays of other names or shapes, all listed; no floating point; values that are
        not finite; a variance that is negative.
    """
    state_dict = {
        key: array for key, array in state_dict.items() if not key.endswith(".num_batches_tracked")
    }
    template = flax.traverse_util.flatten_dict(inception_template())
    kernels = {path[:-1]: leaf.shape for path, leaf in template.items() if path[-1] == "kernel"}
    del kernels["fc",]
    expected = {"fc.weight": (CLASSES, FEATURES), "fc.bias": (CLASSES,)}
    for path, (height, width, inputs, outputs) in kernels.items():
        key = ".".join(path)
        expected[f"{key}.conv.weight"] = (outputs, inputs, height, width)
        expected |= {f"{key}.bn.{name}": (outputs,) for name in _NORM}
    shapes = {key: array.shape for key, array in state_dict.items()}
    check_names_and_shapes(shapes, expected, f"{where} is not pytorch-fid's Inception")
    check_floating(state_dict, where)
    _check_values(state_dict, where)

    flat = {("fc", "kernel"): state_dict["fc.weight"].T}
    for path in kernels:
        key = ".".join(path)
        weight, bias, mean, variance = (
            state_dict[f"{key}.bn.{name}"].astype(np.float64) for name in _NORM
        )
        factor = weight / np.sqrt(variance + _EPSILON)
        flat[*path, "kernel"] = state_dict[f"{key}.conv.weight"].transpose(2, 3, 1, 0) * factor
        flat[*path, "bias"] = bias - mean * factor
    return flax.traverse_util.unflatten_dict(
        {path: np.ascontiguousarray(array, np.float32) for path, array in flat.items()}
    )


def _check_values(state_dict: Mapping[str, np.ndarray], where: str) -> None:
    for key, array in state_dict.items():
        if not np.all(np.isfinite(array)):
            raise UserError(f"{where}: {key} holds values that are not finite; expected numbers")
        if key.endswith("running_var") and np.any(array < 0):
            raise UserError(f"{where}: {key} holds a negative variance; expected none")
