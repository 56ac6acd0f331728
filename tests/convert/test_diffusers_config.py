"""The configs of a Stable Diffusion folder: what goes through, and what is refused."""

from __future__ import annotations

import jax
import pytest
from commands import fails
from diffusers_folder import (
    edit,
)

from dmd_jax.convert.diffusers_config import (
    KINDS,
    SCHEDULERS,
    network_from_config,
    schedule_from_config,
)
from dmd_jax.models import abstract_params

pytestmark = pytest.mark.usefixtures("traced_once")

UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
SD21 = {
    "unet": {
        "act_fn": "silu",
        "attention_head_dim": [5, 10, 20, 20],
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 1024,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "out_channels": 4,
        "sample_size": 96,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "text_encoder": {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "pad_token_id": 1,
        "projection_dim": 512,
        "torch_dtype": "float32",
        "transformers_version": "4.25.0.dev0",
        "vocab_size": 49408,
    },
    "scheduler": {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
}


def test_the_published_configs_of_version_2_1():
    """Every key of theirs has its place, and the networks have the published sizes."""
    options, sampler = schedule_from_config(SD21["scheduler"], "scheduler")
    unet = network_from_config(SD21["unet"], KINDS["UNet2DConditionModel"], "unet", options)
    text = network_from_config(SD21["text_encoder"], KINDS["CLIPTextModel"], "text_encoder")
    counts = [
        sum(leaf.size for leaf in jax.tree.leaves(abstract_params(network)))
        for network in (unet, text)
    ]
    assert counts == [865_910_724, 340_387_840]
    assert unet["prediction_type"] == "v_prediction"
    assert sampler["timestep_spacing"] == "leading" and not sampler["set_alpha_to_one"]


def test_what_diffusers_itself_reads_otherwise_than_it_is_written():
    def unet(**changes):
        return network_from_config(SD21["unet"] | changes, KINDS["UNet2DConditionModel"], "unet")

    # Its converter of checkpoints writes null.
    assert unet(upcast_attention=None)["upcast_attention"] is False
    # Its first versions wrote 32 for networks of 64.
    sizes = {("0.6.0", 32): 64, ("0.8.1", 96): 96, ("0.9.0.dev0", 32): 32, ("0.10.2", 32): 32}
    for (version, size), expected in sizes.items():
        found = unet(_diffusers_version=version, sample_size=size)
        assert found["sample_size"] == expected
    assert unet(sample_size=32)["sample_size"] == 32


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of what the pipeline changes
@pytest.mark.parametrize("name", SCHEDULERS)
def test_defaults_of_schedulers_are_those_of_diffusers_in_its_pipeline(name):
    """Of each class, with the one key that none has by default."""
    import diffusers

    given = {"beta_schedule": "scaled_linear", "skip_prk_steps": True}
    options, sampler = schedule_from_config({"_class_name": name} | given, name)
    scheduler = getattr(diffusers, name)(beta_schedule="scaled_linear")
    empty = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor")
    )
    pipeline = diffusers.StableDiffusionPipeline(
        **empty, scheduler=scheduler, requires_safety_checker=False
    )
    theirs = pipeline.scheduler.config
    assert not theirs.get("clip_sample", False)
    del sampler["skip_prk_steps"]  # Stable Diffusion's, where PNDMScheduler's own is another
    for key, value in (options | sampler).items():
        # Those that have no such key begin and end at the same levels whatever ours says.
        assert theirs.get(key, value) == value, key


@pytest.mark.parametrize(
    "file, changes, message",
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "is StableDiffusionXLP"),
        ("model_index.json", {"vae": None}, "lacks vae; expected one of AutoencoderKL, Autoencod"),
        ("model_index.json", {"unet": ["diffusers", "FluxModel"]}, "has FluxModel as unet"),
        ("model_index.json", {"unet": "x"}, "has a NoneType as unet"),
        ("model_index.json", {"text_encoder_2": ["a", "b"]}, "has a part text_encoder_2"),
        (
            UNET,
            {"_class_name": "UNet2DModel"},
            "_class_name or architectures is not UNet2DConditionModel",
        ),
        (UNET, {"class_embed_type": "timestep"}, "class_embed_type is 'timestep'; expected null"),
        (UNET, {"downsample_padding": True}, "downsample_padding is true; expected 1"),
        (UNET, {"dropout": 0.1}, "dropout is 0.1; expected 0.0"),
        (UNET, {"magic": [1]}, "magic is a list; no network of ours knows this option"),
        (UNET, {"prediction_type": "sample"}, "prediction_type is 'sample'; no network of ours"),
        (UNET, {"layers_per_block": "two"}, "option layers_per_block is 'two'; expected int"),
        (UNET, {"layers_per_block": True}, "option layers_per_block is True; expected int"),
        (UNET, {"layers_per_block": "x" * 999}, f"is '{'x' * 99}; expected int"),
        (UNET, {"upcast_attention": "no"}, "option upcast_attention is 'no'; expected bool"),
        (UNET, {"layers_per_block": 10**9}, "layers_per_block is 1000000000; expected 1 to"),
        (UNET, {"cross_attention_dim": 24}, "misshapen: down_blocks.0.attentions.0.transformer_b"),
        (VAE, {"use_quant_conv": False}, "use_quant_conv is false; expected true"),
        (VAE, {"shift_factor": "a"}, "option shift_factor is 'a'; expected float | None"),
        (TEXT, {"hidden_act": "relu"}, "hidden_act is 'relu'; expected"),
        (
            TEXT,
            {"architectures": ["T5EncoderModel"]},
            "_class_name or architectures is not CLIPTextModel",
        ),
        (TEXT, {"num_hidden_layers": 3}, "16 missing: encoder.layers.2."),
        (SCHEDULER, {"beta_schedule": "linear"}, "is 'linear'; expected 'scaled_linear'"),
        (SCHEDULER, {"beta_schedule": None}, "is 'linear'; expected 'scaled_linear'"),
        (SCHEDULER, {"num_train_timesteps": 100}, "num_train_timesteps is 100; expected 1000"),
        (SCHEDULER, {"trained_betas": [0.1]}, "trained_betas is a list; expected null"),
        (SCHEDULER, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is true; expected f"),
        (SCHEDULER, {"_class_name": "FlowMatchScheduler"}, "_class_name is 'FlowMatchScheduler'"),
        (SCHEDULER, {"skip_prk_steps": None}, "skip_prk_steps is false; expected true"),
        (SCHEDULER, {"snr_shift_scale": 3}, "snr_shift_scale is 3; no network of ours"),
        (SCHEDULER, {"prediction_type": "flow"}, "prediction_type is 'flow'; expected one of ep"),
        (SCHEDULER, {"timestep_spacing": "log"}, "timestep_spacing is 'log'; expected one of le"),
        (SCHEDULER, {"set_alpha_to_one": 1}, "set_alpha_to_one is 1; expected true or false"),
        (SCHEDULER, {"beta_end": "a"}, "option beta_end is 'a'; expected float"),
        (SCHEDULER, {"beta_end": 1e-9}, "option beta_end is 1e-09; expected"),
    ],
)
def test_configs_that_are_refused(sd, capsys, file, changes, message):
    edit(sd / file, **changes)
    line = fails(capsys, "convert", "diffusers", sd, sd.parent / "out")
    assert message in line and str(sd / file) in line
    assert [path.name for path in sd.parent.iterdir()] == ["sd"]
