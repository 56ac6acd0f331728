"""The CLIP score: how near images are to the texts that they were made of (arXiv 2104.08718)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from dmd_jax.evaluation.clip_folder import Preparation, load_clip
from dmd_jax.evaluation.features import on_devices
from dmd_jax.method.types import Params
from dmd_jax.models import build_network
from dmd_jax.models.clip.text import check_tokens
from dmd_jax.storage.weights import Weights


class ClipScore:
    """Compares images with texts, in float32 on this process's devices.

    The text tower is on the devices only while `features_of_texts` runs, the vision tower from the
    first `cosines` on: of ViT-bigG/14 2.8 GB and 7.4 GB on each.

    Args:
      folder: of `dmd-jax convert clip`.

    Attributes:
      origin: name and SHA-256 of what the folder was converted from.

    Raises:
      UserError: as load_clip.
    """

    def __init__(self, folder: str | Path):
        self._clip = load_clip(folder)
        self.origin: dict[str, Any] = dict(self._clip.vision.source)

    def tokens(self, texts: Sequence[str]) -> np.ndarray:
        """Of CLIP's own tokenizer, int32 [N, L]; what is too long is cut.

        Raises:
          UserError: a text that is no valid Unicode, or a token that the text tower does not know.
        """
        tokens = self._clip.tokenizer.encode(texts)
        check_tokens(tokens, self._clip.text.network["vocab_size"])
        return tokens

    def features_of_texts(self, tokens: np.ndarray) -> np.ndarray:
        """The text tower's features, float32 [N, D], of tokens [N, L]."""
        return _features(self._clip.text)(tokens)

    def cosines(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """The cosine of each image's features and its text's.

        Args:
          images: uint8 [N, H, W, 3]. texts: features_of_texts, [N, D].

        Returns:
          float64 [N].
        """
        features = self._features_of_images(prepare(images, self._clip.preparation))
        return np.sum(_unit(features) * _unit(texts), axis=1)

    @functools.cached_property
    def _features_of_images(self) -> Callable[[np.ndarray], np.ndarray]:
        return _features(self._clip.vision)


def prepare(images: np.ndarray, preparation: Preparation) -> np.ndarray:
    """Images as CLIP's own image processor makes them for the vision tower.

    PIL resizes bytes to bytes, bicubic and antialiased, until the shorter edge has its pixels; the
    middle is cut out; bytes become [0, 1], less the mean, over the standard deviation.

    Args:
      images: uint8 [N, H, W, 3].

    Returns:
      float32 [N, crop_size, crop_size, 3].
    """
    height, width = images.shape[1:3]
    edge, crop = preparation.shortest_edge, preparation.crop_size
    size = (edge * height // min(height, width), edge * width // min(height, width))
    images = resized(images, size, Image.Resampling.BICUBIC)
    top, left = ((side - crop) // 2 for side in size)
    images = images[:, top : top + crop, left : left + crop]
    mean, std = (np.array(x, np.float32) for x in (preparation.mean, preparation.std))
    return (images.astype(np.float32) / 255 - mean) / std


def resized(images: np.ndarray, size: tuple[int, int], resampling: Image.Resampling) -> np.ndarray:
    """Images uint8 [N, H, W, 3] as PIL resizes each to (height, width)."""
    height, width = size
    return np.stack(
        [np.asarray(Image.fromarray(image).resize((width, height), resampling)) for image in images]
    )


def score(cosines: np.ndarray) -> dict[str, float]:
    """Means over images.

    Returns:
      "cosine": of the cosines, as papers on distillation give it (0.3 and the like); "clip_score":
      of 100 max(cosine, 0), as the score is defined in torchmetrics and others.
    """
    return {
        "cosine": float(cosines.mean()),
        "clip_score": float(100 * np.maximum(cosines, 0).mean()),
    }


def _features(tower: Weights) -> Callable[[np.ndarray], np.ndarray]:
    """What a tower on the devices makes of its inputs [N, …]: [N, D]."""
    module = build_network(tower.network)

    def projected(params: Params, inputs: jax.Array) -> jax.Array:
        return module.apply({"params": params}, inputs).projected

    return on_devices(projected, tower.params)


def _unit(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float64)
    return features / np.linalg.norm(features, axis=1, keepdims=True)
