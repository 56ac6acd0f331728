"""The digits with a network that compiles in seconds, for tests of the commands."""

from dmd_jax.config import default_config


def get_config():
    config = default_config()
    config.data.images = "digits"
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
    config.teaching.steps = 4
    config.teaching.batch_size = 16
    config.teaching.optimizer.warmup_steps = 2
    config.pairs.count = 80
    config.pairs.num_steps = 2
    config.pairs.batch_size = 16
    config.pairs.shard_size = 32
    config.steps = 12
    config.batch_size = 16
    config.objective.regression_batch_size = 8
    for optimizer in config.optimizer.values():
        optimizer.learning_rate = 1e-3
        optimizer.warmup_steps = 2
    config.objective.distance = "l2"
    config.objective.ema_decay = 0.9
    config.log_every = 4
    config.picture_every = 12
    config.checkpoint_every = 4
    return config
