"""`dmd-jax convert diffusers`: a Stable Diffusion folder into a text-to-image weights folder.

What it makes: the UNet as any other weights folder; beside its files `text_encoder/`, `vae/` and
perhaps `taesd/`, weights folders too; `tokenizer/`, the tokenizer's own files; and
`scheduler.json`, what a sampler needs besides the UNet's noise schedule.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dmd_jax.convert.diffusers_config import SCHEDULERS, schedule_from_config
from dmd_jax.convert.meter import Meter
from dmd_jax.convert.part import read_part
from dmd_jax.convert.part_weights import DIFFUSERS, TRANSFORMERS, has_weights, weight_patterns
from dmd_jax.convert.whole_folder import converted, copy_files, resolved, whole_folder
from dmd_jax.errors import UserError, first_line
from dmd_jax.storage.files import file_sha256, local_path
from dmd_jax.storage.given_folder import GivenFolder, find_folder
from dmd_jax.storage.safe_pickle import shown
from dmd_jax.storage.seals import write_sealed
from dmd_jax.storage.weights import Weights, save_leaves
from dmd_jax.teachers.tokenizer import read_files

_INDEX, _CONFIG = "model_index.json", "config.json"
_PIPELINE = "StableDiffusionPipeline"
# The networks of a pipeline: what classes they may be of, and what their files are called.
_NETWORKS = {
    "unet": (("UNet2DConditionModel",), DIFFUSERS),
    "vae": (("AutoencoderKL", "AutoencoderTiny"), DIFFUSERS),
    "text_encoder": (("CLIPTextModel", "CLIPTextModelWithProjection"), TRANSFORMERS),
}
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
_SCHEDULER = "scheduler/scheduler_config.json"
_SAMPLING = "scheduler.json"
# Of a pipeline's other parts, those that have no bearing on its images.
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="FOLDER|HUB_ID",
        help="a diffusers folder of Stable Diffusion 1.x or 2.x; or owner/name on the hub",
    )
    parser.add_argument(
        "out", type=local_path, metavar="OUT_DIR", help="the weights folder to make"
    )
    parser.add_argument(
        "--taesd",
        metavar="FOLDER|HUB_ID",
        help="an AutoencoderTiny, which decodes fast, to put beside the others",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the hub id")


def run(args: argparse.Namespace) -> None:
    folder = find_folder(
        args.source, revision=args.revision, patterns=_patterns(), more=_second_choice
    )
    index = _read_index(folder)
    network_options, scheduler = schedule_from_config(
        folder.json(_SCHEDULER), str(folder.file(_SCHEDULER))
    )
    parts = {
        part: read_part(
            folder / part, index[part], stem, network_options if part == "unet" else None
        )
        for part, (_, stem) in _NETWORKS.items()
    }
    tokenizer = tokenizer_files(folder / "tokenizer")
    files = [folder.file(_INDEX), folder.file(_SCHEDULER), *tokenizer]
    if args.taesd is not None:
        taesd = find_folder(
            args.taesd, revision=None, patterns=[_CONFIG, *weight_patterns(DIFFUSERS)], more=_none
        )
        parts["taesd"] = read_part(taesd, "AutoencoderTiny", DIFFUSERS)
    _check_widths({part: read.network for part, read in parts.items()})

    digests = {part: files_sha256(read.files) for part, read in parts.items()}
    sha256 = hashlib.sha256(" ".join([*digests.values(), files_sha256(files)]).encode()).hexdigest()
    out = resolved(args.out)
    others = [part for part in parts if part != "unet"]
    made_besides = [_SAMPLING, *(f"tokenizer/{path.name}" for path in tokenizer)]
    if converted(out, sha256, others, made_besides) is not None:
        print(f"convert: {args.out} holds {folder.name} already")
        return
    meter = Meter(sum(read.count for read in parts.values()))
    with whole_folder(out) as made:
        for part, read in parts.items():
            if part == "unet":
                place, source = made, {"file": folder.name, "sha256": sha256}
            else:
                given = taesd.name if part == "taesd" else f"{folder.name}/{part}"
                place, source = made / part, {"file": given, "sha256": digests[part]}
            description = f"{source['file']}, converted from diffusers"
            weights = Weights(read.network, read.layout, description, source)
            save_leaves(place, weights, meter.watching(read.leaf))
        copy_files(tokenizer, made / "tokenizer")
        write_sealed(made / _SAMPLING, scheduler)
    count = parts["unet"].count
    print(f"convert: unet2d_condition, {count:,} parameters, and {', '.join(others)} in {args.out}")


def _read_index(folder: GivenFolder) -> dict[str, str]:
    """The class of each part, by model_index.json.

    Raises:
      UserError: another pipeline than Stable Diffusion's, or a part that is missing, unknown or of
        a class that we have nothing for.
    """
    path, index = folder.file(_INDEX), folder.json(_INDEX)
    if index.get("_class_name") != _PIPELINE:
        found = shown(index.get("_class_name"))
        raise UserError(f"{path}: _class_name is {found}; expected {_PIPELINE}")
    expected = {part: classes for part, (classes, _) in _NETWORKS.items()}
    expected |= {"tokenizer": _TOKENIZERS, "scheduler": SCHEDULERS}
    found = {}
    for part, classes in expected.items():
        value = index.get(part)
        found[part] = value[1] if isinstance(value, list) and len(value) == 2 else None
        if not isinstance(found[part], str) or found[part] not in classes:
            has = "lacks" if part not in index else f"has {shown(found[part])} as"
            raise UserError(f"{path} {has} {part}; expected one of {', '.join(classes)}")
    for part, value in index.items():
        known = part.startswith("_") or part in expected or part in _LEFT_OUT
        if not known and value != [None, None]:
            raise UserError(f"{path} has a part {shown(part)}; {_PIPELINE} has none")
    return found


def tokenizer_files(folder: GivenFolder) -> list[Path]:
    """The files of a tokenizer. Raises a UserError as tokenizer.read_files does."""
    read_files(folder)
    return [folder.file(name) for name in TOKENIZER_FILES if folder.has(name)]


def _check_widths(networks: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses parts of different models, which do not fit together."""
    unet = networks["unet"]
    widths = [("text_encoder", "hidden_size", "cross_attention_dim")]
    widths += [
        (part, "latent_channels", side)
        for part in ("vae", "taesd")
        if part in networks
        for side in ("in_channels", "out_channels")
    ]
    for part, theirs, ours in widths:
        if networks[part][theirs] != unet[ours]:
            raise UserError(
                f"{part} has {theirs} {networks[part][theirs]}; expected {unet[ours]}, the UNet's "
                f"{ours}"
            )


def files_sha256(files: list[Path]) -> str:
    """Of the files' names and contents. Raises a UserError if one cannot be read."""
    try:
        lines = [f"{path.name} {file_sha256(path)}\n" for path in files]
    except OSError as error:
        raise UserError(f"{first_line(error)}; expected a file that can be read") from error
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _patterns() -> list[str]:
    """What to have of a model on the hub."""
    configs = [_INDEX, _SCHEDULER, *(f"{part}/{_CONFIG}" for part in _NETWORKS)]
    tokenizer = [f"tokenizer/{name}" for name in TOKENIZER_FILES]
    return [*configs, *tokenizer, *_weights_of(_NETWORKS, "")]


def _second_choice(folder: GivenFolder) -> list[str]:
    """The patterns again, with the weights in half precision of the parts that have no other."""
    lacking = [p for p, (_, stem) in _NETWORKS.items() if not has_weights(folder / p, stem)]
    return [*_patterns(), *_weights_of(lacking, ".fp16")] if lacking else []


def _weights_of(parts: Iterable[str], variant: str) -> list[str]:
    return [f"{p}/{name}" for p in parts for name in weight_patterns(_NETWORKS[p][1], variant)]


def _none(folder: GivenFolder) -> list[str]:
    return []
