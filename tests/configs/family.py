"""The tiny config with another objective of the family: family.py:NAME, such as family.py:sid."""

from dmd_jax.config import default_config, load_config
from dmd_jax.objectives.kinds import KINDS

_TINY = __file__.replace("family.py", "tiny.py")
_SHARED = ("data", "network", "teacher", "teaching", "pairs", "steps", "batch_size")
_CADENCES = ("log_every", "picture_every", "checkpoint_every")


def get_config(name):
    tiny = load_config(_TINY, [])
    config = default_config(name)
    for key in (*_SHARED, *_CADENCES):
        config[key] = tiny[key]
    for player in KINDS[name].players:
        config.optimizer[player].learning_rate = 1e-3
        config.optimizer[player].warmup_steps = 2
    config.objective.ema_decay = 0.9
    if "generator_every" in config.objective:
        config.objective.generator_every = 2
    return config
