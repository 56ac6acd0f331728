"""Images with labels or without a condition: what their teacher is made of."""

from __future__ import annotations

from ml_collections import ConfigDict

from dmd_jax.distillation.setting import Parts
from dmd_jax.errors import UserError
from dmd_jax.models import Denoiser, abstract_params
from dmd_jax.teachers.edm import edm_teacher


def label_parts(config: ConfigDict, denoiser: Denoiser) -> Parts:
    """The network alone.

    Raises:
      UserError: a value that only text has.
    """
    if config.guidance != 1 or config.match_reference:
        raise UserError(
            f"config.guidance is {config.guidance} and match_reference {config.match_reference}; "
            "expected 1.0 and False for a teacher that is no text-to-image network"
        )
    teacher = edm_teacher(denoiser)
    return Parts(
        teacher=lambda stage: teacher,
        frozen=lambda: {"network": abstract_params(config.network.to_dict())},
    )
