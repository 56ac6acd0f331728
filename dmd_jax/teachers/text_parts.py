"""The parts of a text-to-image folder that are not its UNet, and where they are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dmd_jax.errors import UserError
from dmd_jax.method.discrete_samplers import SPACINGS
from dmd_jax.storage.files import path_of
from dmd_jax.storage.seals import read_sealed
from dmd_jax.storage.weights import Weights, load_weights

DECODERS = ("vae", "taesd")
_AUTOENCODERS = ("autoencoder_kl", "autoencoder_tiny")
_SCHEDULER = "scheduler.json"


def parts_folder(folder: str | Path, parts: str | Path | None = None) -> Path:
    """The folder that has the text encoder, the decoders and the tokenizer for a UNet.

    That is `parts` if given; else `folder` if it has them; else those of the teacher of the run
    that `folder` is the workdir of, or the weights in the workdir.

    Raises:
      UserError: there is none.
    """
    if parts is not None:
        if not _has_parts(path_of(parts)):
            raise UserError(
                f"--parts {parts} has no text_encoder folder in it; expected a folder that "
                "`dmd-jax convert diffusers` wrote"
            )
        return path_of(parts)
    place, seen = path_of(folder), []
    while not _has_parts(place):
        seen.append(place)
        teacher = _teacher_of(place) or _teacher_of(place.resolve().parent)
        if teacher is None or teacher in seen:
            raise UserError(
                f"{place} has no text_encoder folder in it and is no run with a teacher that has; "
                "expected --parts DIR, a folder that `dmd-jax convert diffusers` wrote"
            )
        place = teacher
    return place


def load_text_encoder(parts: str | Path) -> Weights:
    """The text encoder of a folder of parts.

    Raises:
      UserError: as load_weights, or another network.
    """
    return _load(path_of(parts) / "text_encoder", ("clip_text",))


def load_decoder(parts: str | Path, name: str) -> Weights:
    """The autoencoder of a folder of parts.

    Args:
      name: "vae"; or "taesd", the small one, be it in the folder taesd/ or in vae/ itself.

    Raises:
      UserError: as load_weights; another name or network; or no small one.
    """
    parts = path_of(parts)
    if name not in DECODERS:
        raise UserError(f"decoder {name!r}; expected one of {', '.join(DECODERS)}")
    if name == "taesd" and (parts / "taesd").is_dir():
        return _load(parts / "taesd", ("autoencoder_tiny",))
    found = _load(parts / "vae", _AUTOENCODERS)
    if name == "taesd" and found.network["name"] != "autoencoder_tiny":
        raise UserError(
            f"{parts} has no taesd folder in it; expected one, see "
            "`dmd-jax convert diffusers --taesd`"
        )
    return found


def load_sampling(parts: str | Path) -> dict[str, Any]:
    """What the folder's scheduler.json says of sampling.

    Raises:
      UserError: the file is missing or damaged, or has a value that is none.
    """
    path = path_of(parts) / _SCHEDULER
    sampling, _ = read_sealed(path, "what `dmd-jax convert diffusers` wrote of sampling")
    for key, expected, fits in (
        ("timestep_spacing", f"one of {', '.join(SPACINGS)}", SPACINGS.__contains__),
        ("steps_offset", "a whole number", lambda value: type(value) is int),
        ("set_alpha_to_one", "true or false", lambda value: isinstance(value, bool)),
    ):
        if not fits(value := sampling.get(key)):
            raise UserError(f"{path}: {key} is {value!r}; expected {expected}")
    return sampling


def _has_parts(folder: Path) -> bool:
    return (folder / "text_encoder").is_dir()


def _teacher_of(folder: Path) -> Path | None:
    """The teacher of the run whose workdir `folder` is; None if it is none."""
    try:
        content, _ = read_sealed(folder / "config.json", "a run's config")
        weights = content["config"]["teacher"]["weights"]
    except (UserError, KeyError, TypeError):
        return None
    return path_of(weights) if weights and isinstance(weights, str) else None


def _load(folder: Path, names: tuple[str, ...]) -> Weights:
    weights = load_weights(folder)
    if weights.network.get("name") not in names:
        raise UserError(
            f"{folder} is of network {weights.network.get('name')!r}; expected {' or '.join(names)}"
        )
    return weights
