"""The config.json and the preprocessor of a CLIPModel, as networks and a preparation of ours.

As strict as diffusers_config: a key is an option of ours, or known to change nothing, or refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dmd_jax.convert.diffusers_config import KINDS, Kind, check_neutral, network_from_config
from dmd_jax.errors import UserError
from dmd_jax.evaluation.clip_folder import Preparation
from dmd_jax.models import complete
from dmd_jax.storage.safe_pickle import shown

# What older transformers write for models of every kind. The first change what a tower computes;
# the others concern training, generating text, and the form of what is returned.
_ANY_NEUTRAL = {
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
    "use_bfloat16": False,
}
_ANY_IGNORED = (
    *("bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty"),
    *("do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "finetuning_task"),
    *("exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id"),
    *("id2label", "label2id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size"),
    *("num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "prefix"),
    *("problem_type", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate"),
    *("sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss"),
    *("tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torchscript", "typical_p"),
)
_CLIP_TEXT = KINDS["CLIPTextModelWithProjection"]
# Of the model around the towers.
_MODEL_NEUTRAL = _ANY_NEUTRAL | {"model_type": "clip"}
_MODEL_IGNORED = (*_CLIP_TEXT.ignored, *_ANY_IGNORED, "logit_scale_init_value")
_TOWERS = {
    "text": dataclasses.replace(
        _CLIP_TEXT,
        neutral=_ANY_NEUTRAL | dict(_CLIP_TEXT.neutral),
        ignored=(*_CLIP_TEXT.ignored, *_ANY_IGNORED),
    ),
    "vision": Kind(
        "clip_vision",
        _ANY_NEUTRAL | dict(_CLIP_TEXT.neutral) | {"model_type": "clip_vision_model"},
        (*_CLIP_TEXT.ignored, *_ANY_IGNORED, "eos_token_id"),
    ),
}
_PROJECTION = "projection_dim"  # the model's; that of a tower means nothing in a CLIPModel
_DEFAULT_PROJECTION = 512

_IMAGES_NEUTRAL = {
    "do_center_crop": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "resample": 3,  # PIL's number of bicubic
    "rescale_factor": 1 / 255,
}
_IMAGES_IGNORED = (
    *("data_format", "default_to_square", "device", "disable_grouping", "do_convert_rgb"),
    *("feature_extractor_type", "image_processor_type", "input_data_format", "processor_class"),
    "return_tensors",
)
# Ours, theirs.
_IMAGES = {
    "shortest_edge": "size",
    "crop_size": "crop_size",
    "mean": "image_mean",
    "std": "image_std",
}


def towers_from_config(config: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """The complete `network` mappings (see models.complete) of "text" and "vision".

    Args:
      where: the file, for messages.

    Raises:
      UserError: another model, or a key or value that no network of ours has; it is named.
    """
    if config.get("model_type") != "clip":
        raise UserError(
            f"{where}: model_type is {shown(config.get('model_type'))}; expected clip, which has "
            "both towers"
        )
    if config.get("architectures") != ["CLIPModel"]:
        raise UserError(f"{where}: architectures are not CLIPModel alone; expected that")
    of_towers = [f"{name}_config{suffix}" for name in _TOWERS for suffix in ("", "_dict")]
    for key, value in config.items():
        if not key.startswith("_") and key not in (*_MODEL_IGNORED, *of_towers, _PROJECTION):
            check_neutral(key, value, _MODEL_NEUTRAL, where)
    width = {_PROJECTION: config.get(_PROJECTION, _DEFAULT_PROJECTION)}
    return {
        name: network_from_config(_tower_config(config, name, where), kind, where, width)
        for name, kind in _TOWERS.items()
    }


def _tower_config(config: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """The options of one tower, without its projection_dim.

    A TOWER_config_dict, of the oldest files, counts before TOWER_config in transformers, and so do
    the defaults of the keys that it lacks.
    """
    keys = (f"{name}_config", f"{name}_config_dict")
    for key in keys:
        if not isinstance(config.get(key), dict | None):
            raise UserError(f"{where}: {key} is no JSON object; expected one")
    options, before = (config.get(key) for key in keys)
    options = options or {}
    if before is not None:
        defaults = complete({"name": _TOWERS[name].name})
        defaults = {key: value for key, value in defaults.items() if key in options}
        options = options | defaults | before
    return {key: value for key, value in options.items() if key != _PROJECTION}


def preparation_from_config(config: Mapping[str, Any], where: str) -> Preparation:
    """How a preprocessor_config.json prepares images.

    Raises:
      UserError: otherwise than CLIP's do, or a key or value that is unknown; it is named.
    """
    for key, value in config.items():
        if not key.startswith("_") and key not in (*_IMAGES.values(), *_IMAGES_IGNORED):
            check_neutral(key, value, _IMAGES_NEUTRAL, where)
    found = {}
    for ours, theirs in _IMAGES.items():
        if theirs not in config:
            raise UserError(f"{where} has no {theirs}; expected that of CLIP's image processor")
        value = config[theirs]
        # Older files have the number itself.
        if theirs == "size" and isinstance(value, dict) and value.keys() == {"shortest_edge"}:
            value = value["shortest_edge"]
        if theirs == "crop_size" and isinstance(value, dict) and _is_square(value):
            value = value["height"]
        found[ours] = value
    try:
        return Preparation(**found)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _is_square(size: Mapping[str, Any]) -> bool:
    return size.keys() == {"height", "width"} and size["height"] == size["width"]
