"""A CLIP on disk, as `dmd-jax convert clip` writes it: both towers, tokenizer, preparation.

The folder is that of the vision tower's weights; in it are `text_encoder/`, the text tower's
weights, `tokenizer/`, and `clip.json`: the Preparation, and "logit_scale", the logarithm of what
the cosines were multiplied by in training, which the score does without.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dmd_jax.errors import UserError, first_line
from dmd_jax.models import complete
from dmd_jax.storage.seals import read_sealed
from dmd_jax.storage.weights import Weights, load_weights
from dmd_jax.teachers.tokenizer import Tokenizer, load_tokenizer

CLIP_FILE, TEXT, TOKENIZER = "clip.json", "text_encoder", "tokenizer"
_LARGEST = 8192  # pixels of a side


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How bytes become what the vision tower sees. Raises UserError for impossible values.

    Attributes:
      shortest_edge: pixels, to which an image is resized, bicubic.
      crop_size: pixels of a side of the square that is then cut from the middle.
      mean, std: of red, green and blue in [0, 1], subtracted and divided by.
    """

    shortest_edge: int
    crop_size: int
    mean: Sequence[float]
    std: Sequence[float]

    def __post_init__(self):
        for name in ("crop_size", "shortest_edge"):
            size = getattr(self, name)
            if type(size) is not int or not 1 <= size <= _LARGEST:
                raise UserError(f"{name} is {size!r:.60}; expected 1 to {_LARGEST} pixels")
        if self.crop_size > self.shortest_edge:
            raise UserError(
                f"crop_size is {self.crop_size}; expected at most shortest_edge, "
                f"{self.shortest_edge}"
            )
        for name, least in (("mean", -math.inf), ("std", 0)):
            values = getattr(self, name)
            is_three = isinstance(values, (list, tuple)) and len(values) == 3
            if not is_three or not all(_is_number(value) and value > least for value in values):
                above = " above 0" if least == 0 else ""
                raise UserError(f"{name} is {values!r:.60}; expected three numbers{above}")


class Clip(NamedTuple):
    """What compares images with texts; parameters are on the host."""

    vision: Weights
    text: Weights
    tokenizer: Tokenizer
    preparation: Preparation


def load_clip(folder: str | Path) -> Clip:
    """Reads the folder.

    Raises:
      UserError: it is of another kind; a file is missing or damaged; the towers do not fit.
    """
    folder = Path(folder)
    if not (folder / CLIP_FILE).is_file():
        raise UserError(
            f"{folder} has no {CLIP_FILE} in it; expected a folder that `dmd-jax convert clip` "
            "wrote"
        )
    preparation = _load_preparation(folder / CLIP_FILE)
    vision, text = _load(folder, "clip_vision"), _load(folder / TEXT, "clip_text")
    seen, read = vision.network, text.network
    if not read["with_projection"] or read["projection_dim"] != seen["projection_dim"]:
        raise UserError(
            f"{folder / TEXT} makes no features of {seen['projection_dim']} numbers; expected "
            f"those that belong to {folder}"
        )
    if preparation.crop_size != seen["image_size"]:
        raise UserError(
            f"{folder / CLIP_FILE}: crop_size is {preparation.crop_size}; expected "
            f"{seen['image_size']}, the vision tower's image_size"
        )
    tokenizer = load_tokenizer(folder / TOKENIZER)
    if tokenizer.max_length > read["max_position_embeddings"]:
        raise UserError(
            f"{folder / TOKENIZER} makes {tokenizer.max_length} tokens; expected at most "
            f"{read['max_position_embeddings']}, the text tower's max_position_embeddings"
        )
    return Clip(vision, text, tokenizer, preparation)


def _load(folder: Path, name: str) -> Weights:
    weights = load_weights(folder)
    network = complete(weights.network)
    if network["name"] != name:
        raise UserError(f"{folder} is of network {network['name']}; expected {name}")
    if not weights.source:
        raise UserError(f"{folder} has no source; expected what `dmd-jax convert clip` wrote")
    return weights._replace(network=network)


def _load_preparation(path: Path) -> Preparation:
    content, _ = read_sealed(path, "what `dmd-jax convert clip` wrote")
    try:
        return Preparation(
            **{field.name: content[field.name] for field in dataclasses.fields(Preparation)}
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} holds no sizes, mean and std; expected those") from error
    except (ValueError, UserError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
