"""Images of a model to judge, by index."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from PIL import Image

from dmd_jax.data.sources import bytes_to_float
from dmd_jax.errors import UserError
from dmd_jax.evaluation.clip_score import ClipScore, resized
from dmd_jax.evaluation.features import ToBytes
from dmd_jax.reporting.pictures import to_uint8
from dmd_jax.sampling.draws import draw_latents
from dmd_jax.sampling.maker import ImageMaker
from dmd_jax.teachers.teacher import Tokens


class Samples:
    """A model's images; each is a function of the seed and its index.

    Args:
      tokens: (start, stop) -> the tokens of the images start..stop-1.
      kept: by which names tokens are kept where images are.
      bytes_rule: of pictures.BYTE_RULES.
      resize: pixels of a side that images are resized to before they are judged, Lanczos in PIL on
        bytes; 0 leaves them as they are, but for becoming bytes; None judges them as they are.
      clip: what scores them, if anything does; clip_tokens: of all their texts, as CLIP has them.

    Attributes:
      sample_shape: (H, W, C) of one image as it is judged.
      to_bytes: of judged images, for features that see bytes.

    Raises:
      UserError: images to resize that are no squares, or are smaller than `resize`.
    """

    def __init__(
        self,
        maker: ImageMaker,
        tokens: Callable[[int, int], Tokens],
        *,
        seed: int,
        kept: Mapping[str, str],
        bytes_rule: str = "edm",
        resize: int | None = None,
        clip: ClipScore | None = None,
        clip_tokens: np.ndarray | None = None,
    ):
        self.kept = kept
        self._maker, self._tokens, self._seed = maker, tokens, seed
        self._clip, self._clip_tokens = clip, clip_tokens
        self._bytes_rule, self._resize = bytes_rule, resize
        self.sample_shape = maker.image_shape
        self.to_bytes: ToBytes = functools.partial(to_uint8, rule=bytes_rule)
        if resize is not None:
            self.to_bytes = to_uint8  # what is judged was bytes already
            height, width, channels = maker.image_shape
            if height != width:
                raise UserError(f"images of {height}x{width}; expected squares, as references are")
            if resize > height:
                raise UserError(f"--resize {resize}; expected at most {height}, the images' size")
            side = resize or height
            self.sample_shape = (side, side, channels)

    def warm_up(self) -> None:
        """Compiles what makes images, and prepares what scores them; before any is made."""
        if self._clip is not None:  # first, as the text tower leaves the devices again
            self._texts = self._clip.features_of_texts(self._clip_tokens)
        z = np.zeros((1, *self._maker.sample_shape), np.float32)
        self._maker(z, self._tokens(0, 1))

    def inputs(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """What the images start..stop-1 are made of: "z" and their tokens."""
        z = draw_latents(self._seed, start, stop, self._maker.sample_shape)
        return {"z": z, **self._tokens(start, stop)}

    def images(self, inputs: dict[str, np.ndarray], start: int) -> Iterator[np.ndarray]:
        """The images of `inputs`, float32 [n, …], batch by batch; `start` is the first's index."""
        tokens = {name: array for name, array in inputs.items() if name != "z"}
        return self._maker.batches(inputs["z"], tokens, seed=self._seed, first=start)

    def judged(self, images: np.ndarray) -> np.ndarray:
        """Images [N, *sample_shape], float32 in [-1, 1] or about, of those that were made."""
        if self._resize is None:
            return images
        pixels = to_uint8(images, self._bytes_rule)
        size = self.sample_shape[:2]
        if size != pixels.shape[1:3]:
            pixels = resized(pixels, size, Image.Resampling.LANCZOS)
        return bytes_to_float(pixels)

    def scores(self, images: np.ndarray, start: int) -> dict[str, np.ndarray]:
        """Figures of each of these judged images, [N, …], besides their features; may be none."""
        if self._clip is None:
            return {}
        texts = self._texts[start : start + len(images)]
        return {"cosine": self._clip.cosines(to_uint8(images), texts)}

    def let_go(self) -> None:
        """Frees the devices of what makes and scores images."""
        self._maker = self._clip = None
