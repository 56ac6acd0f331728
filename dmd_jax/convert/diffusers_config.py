"""The config.json of a diffusers folder's parts, as networks and a noise schedule of ours.

Nothing in such a file is passed over in silence: a key is an option of our network, or it is in a
table below, with the values at which it changes nothing that we compute; or it is refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from dmd_jax.errors import UserError
from dmd_jax.method.discrete_samplers import SPACINGS
from dmd_jax.models import build_network, complete
from dmd_jax.storage.safe_pickle import shown


@dataclasses.dataclass(frozen=True)
class Kind:
    """A class of diffusers' or transformers' whose networks we have.

    Attributes:
      name: of the network in our registry.
      neutral: keys that we have no option for, and the values of theirs that are as we compute.
      ignored: keys that change nothing in inference, whatever their value.
      options: of our network, which are no keys but follow from the class.
      null_is_default: keys that are our options, and whose null means their default.
    """

    name: str
    neutral: Mapping[str, Any]
    ignored: tuple[str, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    null_is_default: tuple[str, ...] = ()


_CLIP_TEXT = Kind(
    "clip_text",
    {"model_type": "clip_text_model", "attention_dropout": 0.0, "dropout": 0.0},
    (
        "architectures",
        "bos_token_id",
        "pad_token_id",
        "initializer_factor",
        "initializer_range",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "gradient_checkpointing",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "use_cache",
    ),
)
KINDS = {
    "UNet2DConditionModel": Kind(
        "unet2d_condition",
        {
            "act_fn": "silu",
            "addition_embed_type": None,
            "attention_type": "default",
            "center_input_sample": False,
            "class_embed_type": None,
            "class_embeddings_concat": False,
            "conv_in_kernel": 3,
            "conv_out_kernel": 3,
            "cross_attention_norm": None,
            "downsample_padding": 1,
            "dropout": 0.0,
            "dual_cross_attention": False,
            "encoder_hid_dim": None,
            "encoder_hid_dim_type": None,
            "mid_block_only_cross_attention": None,
            "mid_block_scale_factor": 1,
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "num_attention_heads": None,
            "num_class_embeds": None,
            "only_cross_attention": False,
            "projection_class_embeddings_input_dim": None,
            "resnet_out_scale_factor": 1.0,
            "resnet_skip_time_act": False,
            "resnet_time_scale_shift": "default",
            "reverse_transformer_layers_per_block": None,
            "time_cond_proj_dim": None,
            "time_embedding_act_fn": None,
            "time_embedding_dim": None,
            "time_embedding_type": "positional",
            "timestep_post_act": None,
            "transformer_layers_per_block": 1,
        },
        # Both belong to an addition_embed_type.
        ("addition_embed_type_num_heads", "addition_time_embed_dim"),
        # As diffusers' own converter of checkpoints writes it.
        null_is_default=("upcast_attention",),
    ),
    "AutoencoderKL": Kind(
        "autoencoder_kl",
        {
            "act_fn": "silu",
            "latents_mean": None,
            "latents_std": None,
            "mid_block_add_attention": True,
            "use_post_quant_conv": True,
            "use_quant_conv": True,
        },
        # The size of the training images; whether float16 overflows.
        ("sample_size", "force_upcast"),
    ),
    "AutoencoderTiny": Kind(
        "autoencoder_tiny",
        {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2},
        # block_out_channels repeats the decoder's; the others say how latents are kept as bytes.
        ("block_out_channels", "force_upcast", "latent_magnitude", "latent_shift"),
    ),
    "CLIPTextModel": _CLIP_TEXT,
    "CLIPTextModelWithProjection": dataclasses.replace(
        _CLIP_TEXT, options={"with_projection": True}
    ),
}

# Scheduler classes, and their own defaults where these differ from those of most. Which of them a
# folder has does not matter to us, for samplers are chosen by name; its noise and its timesteps do.
_MOST = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
_SCALED_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS = {
    "PNDMScheduler": {"timestep_spacing": "leading", "skip_prk_steps": False},
    "DDIMScheduler": {"timestep_spacing": "leading", "set_alpha_to_one": True},
    "DDPMScheduler": {"timestep_spacing": "leading"},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": _SCALED_BETAS,
    "KDPM2AncestralDiscreteScheduler": _SCALED_BETAS,
    "KDPM2DiscreteScheduler": _SCALED_BETAS,
    "LMSDiscreteScheduler": {},
    "UniPCMultistepScheduler": {},
}
_SCHEDULE_NEUTRAL = {
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "skip_prk_steps": True,  # the Runge-Kutta steps that Stable Diffusion leaves out
    "thresholding": False,
    "timestep_type": "discrete",
    "use_dynamic_shifting": False,
    "use_flow_sigmas": False,
}
# How a sampler steps, which is the sampler's own matter here. StableDiffusionPipeline itself sets
# clip_sample to false and steps_offset to 1, whatever the file says.
_STEPS_OFFSET = 1
_SCHEDULE_IGNORED = (
    "algorithm_type",
    "clip_sample",
    "clip_sample_range",
    "disable_corrector",
    "dynamic_thresholding_ratio",
    "euler_at_final",
    "final_sigmas_type",
    "flow_shift",
    "interpolation_type",
    "lambda_min_clipped",
    "lower_order_final",
    "predict_x0",
    "sample_max_value",
    "shift_terminal",
    "sigma_max",
    "sigma_min",
    "solver_order",
    "solver_p",
    "solver_type",
    "steps_offset",
    "time_shift_type",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
    "use_lu_lambdas",
    "variance_type",
)
_OF_NETWORK = ("prediction_type", "beta_start", "beta_end", "num_train_timesteps")
_OF_SAMPLER = ("timestep_spacing", "set_alpha_to_one", "skip_prk_steps")


def network_from_config(
    config: Mapping[str, Any], kind: Kind, where: str, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The complete `network` mapping (see models.complete) of a part.

    Args:
      config: of the part, as diffusers or transformers write it.
      where: the file, for messages.
      extra: options that the file does not hold.

    Raises:
      UserError: a key, or a value of one, that no network of ours has; it is named.
    """
    added = {**kind.options, **(extra or {})}
    known = [key for key in complete({"name": kind.name}) if key not in ("name", *added)]
    options = {}
    for key, value in config.items():
        if key.startswith("_") or key in kind.ignored:
            continue
        if key in known:
            if value is not None or key not in kind.null_is_default:
                options[key] = value
        else:
            check_neutral(key, value, kind.neutral, where)
    if kind.name == "unet2d_condition" and _is_old(config.get("_diffusers_version")):
        # These versions wrote 32 whatever the network had been trained with, and for anything
        # below 64 StableDiffusionPipeline takes 64.
        size = options.get("sample_size")
        if type(size) is int and size < 64:
            options["sample_size"] = 64
    return _checked_network({"name": kind.name} | options | added, where)


