"""The tiny config with another objective of the family: family.py:NAME, such as family.py:sid."""

from pathlib import Path

from dmd_jax.config import load_config, with_objective


def get_config(name):
    config = with_objective(load_config(str(Path(__file__).with_name("tiny.py")), []), name)
    config.objective.ema_decay = 0.9
    for key, value in (("generator_every", 2), ("distance", "l2"), ("halve_every", 3)):
        if key in config.objective:
            config.objective[key] = value
    return config
