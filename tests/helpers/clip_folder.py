"""A CLIP of transformers with small random weights, its tokenizer and its image processor.

`write_clip` writes it without PyTorch, all names and shapes from our networks; `save_clip` has
transformers itself write the same model.
"""

from __future__ import annotations

from pathlib import Path

import flax.traverse_util
import numpy as np
from diffusers_folder import write_json
from edm_pickle import drawn
from safetensors.numpy import save_file
from small_tokenizer import VOCAB_SIZE, write_tokenizer

from dmd_jax.convert.torch_layout import torch_key, torch_shape
from dmd_jax.models import abstract_params

TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "eos_token_id": VOCAB_SIZE - 1,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "image_size": 14,
    "patch_size": 7,
}
WIDTH = 12  # of the features that are compared
NETWORKS = {
    "text": {"name": "clip_text", "with_projection": True, "projection_dim": WIDTH} | TEXT,
    "vision": {"name": "clip_vision", "projection_dim": WIDTH} | VISION,
}
CONFIG = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": WIDTH,
    "logit_scale_init_value": 2.6592,
    "text_config": TEXT | {"model_type": "clip_text_model", "projection_dim": 512},
    "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 512},
}
# CLIP's own numbers, but for the sizes.
PREPROCESSOR = {
    "crop_size": 14,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 16,
}
PROJECTIONS = ("text_projection.weight", "visual_projection.weight")


def write_clip(folder: Path) -> None:
    write_tokenizer(folder)
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    save_file(state_dict(), folder / "model.safetensors")


def state_dict() -> dict[str, np.ndarray]:
    """Drawn weights of a CLIPModel by PyTorch's keys and in its layouts."""
    arrays = {"logit_scale": np.array(4.6, np.float32)}
    for tower, network in NETWORKS.items():
        flat = flax.traverse_util.flatten_dict(abstract_params(network), sep="/")
        for path, leaf in flat.items():
            key = torch_key(path)
            key = key if key in PROJECTIONS else f"{tower}_model.{key}"
            arrays[key] = drawn(key, torch_shape(path, leaf.shape))
    return arrays


def save_clip(folder: Path, text=TEXT, vision=VISION, width=WIDTH):
    """Has transformers write the folder. Returns its CLIPModel."""
    import transformers
    from torch_weights import draw_parameters
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    text = text | {"bos_token_id": VOCAB_SIZE - 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)
    model = draw_parameters(transformers.CLIPModel(config))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    side = vision["image_size"]
    sizes = {"size": {"shortest_edge": side + 2}, "crop_size": {"height": side, "width": side}}
    CLIPImageProcessorPil(**sizes).save_pretrained(folder)
    return model
