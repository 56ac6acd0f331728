"""Text to image with a network of a few thousand parameters: the whole road in minutes on a CPU.

Its weights are random, so its images are noise; what it shows is that every step of the road works
and where its files are. configs/README.md, "Try the road", has the commands. Each part is as in
sd15_laion625.py but for its size: 8x8 latents, 64x64 images. sd15_tiny.py:dmd2 is DMD2 with a
generator of four steps, without a GAN, for which there are no encoded images.
"""

from dmd_jax.config import load_config, shipped_config, with_objective


def get_config(objective="dmd"):
    config = load_config(str(shipped_config("sd15_laion625")), [])
    # Empty: those of the teacher's folder are taken.
    config.teacher.text_encoder = {}
    config.teacher.taesd = {}
    config.teacher.vae = {}
    config.network = dict(
        name="unet2d_condition",
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
    )
    config.compute_dtype = "float32"
    config.remat = "none"
    config.teacher.weights = "runs/sd15_tiny/teacher"
    config.data.prompts = "runs/sd15_tiny/prompts"
    config.data.pairs = "runs/sd15_tiny/pairs"
    config.pairs.count = 16
    config.pairs.num_steps = 5
    config.pairs.batch_size = 8
    config.pairs.shard_size = 8
    config.steps = 10
    config.batch_size = 8
    config.objective.regression_batch_size = 4
    for optimizer in config.optimizer.values():
        optimizer.warmup_steps = 2
    config.lpips.weights = "runs/sd15_tiny/lpips.safetensors"
    config.log_every = 1
    config.picture_every = 10
    config.checkpoint_every = 5
    return config if objective == "dmd" else _with(config, objective)


def _with(config, objective):
    config = with_objective(config, objective)
    if objective == "dmd2":
        config.objective.gan_weight = 0.0
        config.objective.gan_fake_weight = 0.0
        config.objective.num_steps = 4
    return config
