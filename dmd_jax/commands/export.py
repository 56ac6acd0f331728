"""`dmd-jax export diffusers`: a generator's UNet as PyTorch diffusers loads it.

The folder holds `unet/` and `scheduler/`. The scheduler's steps are the generator's: one at
t = 999, the last of the noise levels, straight to the clean latents; or several, with noise added
between them.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax.convert.diffusers_config import KINDS
from dmd_jax.convert.meter import Meter
from dmd_jax.convert.part_weights import DIFFUSERS
from dmd_jax.convert.torch_layout import to_torch, torch_key, torch_shape
from dmd_jax.convert.whole_folder import check_free, resolved, whole_folder
from dmd_jax.errors import UserError
from dmd_jax.models import complete
from dmd_jax.models.stable_diffusion.unet2d_condition import UNet2DConditionModel
from dmd_jax.storage.files import local_path, path_of, write_json
from dmd_jax.storage.safetensors_stream import write_safetensors
from dmd_jax.storage.weights import load_weights

_NETWORK, _CLASS = "unet2d_condition", "UNet2DConditionModel"
_FORMAT = {"format": "pt"}  # by which PyTorch's readers know whose layout it is
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    summary = "the UNet and the scheduler of its steps, as diffusers loads them"
    diffusers = kinds.add_parser("diffusers", help=summary, description=summary)
    diffusers.add_argument(
        "checkpoint", type=path_of, metavar="CHECKPOINT", help="a weights folder or a run's workdir"
    )
    diffusers.add_argument("out", type=local_path, metavar="OUT_FOLDER", help="the folder to make")
    diffusers.add_argument(
        "--dtype", choices=list(_DTYPES), default="float32", help="of the file (default: float32)"
    )


def run(args: argparse.Namespace) -> None:
    out = resolved(args.out)
    check_free(out)
    weights = load_weights(args.checkpoint)
    network = complete(weights.network)
    if network["name"] != _NETWORK:
        raise UserError(
            f"{args.checkpoint} holds network {network['name']}; expected {_NETWORK}, the only one "
            "that diffusers has"
        )
    flat = flax.traverse_util.flatten_dict(weights.params, sep="/")
    with whole_folder(out) as folder:
        write_unet(folder / "unet", network, flat, dtype=args.dtype)
        scheduler = scheduler_config(network, int(weights.generator.get("num_steps", 1)))
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    count = sum(leaf.size for leaf in flat.values())
    print(f"export: {_CLASS}, {count:,} parameters in {args.out}")


def write_unet(
    folder: Path, network: dict[str, Any], flat: dict[str, np.ndarray], *, dtype: str = "float32"
) -> None:
    """Writes config.json and the weights under diffusers' names.

    Args:
      network: complete (see models.complete). flat: its parameters by their paths, "a/b/c".
      dtype: of the file, "float32", "float16" or "bfloat16".

    Raises:
      UserError: a parameter that `dtype` cannot hold. OSError: the folder cannot be written.
    """
    paths = {torch_key(path): path for path in flat}
    layout = {
        key: jax.ShapeDtypeStruct(torch_shape(path, flat[path].shape), _DTYPES[dtype])
        for key, path in paths.items()
    }

    def array_of(key: str) -> np.ndarray:
        with np.errstate(over="ignore"):  # refused below
            array = to_torch(paths[key], flat[paths[key]]).astype(_DTYPES[dtype])
        if not np.isfinite(array).all():
            raise UserError(f"{key} has values that {dtype} cannot hold; expected finite ones")
        return array

    meter = Meter(sum(leaf.size for leaf in flat.values()), name="export")
    write_safetensors(
        folder / f"{DIFFUSERS}.safetensors", layout, meter.watching(array_of), metadata=_FORMAT
    )
    write_json(folder / "config.json", unet_config(network))


def unet_config(network: dict[str, Any]) -> dict[str, Any]:
    """The config.json of diffusers' class for a complete network "unet2d_condition"."""
    fields = [field.name for field in dataclasses.fields(UNet2DConditionModel)]
    options = {key: value for key, value in network.items() if key in fields and key != "name"}
    return {"_class_name": _CLASS} | options | KINDS[_CLASS].neutral


def scheduler_config(network: dict[str, Any], num_steps: int = 1) -> dict[str, Any]:
    """The scheduler_config.json of a generator.

    Of one step it is DDIM with "trailing" timesteps: num_inference_steps=1 is t = 999, and with
    set_alpha_to_one the step ends at the clean latents. Of several it is diffusers' LCMScheduler,
    which noises x0 to the next level as `samplers.few_step` does: with original_inference_steps
    and num_inference_steps=4 its levels are 999, 749, 499 and 249, where its own boundary changes
    x0 by less than 1e-6 of itself.

    Args:
      network: complete. num_steps: of the generator.
    """
    if num_steps > 1:
        kind = {"_class_name": "LCMScheduler", "original_inference_steps": num_steps}
    else:
        kind = {"_class_name": "DDIMScheduler"}
    return kind | {
        "num_train_timesteps": network["num_train_timesteps"],
        "beta_start": network["beta_start"],
        "beta_end": network["beta_end"],
        "beta_schedule": "scaled_linear",
        "trained_betas": None,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 1,  # without bearing on these timesteps; the pipeline warns of any other
        "prediction_type": network["prediction_type"],
        "thresholding": False,
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": False,
    }
