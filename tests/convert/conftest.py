"""A small Stable Diffusion folder, and what it converts to."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def traced_once():
    """Each network's shapes are found once for a module's tests: tracing is what costs there."""
    from dmd_jax.models import abstract_params

    @functools.cache
    def of_text(text):
        return abstract_params(json.loads(text))

    with pytest.MonkeyPatch.context() as patch:
        for module in ("dmd_jax.convert.part", "dmd_jax.storage.weights", "dmd_jax.models"):
            patch.setattr(f"{module}.abstract_params", lambda n: of_text(json.dumps(n)))
        yield


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder, and what it converts to."""
    from commands import succeeds
    from diffusers_folder import write_folder

    folder = tmp_path_factory.mktemp("made")
    write_folder(folder / "sd")
    succeeds("convert", "diffusers", folder / "sd", folder / "out", "--taesd", folder / "sd/taesd")
    return folder / "sd", folder / "out"


@pytest.fixture
def sd(made, tmp_path):
    """A copy of the folder, to be changed."""
    return Path(shutil.copytree(made[0], tmp_path / "sd"))
