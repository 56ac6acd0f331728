"""The tiny config in three stages: a heavier regression, other batches, then as it is."""

from pathlib import Path

from dmd_jax.config import load_config


def get_config():
    config = load_config(str(Path(__file__).with_name("tiny.py")), [])
    config.stages = (
        {"until": 4, "objective.regression_weight": 2.0, "objective.max_index": 500},
        {"until": 8, "batch_size": 8, "objective.regression_batch_size": 16},
    )
    return config
