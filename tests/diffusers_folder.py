"""A whole Stable Diffusion folder with small random weights.

    python tests/diffusers_folder.py FOLDER [--by-diffusers [--v2]]

writes it without PyTorch (`write_folder`), all names and shapes coming from our networks, or has
diffusers itself write it (`save_pipeline`), which is the proof.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from edm_pickle import drawn
from safetensors.numpy import load_file, save_file
from small_tokenizer import VOCAB_SIZE, write_tokenizer

UNET = {
    "sample_size": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
}
# What Stable Diffusion 2.x has besides.
UNET_V2 = UNET | {
    "attention_head_dim": [2, 4],
    "use_linear_projection": True,
    "upcast_attention": True,
}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [8, 8, 16, 16],
    "norm_num_groups": 4,
}
TAESD = {
    "encoder_block_out_channels": [8, 8, 8, 8],
    "decoder_block_out_channels": [8, 8, 8, 8],
    "num_encoder_blocks": [1, 1, 1, 1],
    "num_decoder_blocks": [1, 1, 1, 1],
}
TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "eos_token_id": 2,  # as Stable Diffusion's files have it
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.6.0",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model.safetensors", "model.safetensors"
# Part -> its network as a mapping of ours, what its config.json says besides, its weights' file.
PARTS = {
    "unet": (
        {"name": "unet2d_condition"} | UNET,
        {"_class_name": "UNet2DConditionModel", "act_fn": "silu", "downsample_padding": 1},
        DIFFUSERS,
    ),
    "vae": (
        {"name": "autoencoder_kl"} | VAE,
        {"_class_name": "AutoencoderKL", "act_fn": "silu", "sample_size": 64},
        DIFFUSERS,
    ),
    "text_encoder": (
        {"name": "clip_text"} | TEXT,
        {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "dropout": 0.0},
        TRANSFORMERS,
    ),
    "taesd": (
        {"name": "autoencoder_tiny"} | TAESD,
        {"_class_name": "AutoencoderTiny", "act_fn": "relu"},
        DIFFUSERS,
    ),
}


def write_folder(folder: Path) -> None:
    """A Stable Diffusion 1.x folder; and an AutoencoderTiny's in its `taesd`."""
    for part in PARTS:
        write_part(folder / part, part)
    write_tokenizer(folder / "tokenizer")
    write_json(
        folder / "scheduler" / "scheduler_config.json",
        {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0"} | SCHEDULER,
    )
    write_json(folder / "model_index.json", INDEX)


def write_part(folder: Path, part: str) -> None:
    network, besides, file = PARTS[part]
    options = {key: value for key, value in network.items() if key != "name"}
    write_json(folder / "config.json", besides | options)
    save_file(state_dict(network), folder / file)


def state_dict(network: dict[str, Any]) -> dict[str, np.ndarray]:
    """Drawn weights of a network of ours, by PyTorch's keys and in its layouts, as on the hub."""
    import flax.traverse_util

    from dmd_jax import models
    from dmd_jax.convert.torch_layout import torch_key, torch_shape

    flat = flax.traverse_util.flatten_dict(models.abstract_params(network), sep="/")
    prefix = "text_model." if network["name"] == "clip_text" else ""
    shapes = {
        prefix + torch_key(path): torch_shape(path, leaf.shape) for path, leaf in flat.items()
    }
    return {key: drawn(key, shape) for key, shape in shapes.items()}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def convert(folder: Path, *arguments) -> dict[str, str]:
    """Converts to `out` beside the folder; gives its hashes."""
    from commands import succeeds

    out = folder.parent / "out"
    succeeds("convert", "diffusers", folder, out, *arguments)
    return hashes(out)


def hashes(out: Path) -> dict[str, str]:
    """The SHA-256 of the parameters of each network in a converted folder."""
    configs = {path.parent.name: path for path in out.glob("*/config.json")}
    configs["unet"] = out / "config.json"
    return {part: json.loads(path.read_text())["params_sha256"] for part, path in configs.items()}


def edit(path: Path, **changes) -> None:
    """Sets keys of a JSON file; None deletes."""
    content = json.loads(path.read_text()) | changes
    write_json(path, {key: value for key, value in content.items() if value is not None})


def rewrite(path: Path, change: Callable[[dict], dict]) -> None:
    """A .safetensors with `change` of its arrays in place of them."""
    save_file(change(load_file(path)), path)


def save_pipeline(folder: Path, *, v2: bool = False, **options):
    """Has diffusers write a folder, and one of an AutoencoderTiny in its `taesd`.

    Args:
      v2: Stable Diffusion 2.x's options, v-prediction among them.
      options: of diffusers' save_pretrained.

    Returns:
      The StableDiffusionPipeline.
    """
    import diffusers
    import transformers
    from torch_weights import draw_parameters

    unet = diffusers.UNet2DConditionModel(**(UNET_V2 if v2 else UNET))
    activation = {"hidden_act": "gelu"} if v2 else {}
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(bos_token_id=0, **TEXT, **activation)
    )
    prediction = {"prediction_type": "v_prediction"} if v2 else {}
    write_tokenizer(folder / "tokenizer")
    pipeline = diffusers.StableDiffusionPipeline(
        vae=draw_parameters(diffusers.AutoencoderKL(**VAE)),
        text_encoder=draw_parameters(text_encoder),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=draw_parameters(unet),
        scheduler=diffusers.PNDMScheduler(**SCHEDULER, **prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, **options)
    taesd = draw_parameters(diffusers.AutoencoderTiny(**TAESD))
    taesd.save_pretrained(folder / "taesd")
    return pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--by-diffusers", action="store_true", help="needs PyTorch")
    parser.add_argument("--v2", action="store_true", help="of Stable Diffusion 2.x, by diffusers")
    args = parser.parse_args()
    if args.by_diffusers or args.v2:
        save_pipeline(args.folder, v2=args.v2)
    else:
        write_folder(args.folder)


if __name__ == "__main__":
    main()
