"""The digits with a network that compiles in seconds, for tests of the commands."""

from dmd_jax.config import default_config


def get_config():
    config = default_config()
    config.images = "digits"
    config.network = dict(
        name="songunet",
        img_resolution=8,
        in_channels=1,
        out_channels=1,
        label_dim=10,
        model_channels=16,
        channel_mult=(1,),
        num_blocks=0,
        attn_resolutions=(),
    )
    config.teacher.weights = ""
    config.teacher.steps = 4
    config.teacher.batch_size = 16
    config.teacher.warmup_steps = 2
    config.pairs.count = 80
    config.pairs.num_steps = 2
    config.pairs.batch_size = 16
    config.pairs.shard_size = 32
    config.steps = 12
    config.batch_size = 16
    config.regression_batch_size = 8
    config.learning_rate = 1e-3
    config.fake_score_learning_rate = 1e-3
    config.warmup_steps = 2
    config.distance = "l2"
    config.ema_decay = 0.9
    config.log_every = 4
    config.picture_every = 12
    config.checkpoint_every = 4
    return config
