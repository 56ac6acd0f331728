"""`dmd-jax convert clip`: a CLIP of transformers, both its towers, for the CLIP score.

What it makes is as evaluation/clip_folder.py says.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import flax.traverse_util

from dmd_jax.convert.clip_config import preparation_from_config, towers_from_config
from dmd_jax.convert.diffusers import TOKENIZER_FILES, files_sha256, tokenizer_files
from dmd_jax.convert.meter import Meter
from dmd_jax.convert.part import Part
from dmd_jax.convert.part_weights import (
    TRANSFORMERS,
    Tensors,
    find_weights,
    has_weights,
    weight_patterns,
)
from dmd_jax.convert.torch_layout import torch_key, torch_shape
from dmd_jax.convert.whole_folder import converted, copy_files, resolved, whole_folder
from dmd_jax.errors import UserError
from dmd_jax.evaluation.clip_folder import CLIP_FILE, TEXT, TOKENIZER, Preparation
from dmd_jax.models import abstract_params
from dmd_jax.storage.files import local_path
from dmd_jax.storage.given_folder import GivenFolder, find_folder
from dmd_jax.storage.seals import write_sealed
from dmd_jax.storage.strict import check_names_and_shapes
from dmd_jax.storage.weights import Weights, save_leaves

_CONFIG, _SCALE = "config.json", "logit_scale"
_PROJECTIONS = {"text": "text_projection.", "vision": "visual_projection."}
# How images are prepared: a file of its own, or an entry among those of the whole processor.
_PREPROCESSOR, _PROCESSOR, _ENTRY = (
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="FOLDER|HUB_ID",
        help="a CLIPModel of transformers with its processor; or owner/name on the hub",
    )
    parser.add_argument("out", type=local_path, metavar="OUT_DIR", help="the folder to make")
    parser.add_argument("--revision", help="branch, tag or commit of the hub id")


def run(args: argparse.Namespace) -> None:
    folder = find_folder(
        args.source, revision=args.revision, patterns=_patterns(), more=_second_choice
    )
    if not folder.has(_CONFIG):
        raise UserError(f"{folder.path} has no {_CONFIG}; expected the folder of a CLIPModel")
    config = folder.file(_CONFIG)
    networks = towers_from_config(folder.json(_CONFIG), str(config))
    preprocessor, preparation = _read_preparation(folder, networks["vision"]["image_size"])
    tokenizer = tokenizer_files(folder)
    towers, tensors = _read_towers(folder, networks)
    scale = float(tensors.get(_SCALE))
    if not math.isfinite(scale):
        raise UserError(f"{folder.path}: {_SCALE} is {scale}; expected a finite number")

    sha256 = files_sha256([*towers["vision"].files, preprocessor, *tokenizer])
    out = resolved(args.out)
    made_besides = [CLIP_FILE, *(f"{TOKENIZER}/{path.name}" for path in tokenizer)]
    if converted(out, sha256, [TEXT], made_besides) is not None:
        print(f"convert: {args.out} holds {folder.name} already")
        return
    source = {"file": folder.name, "sha256": sha256}
    meter = Meter(sum(tower.count for tower in towers.values()))
    with whole_folder(out) as made:
        for place, tower in ((made, towers["vision"]), (made / TEXT, towers["text"])):
            description = f"{folder.name}, converted from transformers"
            weights = Weights(tower.network, tower.layout, description, source)
            save_leaves(place, weights, meter.watching(tower.leaf))
        copy_files(tokenizer, made / TOKENIZER)
        write_sealed(made / CLIP_FILE, dataclasses.asdict(preparation) | {_SCALE: scale})
    counts = " and ".join(f"{tower.network['name']}, {tower.count:,}" for tower in towers.values())
    print(f"convert: {counts} parameters, in {args.out}")


def _read_preparation(folder: GivenFolder, image_size: int) -> tuple[Path, Preparation]:
    """The file that says how images are prepared, and what it says."""
    if folder.has(_PREPROCESSOR):
        name, config = _PREPROCESSOR, folder.json(_PREPROCESSOR)
    elif folder.has(_PROCESSOR):
        name, config = _PROCESSOR, folder.json(_PROCESSOR).get(_ENTRY)
    else:
        raise UserError(f"{folder.path} has no {_PREPROCESSOR}; expected CLIP's image processor")
    path = folder.file(name)
    if not isinstance(config, dict):
        raise UserError(f"{path} has no {_ENTRY}; expected CLIP's image processor")
    preparation = preparation_from_config(config, str(path))
    if preparation.crop_size != image_size:
        raise UserError(
            f"{path}: crop_size is {preparation.crop_size}; expected {image_size}, the vision "
            "tower's image_size"
        )
    return path, preparation


def _read_towers(
    folder: GivenFolder, networks: dict[str, dict[str, Any]]
) -> tuple[dict[str, Part], Tensors]:
    """Both towers, which are in the same files, and all that these hold.

    Raises:
      UserError: files are missing or damaged; or arrays are missing, extra or misshapen, all
        listed.
    """
    files = [folder.file(_CONFIG), *find_weights(folder, TRANSFORMERS)]
    tensors = Tensors(files)
    expected: dict[str, tuple[int, ...]] = {_SCALE: ()}
    towers = {}
    for tower, network in networks.items():
        layout = flax.traverse_util.flatten_dict(abstract_params(network), sep="/")
        keys = {path: _key(tower, path) for path in layout}
        expected |= {key: torch_shape(path, layout[path].shape) for path, key in keys.items()}
        towers[tower] = Part(network, layout, files, keys, tensors)
    # Older files have these buffers of 0, 1, 2, … too.
    buffers = {f"{tower}_model.embeddings.position_ids" for tower in networks}
    shapes = {key: shape for key, shape in tensors.shapes.items() if key not in buffers}
    check_names_and_shapes(shapes, expected, f"{files[1]} does not fit {files[0]}")
    return towers, tensors


def _key(tower: str, path: str) -> str:
    """PyTorch's key of a tower's parameter; there the projections lie beside the towers."""
    key = torch_key(path)
    return key if key.startswith(_PROJECTIONS[tower]) else f"{tower}_model.{key}"


def _patterns(variant: str = "") -> list[str]:
    """What to have of a model on the hub."""
    configs = [_CONFIG, _PREPROCESSOR, _PROCESSOR]
    return [*configs, *TOKENIZER_FILES, *weight_patterns(TRANSFORMERS, variant)]


def _second_choice(folder: GivenFolder) -> list[str]:
    """The patterns again, for weights in half precision, where there is no other."""
    return [] if has_weights(folder, TRANSFORMERS) else _patterns(".fp16")
