"""`dmd-jax convert KIND`: the weights of other projects in, read with NumPy and never executed."""

from __future__ import annotations

import argparse
import importlib

from dmd_jax.errors import UserError

KINDS = {
    "clip": "a CLIP of transformers, for the CLIP score, into a folder of its two towers",
    "diffusers": "a Stable Diffusion folder of diffusers, into a text-to-image weights folder",
    "edm": "EDM's networks, from the released .pkl or a state dict, into a weights folder",
    "lpips": "LPIPS with VGG16, into one .safetensors",
    "inception": "the Inception of the Fréchet distance, into one .safetensors",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for kind, summary in KINDS.items():
        # A kind's module is imported when its arguments are, so that the others are not.
        importlib.import_module(f"dmd_jax.convert.{kind}").add_arguments(
            kinds.add_parser(kind, help=summary, description=summary)
        )


def run(args: argparse.Namespace) -> None:
    if args.overrides and getattr(args, "config", None) is None:
        raise UserError(f"unexpected argument {args.overrides[0]!r}; see dmd-jax convert --help")
    importlib.import_module(f"dmd_jax.convert.{args.kind}").run(args)
