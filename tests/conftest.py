"""Settings that every test shares; they must be in the environment before JAX starts."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
# Compiled programs are kept between runs and shared with the commands that tests start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import numpy as np  # noqa: E402
import pytest  # noqa: E402

# Files of minutes. They come first, or one process would end with the longest, and the other idle.
LONGEST = (
    *("test_flip_bits", "test_processes", "test_text_training", "test_train_step", "test_ablate"),
    *("test_evaluate", "test_evaluate_captions", "test_full_size", "test_quickstart", "test_bench"),
)


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture
def golden():
    """Reads a reference array file of tests/golden by its stem."""

    def load(stem: str):
        with np.load(ROOT / "tests" / "golden" / f"{stem}.npz", allow_pickle=False) as arrays:
            return dict(arrays)

    return load


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny teacher and its pairs: paths as --config arguments, made once for all tests."""
    from commands import TINY, succeeds

    folder = tmp_path_factory.mktemp("tiny")
    succeeds("teacher", "--config", TINY, "--workdir", folder / "teacher")
    weights = f"--config.teacher.weights={folder / 'teacher' / 'weights'}"
    succeeds("pairs", "--config", TINY, weights, "--workdir", folder / "pairs")
    return ["--config", TINY, weights, f"--config.data.pairs={folder / 'pairs'}"]


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """The workdir of twelve steps of distillation; tests that change it take a copy."""
    from commands import succeeds

    workdir = tmp_path_factory.mktemp("trained")
    succeeds("train", *tiny, "--workdir", workdir)
    return workdir


@pytest.fixture(scope="session")
def text_weights(tmp_path_factory):
    """A small text-to-image weights folder with both decoders; tests that change it take a copy."""
    from commands import succeeds
    from diffusers_folder import write_folder

    folder = tmp_path_factory.mktemp("text")
    write_folder(folder / "sd")
    out = folder / "weights"
    succeeds("convert", "diffusers", folder / "sd", out, "--taesd", folder / "sd" / "taesd")
    return out


@pytest.fixture(scope="session")
def lpips_file(tmp_path_factory):
    """LPIPS's real weights, converted from the package that the extra [lpips] installs."""
    from commands import succeeds

    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    succeeds("convert", "lpips", path)
    return path


@pytest.fixture(scope="module")
def gcs(tmp_path_factory):
    """The stand-in, with the buckets "bucket" and, which nobody may use, "closed"."""
    from stand_in_gcs import Gcs, serving

    store = Gcs("bucket", "closed")
    store.closed.add("closed")
    with serving(store) as environment, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DMD_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        yield store
