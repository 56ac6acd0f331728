"""The families of teachers: which one a network is of, and its parts from a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dmd_jax.storage.files import path_of
from dmd_jax.storage.weights import Weights, load_weights
from dmd_jax.teachers.edm import EDM
from dmd_jax.teachers.family import Family, Networks, Pipeline
from dmd_jax.teachers.stable_diffusion import STABLE_DIFFUSION

FAMILIES = (EDM, STABLE_DIFFUSION)


def family_of(network: Mapping[str, Any]) -> Family:
    """The family of a network's options; EDM for one that no family has, whose `build` refuses."""
    return next((one for one in FAMILIES if network.get("name") in one.networks), EDM)


def networks_of(config: ConfigDict, decoder: str | None = None) -> Networks:
    """The networks that a run's config describes.

    Args:
      decoder: its name in config.teacher; None leaves decoders out, as does a config without one.
    """
    networks = {"network": config.network.to_dict()}
    if config.teacher.text_encoder:
        networks["text_encoder"] = config.teacher.text_encoder.to_dict()
    if decoder is not None and config.teacher[decoder]:
        networks["decoders"] = {decoder: config.teacher[decoder].to_dict()}
    return networks


def load_pipeline(
    folder: str | Path,
    *,
    weights: Weights | None = None,
    dtype: str = "float32",
    precision: str = "highest",
    **options: Any,
) -> Pipeline:
    """Reads a weights folder or a run's workdir, be it a teacher's or a generator's.

    Args:
      weights: load_weights(folder), if it was read before.
      dtype, precision: that the networks compute in, as for models.build_network.
      options: of families that take text: `parts`, as for text_parts.parts_folder, and `decoder`,
        as for text_parts.load_decoder, the first of DECODERS by default.

    Raises:
      UserError: a part is missing, damaged or of another kind, or does not fit the network.
    """
    folder = path_of(folder)
    weights = weights or load_weights(folder)
    family = family_of(weights.network)
    return family.load(weights, folder, dtype=dtype, precision=precision, **options)
