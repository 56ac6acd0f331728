"""f-distill (arXiv 2502.15681): DMD2 that descends any f-divergence, by the head's ratio."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.method import losses
from dmd_jax.method.schedules import NoiseLevel, NoiseSchedule
from dmd_jax.objectives.dmd2 import DMD2, SampleWeight, dmd2
from dmd_jax.objectives.matching import Networks
from dmd_jax.objectives.objective import Objective
from dmd_jax.options import option
from dmd_jax.teachers.teacher import Teacher

BINS = 10  # equal parts of the schedule's range of sigma


@dataclasses.dataclass(frozen=True, kw_only=True)
class FDistill(DMD2):
    """The settings of the method: DMD2's, the divergence, and the ratio's."""

    divergence: str = option("kl", choices=tuple(losses.DIVERGENCES))
    ratio_lower: float = option(0.1, above=0)  # what real / fake is clipped to
    ratio_upper: float = option(20.0, above=0)
    # Whether the ratio is divided by its running mean at levels like the sample's.
    ratio_normalization: bool = option(False)
    # How much of the former mean an update keeps; 0 is the mean of the update's own samples.
    ratio_rate: float = option(0.0, least=0, below=1)


def f_distill(settings: FDistill, teacher: Teacher, networks: Networks, **parts: Any) -> Objective:
    """As `dmd2`, with each sample's matching gradient multiplied by h(r) / mean h(r).

    The mean is over the samples that are computed together: those of a micro-batch, where a step
    has several. The running means are the carry of the generator's loss; of several micro-batches
    it is the mean of theirs.

    Args:
      parts: the other arguments of `dmd2`.

    Raises:
      UserError: as dmd2, or bounds of the ratio that leave nothing between them.
    """
    if settings.ratio_lower >= settings.ratio_upper:
        raise UserError(
            f"ratio_lower={settings.ratio_lower:g} and ratio_upper={settings.ratio_upper:g}; "
            "expected ratio_lower < ratio_upper"
        )
    weigh = SampleWeight(
        functools.partial(_weights, settings, teacher.schedule),
        (lambda params: jnp.ones(BINS)) if settings.ratio_normalization else None,
    )
    return dmd2(settings, teacher, networks, weigh=weigh, **parts)


def _weights(
    settings: FDistill,
    schedule: NoiseSchedule,
    logits: jax.Array,
    level: NoiseLevel,
    means: jax.Array | tuple[()],
) -> tuple[jax.Array, jax.Array | tuple[()]]:
    """The samples' weights [B], and the running means [BINS] with this batch in them."""
    clip = {"lower": settings.ratio_lower, "upper": settings.ratio_upper}
    typical = None
    if settings.ratio_normalization:
        bins = _bin_of(level, schedule)
        ratio = losses.density_ratio(logits, **clip)
        means = losses.ratio_means(means, ratio, bins, rate=settings.ratio_rate)
        typical = means[bins]
    weight = losses.divergence_weight(
        logits, divergence=settings.divergence, typical=typical, **clip
    )
    return weight, means


def _bin_of(level: NoiseLevel, schedule: NoiseSchedule) -> jax.Array:
    """int32 [B], 0 to BINS - 1."""
    low, high = schedule.sigmas[0], schedule.sigmas[-1]
    part = (level.sigma - low) / (high - low)
    return jnp.clip((BINS * part).astype(jnp.int32), 0, BINS - 1)