def schedule_from_config(
    config: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a scheduler_config.json says.

    Returns:
      (options of the network "unet2d_condition": prediction_type, beta_start, beta_end and
      num_train_timesteps; what a sampler needs besides: timestep_spacing, steps_offset,
      set_alpha_to_one and skip_prk_steps).

    Raises:
      UserError: a class that is none of Stable Diffusion's, another noise than scaled-linear of
        1000 steps, or a key or value that is unknown; it is named.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise UserError(
            f"{where}: _class_name is {_quoted(name)}; expected one of {', '.join(SCHEDULERS)}"
        )
    config = _MOST | SCHEDULERS[name] | {k: v for k, v in config.items() if k[:1] != "_"}
    for key, value in config.items():
        if key in _SCHEDULE_NEUTRAL or key not in (*_OF_NETWORK, *_OF_SAMPLER, *_SCHEDULE_IGNORED):
            check_neutral(key, value, _SCHEDULE_NEUTRAL, where)
    for key, expected, fits in (
        ("timestep_spacing", f"one of {', '.join(SPACINGS)}", SPACINGS.__contains__),
        ("set_alpha_to_one", "true or false", lambda value: isinstance(value, bool)),
    ):
        if not fits(config[key]):
            raise UserError(f"{where}: {key} is {_quoted(config[key])}; expected {expected}")
    of_network = {key: config[key] for key in _OF_NETWORK}
    _checked_network({"name": "unet2d_condition"} | of_network, where)
    of_sampler = {key: config[key] for key in _OF_SAMPLER}
    return of_network, of_sampler | {"steps_offset": _STEPS_OFFSET}


def _checked_network(network: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The mapping, complete, once it is known that the network can be built."""
    try:
        network = complete(network)
        build_network(network)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return network


def _is_old(version: Any) -> bool:
    """Whether a _diffusers_version is one before 0.9."""
    found = re.match(r"(\d{1,9})\.(\d{1,9})", version) if isinstance(version, str) else None
    return found is not None and (int(found[1]), int(found[2])) < (0, 9)


def check_neutral(key: str, value: Any, neutral: Mapping[str, Any], where: str) -> None:
    """Raises a UserError unless the key is in the table and has the value that is there."""
    if key not in neutral:
        raise UserError(
            f"{where}: {shown(key)} is {_quoted(value)}; no network of ours knows this option"
        )
    expected = neutral[key]
    # True is 1 to Python.
    if isinstance(value, bool) != isinstance(expected, bool) or value != expected:
        raise UserError(f"{where}: {key} is {_quoted(value)}; expected {_quoted(expected)}")


def _quoted(value: Any) -> str:
    """A JSON value in a message, as JSON has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(shown(value)) if isinstance(value, str) else shown(value)
