"""The files of `dmd-jax sample`: latents in; a grid or an array of images out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dmd_jax.errors import UserError, first_line
from dmd_jax.reporting.pictures import grid, save_png, to_uint8, viewing_scale
from dmd_jax.storage.files import replacing
from dmd_jax.storage.untrusted import read_npy


def read_latents(path: Path, sample_shape: Sequence[int | str], num: int | None) -> np.ndarray:
    """The first `num` latents of an .npy file, float32.

    Args:
      sample_shape: of one; a name stands for a size that is free.

    Raises:
      UserError: the file cannot be read, or its shape, type or values are not a latent's.
    """
    latents = f"float [N, {', '.join(map(str, sample_shape))}]"
    try:
        z = read_npy(path, latents)
    except UserError as error:
        raise UserError(f"--latents {error}") from error
    expected = f"expected {latents}"
    fits = (
        z.ndim == 1 + len(sample_shape)
        and z.size
        and all(ours in (size, str(ours)) for size, ours in zip(z.shape[1:], sample_shape))
    )
    if not fits:
        raise UserError(f"--latents {path} has shape {z.shape}; {expected}")
    if not np.issubdtype(z.dtype, np.floating):
        raise UserError(f"--latents {path} has type {z.dtype}; {expected}")
    if not np.isfinite(z).all():
        raise UserError(f"--latents {path} holds NaN or infinity; expected finite numbers")
    if num is not None and num > len(z):
        raise UserError(f"--latents {path} holds {len(z)} latents; expected --num {num} or more")
    return z[:num].astype(np.float32)


def write_images(path: Path, images: np.ndarray) -> None:
    """Writes images [N, H, W, C] as a .png grid, or as an .npy of float32.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        if path.suffix == ".npy":
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, images.astype(np.float32))
            return
        columns = int(np.ceil(np.sqrt(len(images))))
        save_png(path, grid(to_uint8(images), columns, viewing_scale(images.shape[1])))
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {first_line(error)}") from error
