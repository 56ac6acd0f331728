"""Evaluation protocols: the conventions that figures must share before they compare.

Two FIDs of the same images differ by how these are resized for Inception and become bytes, and by
which labels the samples have; two CLIP scores by what stands before the captions. A protocol sets
all of these together, and flags of their own override one each, which the results then say.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from dmd_jax.evaluation.features import PREPROCESSING
from dmd_jax.models.judges.inception import PREPROCESSINGS
from dmd_jax.reporting.pictures import BYTE_RULES

PREFIX = "A photo depicts "  # of CLIP scores (arXiv 2104.08718)
LABELS = ("uniform", "balanced")


class Conventions(NamedTuple):
    """What a protocol sets."""

    preprocessing: str  # of Inception: see models.judges.inception.preprocess
    bytes: str  # of pictures.BYTE_RULES
    labels: str  # of classes: "uniform", drawn; "balanced", that of image i is i modulo the classes
    clip_prefix: str  # before each caption, where images are scored against these


# "pytorch-fid" is what is measured where no protocol is asked for.
DEFAULT = "pytorch-fid"
PROTOCOLS = {
    DEFAULT: Conventions(PREPROCESSING, "edm", "uniform", ""),
    # arXiv 2206.00364, as released: NVIDIA's detector, which resizes as TensorFlow 1 did.
    "edm": Conventions("tensorflow", "edm", "uniform", ""),
    # arXiv 2405.14867, as released, for images of classes: the same detector.
    "dmd2": Conventions("tensorflow", "dmd2", "balanced", PREFIX),
    # The same, for COCO's captions: clean-fid (arXiv 2104.11222).
    "clean-fid": Conventions("clean", "dmd2", "uniform", PREFIX),
}
_FLAGS = {
    "preprocessing": "--inception-preprocessing",
    "bytes": "--bytes",
    "labels": "--labels",
    "clip_prefix": "--clip-prefix",
}


class Protocol(NamedTuple):
    """What an evaluation follows.

    Attributes:
      name: one of PROTOCOLS.
      conventions: the protocol's, but for those that are overridden.
      overridden: names of these, in their order.
    """

    name: str
    conventions: Conventions
    overridden: tuple[str, ...]

    def __str__(self) -> str:
        changed = ", ".join(
            f"{_FLAGS[name]} {getattr(self.conventions, name)!r}" for name in self.overridden
        )
        return f"{self.name} but for {changed}" if changed else self.name

    def results(self, *, captions: bool) -> dict[str, Any]:
        """JSON-able: the name, its conventions, and which of these are not the protocol's own.

        Args:
          captions: the images are of captions, which have no labels; others have no prefix.
        """
        conventions = self.conventions._asdict()
        del conventions["labels" if captions else "clip_prefix"]
        return {"name": self.name, **conventions, "overridden": list(self.overridden)}


def add_protocol_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "protocol", "what must be equal before two figures compare; all of it is in the results"
    )
    group.add_argument(
        "--protocol",
        choices=tuple(PROTOCOLS),
        help="sets the following four together, and --features inception where none are given: "
        "edm where EDM's or EDM2's statistics are the reference; dmd2, of the DMD2 authors' code "
        f"for ImageNet; clean-fid, of their code for COCO (default: {DEFAULT})",
    )
    group.add_argument(
        _FLAGS["preprocessing"],
        choices=tuple(PREPROCESSINGS),
        help="how images reach inception: pytorch_fid; tensorflow, NVIDIA's detector; clean, PIL's "
        "bicubic",
    )
    group.add_argument(
        _FLAGS["bytes"],
        choices=tuple(BYTE_RULES),
        help="that networks see of images x in [-1, 1], truncated: edm 127.5 x + 128, dmd2 "
        "127.5 (x + 1)",
    )
    group.add_argument(
        _FLAGS["labels"],
        choices=LABELS,
        help="of samples of classes: uniform, each drawn; balanced, the classes in turn",
    )
    group.add_argument(
        _FLAGS["clip_prefix"],
        metavar="TEXT",
        help=f"before each caption for --clip: {PREFIX!r} in dmd2 and clean-fid, else nothing",
    )


def protocol_of(args: argparse.Namespace) -> Protocol:
    """The protocol that the arguments ask for, or the default, with what their flags override."""
    name = args.protocol or DEFAULT
    own = PROTOCOLS[name]
    given = {
        "preprocessing": args.inception_preprocessing,
        "bytes": args.bytes,
        "labels": args.labels,
        "clip_prefix": args.clip_prefix,
    }
    conventions = own._replace(**{k: value for k, value in given.items() if value is not None})
    overridden = tuple(
        field for field in own._fields if getattr(conventions, field) != getattr(own, field)
    )
    return Protocol(name, conventions, overridden)
