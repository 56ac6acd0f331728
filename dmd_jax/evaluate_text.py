"""`dmd-jax evaluate --coco` where images are made of text: prompts, CLIP score, latency."""

from __future__ import annotations

import argparse
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from dmd_jax.arguments import make_latents, refuse
from dmd_jax.data.sources import bytes_to_float
from dmd_jax.errors import UserError
from dmd_jax.evaluation.clip_score import ClipScore, resized, score
from dmd_jax.evaluation.coco import read_captions
from dmd_jax.evaluation.collect import Counter, Subject
from dmd_jax.evaluation.latency import WARM_UP, latency
from dmd_jax.evaluation.parts import Rows
from dmd_jax.evaluation.protocols import Conventions
from dmd_jax.files import local_path
from dmd_jax.generation import draw_latents
from dmd_jax.models import complete
from dmd_jax.models.clip_text import check_tokens
from dmd_jax.pictures import to_uint8
from dmd_jax.sample_text import encode, image_settings
from dmd_jax.text_to_image import LatentMaker, Pipeline

RESIZE = 256  # pixels; of Stable Diffusion's 512, in the published evaluations
CAPTION_OPTIONS = ("coco", "clip", "clip_prefix", "resize", "latency")


def add_caption_arguments(parser: argparse.ArgumentParser) -> None:
    """What the evaluation of text-to-image weights takes besides."""
    group = parser.add_argument_group("images of text, judged as those of COCO's captions")
    group.add_argument(
        "--coco",
        type=local_path,
        metavar="CAPTIONS",
        help="COCO's captions .json, of which one an image is taken, or a .txt of a caption a "
        "line; --num of them, evenly spread",
    )
    group.add_argument(
        "--clip",
        type=local_path,
        metavar="DIR",
        help="of `dmd-jax convert clip`: adds the CLIP score; its vision tower, 7.4 GB of bigG, is "
        "on each device beside what makes images",
    )
    group.add_argument(
        "--resize",
        type=int,
        metavar="R",
        help="pixels of a side that images have when they are judged, Lanczos in PIL; 0 leaves "
        f"them (default: {RESIZE})",
    )
    group.add_argument(
        "--latency",
        type=int,
        metavar="N",
        help="adds the latency of one image, from text to pixels on one device, of N images",
    )


class CaptionedSamples:
    """Images of captions, an image each; see evaluation.collect.Samples.

    Args:
      tokens: of the captions, [N, L], as the pipeline has them.
      resize: pixels of a side that images are resized to before they are judged, Lanczos in PIL on
        bytes; 0 leaves them as they are, but for becoming bytes.
      clip: what scores them; clip_tokens: of the captions, as CLIP has them.
      bytes_rule: of pictures.BYTE_RULES.

    Raises:
      UserError: images that are no squares, or are smaller than `resize`.
    """

    kept = ("tokens",)
    to_bytes = staticmethod(to_uint8)  # what is judged was bytes already

    def __init__(
        self,
        maker: LatentMaker,
        tokens: np.ndarray,
        *,
        seed: int,
        resize: int,
        clip: ClipScore | None,
        clip_tokens: np.ndarray | None,
        bytes_rule: str = "edm",
    ):
        height, width, channels = maker.image_shape
        if height != width:
            raise UserError(f"images of {height}x{width}; expected squares, as references are")
        if resize > height:
            raise UserError(f"--resize {resize}; expected at most {height}, the images' size")
        side = resize or height
        self.sample_shape = (side, side, channels)
        self._maker, self._tokens, self._seed = maker, tokens, seed
        self._clip, self._clip_tokens = clip, clip_tokens
        self._bytes_rule = bytes_rule

    def warm_up(self) -> None:
        z = np.zeros((1, *self._maker.latent_shape), np.float32)
        if self._clip is not None:  # first, as the text tower leaves the devices again
            self._texts = self._clip.features_of_texts(self._clip_tokens)
        self._maker.decode(self._maker(z, self._tokens[:1]))

    def inputs(self, start: int, stop: int) -> dict[str, np.ndarray]:
        z = draw_latents(self._seed, start, stop, self._maker.latent_shape)
        return {"z": z, "tokens": self._tokens[start:stop]}

    def images(self, inputs: dict[str, np.ndarray], start: int) -> Iterator[np.ndarray]:
        for latents in self._maker.batches(inputs["z"], inputs["tokens"]):
            yield self._maker.decode(latents)

    def judged(self, images: np.ndarray) -> np.ndarray:
        pixels = to_uint8(images, self._bytes_rule)
        size = self.sample_shape[:2]
        if size != pixels.shape[1:3]:
            pixels = resized(pixels, size, Image.Resampling.LANCZOS)
        return bytes_to_float(pixels)

    def scores(self, images: np.ndarray, start: int) -> dict[str, np.ndarray]:
        if self._clip is None:
            return {}
        texts = self._texts[start : start + len(images)]
        return {"cosine": self._clip.cosines(to_uint8(images), texts)}

    def let_go(self) -> None:
        """Frees the devices of what makes and scores images."""
        self._maker = self._clip = None


