"""Stable Diffusion's distillation scaled to two CPU cores, for `dmd-jax bench` alone.

Every part of sd15_laion625.py is there, in about its share of the work: a fifth of the U-Net's
width, half its latents, a quarter of TAESD's width, a short text encoder, and LPIPS at 64 pixels.
"""

from dmd_jax.config import load_config, shipped_config


def get_config():
    config = load_config(str(shipped_config("sd15_laion625")), [])
    config.network.sample_size = 32
    config.network.block_out_channels = (64, 128, 256, 256)
    config.network.cross_attention_dim = 256
    config.teacher.text_encoder.hidden_size = 256
    config.teacher.text_encoder.intermediate_size = 1024
    config.teacher.text_encoder.num_attention_heads = 4
    config.teacher.text_encoder.num_hidden_layers = 2
    config.teacher.taesd = dict(
        name="autoencoder_tiny",
        encoder_block_out_channels=(16, 16, 16, 16),
        decoder_block_out_channels=(16, 16, 16, 16),
    )
    config.compute_dtype = "float32"
    config.remat = "none"
    config.batch_size = 4
    config.objective.regression_batch_size = 2
    config.lpips.resolution = 64
    config.pairs.batch_size = 2
    return config
