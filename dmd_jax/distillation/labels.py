"""Images with labels or without a condition: what their distillation works with."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dmd_jax.distillation.setting import (
    Arguments,
    Method,
    Setting,
    identity_of,
    open_pairs,
    own_batches,
)
from dmd_jax.errors import UserError
from dmd_jax.experiment import distance_of, lpips_of
from dmd_jax.models import Denoiser, abstract_params
from dmd_jax.models.lpips import lpips_template
from dmd_jax.objective import one_architecture
from dmd_jax.train_step import Batch
from dmd_jax.weights import Weights


def label_method(config: ConfigDict, denoiser: Denoiser) -> Method:
    """The teacher's parameters are its network's, the perceptual ones LPIPS's.

    Raises:
      UserError: a value that only text has, or an impossible one.
    """
    if config.guidance != 1 or config.match_reference:
        raise UserError(
            f"config.guidance is {config.guidance} and match_reference {config.match_reference}; "
            "expected 1.0 and False for a teacher that is no text-to-image network"
        )
    distance = distance_of(config, denoiser.sample_shape)

    def batch(stage: ConfigDict) -> Batch:
        count = stage.regression_batch_size
        image = jax.ShapeDtypeStruct((count, *denoiser.sample_shape), jnp.float32)
        return {
            "z_ref": image,
            "y_ref": image,
            "label": jax.ShapeDtypeStruct((count,), jnp.int32),
        }

    return Method(
        networks=one_architecture(denoiser.denoise, denoiser.schedule),
        schedule=denoiser.schedule,
        sample_shape=denoiser.sample_shape,
        num_classes=denoiser.num_classes,
        network_params=lambda params: params,
        condition=None,
        ahead=None,
        distance=lambda stage: distance,
        show=lambda perceptual, samples: samples,
        arguments=lambda: Arguments(
            teacher=abstract_params(config.network.to_dict()),
            perceptual=None if distance is None else lpips_template(),
            ahead=None,
        ),
        batch=batch,
    )


def label_setting(config: ConfigDict, teacher: Weights, denoiser: Denoiser) -> Setting:
    """Pairs of the teacher, and LPIPS where the regression uses it.

    Raises:
      UserError: what the config names is not there or does not fit, or a value is impossible.
    """
    method = label_method(config, denoiser)
    pairs = open_pairs(
        config, teacher, sample_shape=method.sample_shape, num_classes=method.num_classes
    )
    lpips_params = None if method.distance(config) is None else lpips_of(config)
    return Setting(
        method=method,
        arguments=Arguments(teacher.params, lpips_params, None),
        pairs=pairs,
        show_condition=lambda rows: rows["label"] if method.num_classes else None,
        data=functools.partial(own_batches, pairs, lambda stage: stage.regression_batch_size),
        identity=identity_of(pairs, lpips_params),
    )
