"""Flags of JAX that change numbers end a command by their name."""

import jax
import pytest
from commands import fails, finish, start

from dmd_jax.flags import EXPECTED

# A value of each that is not the expected one.
OTHER = {
    "jax_enable_x64": True,
    "jax_threefry_partitionable": False,
    "jax_default_prng_impl": "rbg",
    "jax_numpy_dtype_promotion": "strict",
    "jax_random_seed_offset": 3,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_flag_that_changes_numbers_is_named(capsys, tmp_path, name):
    before = getattr(jax.config, name)
    jax.config.update(name, OTHER[name])
    try:
        line = fails(capsys, "sample", "--weights", tmp_path, "--out", tmp_path / "a.npy")
    finally:
        jax.config.update(name, before)
    assert name.upper() in line


def test_a_flag_of_the_environment_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    said = finish(start("sample", "--weights", tmp_path, "--out", tmp_path / "a.npy"), code=2)
    assert "JAX_ENABLE_X64 is True" in said and "Traceback" not in said
