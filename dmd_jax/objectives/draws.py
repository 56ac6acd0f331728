"""What is random in an objective: noise levels and noise, by key."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.method.schedules import NoiseLevel, NoiseSchedule, edm_level


class Draws(NamedTuple):
    """A noise level and a noise for each example."""

    level: NoiseLevel  # arrays [B]
    noise: jax.Array  # [B, ...]


def check_bins(min_index: int, max_index: int, schedule: NoiseSchedule) -> None:
    """Raises a UserError unless `draw` can draw from these bins of the schedule."""
    if not 0 <= min_index <= max_index < schedule.num_levels:
        raise UserError(
            f"min_index={min_index} and max_index={max_index}; expected "
            f"0 <= min_index <= max_index < {schedule.num_levels}"
        )


def draw(
    key: jax.Array,
    shape: tuple[int, ...],
    *,
    schedule: NoiseSchedule,
    min_index: int = 0,
    max_index: int | None = None,
) -> Draws:
    """Levels uniform over the schedule's bins min_index..max_index, both included, and N(0, I).

    The paper's bins of 1000 are 20..980 for the matching loss and all for the fake score.

    Args:
      key: a JAX random key. shape: of the images, [B, ...].
    """
    level_key, noise_key = jax.random.split(key)
    stop = schedule.num_levels if max_index is None else max_index + 1
    index = jax.random.randint(level_key, shape[:1], min_index, stop, jnp.int32)
    return Draws(schedule.level(index), jax.random.normal(noise_key, shape, jnp.float32))


def draw_lognormal(
    key: jax.Array, shape: tuple[int, ...], *, mean: float = -1.2, std: float = 1.2
) -> Draws:
    """EDM's training levels, ln(sigma) ~ N(mean, std^2) (2206.00364, table 1), and N(0, I)."""
    level_key, noise_key = jax.random.split(key)
    log_sigma = mean + std * jax.random.normal(level_key, shape[:1], jnp.float32)
    noise = jax.random.normal(noise_key, shape, jnp.float32)
    return Draws(edm_level(jnp.exp(log_sigma)), noise)