def captioned(args: argparse.Namespace, conventions: Conventions) -> Subject:
    """The samples that --coco asks for. Defaults are filled in in `args`.

    Args:
      conventions: of the protocol; that of labels does not matter here.

    Raises:
      UserError: an argument that is impossible, or a part that is not what it should be.
    """
    refuse(args, ["labels"], f"{args.weights} are text-to-image weights")
    if args.clip is None:
        refuse(args, ["clip_prefix"], "there is no --clip")
    args.resize = RESIZE if args.resize is None else args.resize
    if args.resize < 0:
        raise UserError(f"--resize {args.resize}; expected pixels, or 0")
    if args.latency is not None and args.latency < 1:
        raise UserError(f"--latency {args.latency}; expected at least 1 image")
    captions = read_captions(args.coco, args.num)
    clip = None if args.clip is None else ClipScore(args.clip)
    prefix = conventions.clip_prefix
    clip_tokens = None if clip is None else clip.tokens([prefix + text for text in captions])
    maker, pipeline = make_latents(args)
    tokens = encode(pipeline.tokenizer, captions)
    check_tokens(tokens, complete(pipeline.text_encoder.network)["vocab_size"])
    samples = CaptionedSamples(
        maker,
        tokens,
        seed=args.seed,
        resize=args.resize,
        clip=clip,
        clip_tokens=clip_tokens,
        bytes_rule=conventions.bytes,
    )
    origin = None if clip is None else clip.origin
    captions_sha256 = hashlib.sha256("\0".join(captions).encode()).hexdigest()
    settings = image_settings(args, pipeline, maker, None, tokens) | {
        "network": complete(pipeline.unet.network),
        "batch_size": args.batch_size,
        "resize": args.resize,
        "captions_sha256": captions_sha256,
        "bytes": conventions.bytes,
        "clip": None if origin is None else origin["sha256"],
        "clip_prefix": None if origin is None else prefix,
    }
    results = {
        "captions": {"file": str(args.coco), "sha256": captions_sha256},
        "guidance": args.guidance,
        "decoder": args.decoder,
        "image_shape": list(maker.image_shape),
        "resize": args.resize,
    }

    measure_latency = None
    if args.latency is not None:
        shape = maker.latent_shape
        measure_latency = functools.partial(_latency, args, pipeline, captions, shape)

    def figures(rows: Rows) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if origin is not None:
            cosines = np.concatenate([part for (part,) in rows.read("cosine")])
            found["clip"] = score(cosines) | {"prefix": prefix, "origin": origin}
        if measure_latency is not None:
            samples.let_go()
            found["latency"] = measure_latency()
        return found

    return Subject(samples, settings, results, pipeline.unet.description, figures)


def _latency(
    args: argparse.Namespace,
    pipeline: Pipeline,
    captions: Sequence[str],
    latent_shape: tuple[int, ...],
) -> dict[str, Any]:
    """From a caption to the bytes of its image on the host, one at a time on one device."""
    maker = LatentMaker(
        pipeline,
        sampler=args.sampler,
        num_steps=args.steps,
        guidance=args.guidance,
        batch_size=1,
        dtype=args.dtype,
        precision=args.matmul_precision,
        latent_shape=latent_shape,
        devices=jax.local_devices()[:1],
    )
    counter = Counter("latency")
    counter.start(0, WARM_UP + args.latency)

    def make(index: int) -> None:
        tokens = pipeline.tokenizer.encode([captions[index % len(captions)]])
        z = draw_latents(args.seed, index, index + 1, latent_shape)
        to_uint8(maker.decode(maker(z, tokens)))
        counter.add(1)

    return latency(make, args.latency)
