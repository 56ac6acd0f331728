"""A config's training of a teacher on images: one player, and the denoising loss."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from dmd_jax.config.parts import Teaching
from dmd_jax.distillation import preview_key
from dmd_jax.distillation.from_config import computation_of, fake_weight_of, images_of
from dmd_jax.distillation.setting import Method, Setting
from dmd_jax.errors import UserError
from dmd_jax.models import build_denoiser
from dmd_jax.objectives import Objective, denoising
from dmd_jax.objectives.optimizers import adamw
from dmd_jax.options import make
from dmd_jax.teachers.edm import edm_teacher
from dmd_jax.teachers.families import family_of

PREVIEW_COUNT = 40


def teaching_of(config: ConfigDict) -> Setting:
    """The setting of `dmd-jax teacher`.

    Raises:
      UserError: the images are not there or do not fit the network, or it is not one of EDM's.
    """
    if family_of(config.network).takes != "labels":
        raise UserError(
            f"config.network is {config.network.name}; expected a network of EDM's, which is what "
            "this command trains"
        )
    denoiser = build_denoiser(config.network.to_dict(), **computation_of(config))
    teacher = edm_teacher(denoiser)
    images = images_of(config, teacher)
    settings = make(Teaching, config.teaching.to_dict(), "config.teaching")
    optimizer = adamw(settings.optimizer)

    def objective(stage: ConfigDict) -> Objective:
        return denoising(
            settings,
            teacher,
            denoiser.init,
            optimizer,
            weight=fake_weight_of(config),
            preview_key=preview_key(config),
        )

    labels = np.arange(PREVIEW_COUNT, dtype=np.int32) % max(denoiser.num_classes, 1)
    return Setting(
        method=Method(objective, frozen=dict, ahead=None),
        frozen={},
        starts={},
        sources=lambda stage: {"images": images},
        identity={"images": len(images)},
        network=config.network.to_dict(),
        class_names=images.class_names if denoiser.num_classes else None,
        description=f"EDM teacher of {config.data.images}, EMA after {{step}} steps",
        preview={"images": {"label": labels}},
        preview_count=PREVIEW_COUNT,
    )
