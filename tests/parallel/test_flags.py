"""Flags of JAX that change numbers end a command by their name."""

import shutil

import jax
import pytest
from commands import fails, finish, start, succeeds

from dmd_jax.parallel.flags import EXPECTED, fall_back, rounding_flags
from dmd_jax.storage.weights import packaged

# A value of each that is not the expected one.
OTHER = {
    "jax_enable_x64": True,
    "jax_threefry_partitionable": False,
    "jax_default_prng_impl": "rbg",
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_random_seed_offset": 3,
    "jax_error_checking_behavior_divide": "raise",
    "jax_error_checking_behavior_nan": "raise",
    "jax_error_checking_behavior_oob": "raise",
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


def test_flags_that_round_are_those_of_the_environment_and_of_jax(monkeypatch):
    count = "--xla_force_host_platform_device_count"
    monkeypatch.setenv("XLA_FLAGS", f"--xla_b=2  {count}=8 --xla_a=1")
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    found = rounding_flags()
    assert found["XLA_FLAGS"] == "--xla_a=1 --xla_b=2" and found["LIBTPU_INIT_ARGS"] == ""
    monkeypatch.setenv("XLA_FLAGS", f"--xla_a=1 {count}=2 --xla_b=2")
    assert rounding_flags() == found
    with jax.default_matmul_precision("bfloat16"):
        assert rounding_flags() == found | {"jax_default_matmul_precision": "bfloat16"}


def test_a_run_that_goes_on_with_other_flags_says_so(trained, tmp_path, monkeypatch, capsys):
    workdir = shutil.copytree(trained, tmp_path / "run")
    succeeds("train", "--workdir", workdir)
    assert "may round otherwise" not in capsys.readouterr().err
    before = rounding_flags()["XLA_FLAGS"]
    monkeypatch.setenv("XLA_FLAGS", "--xla_other=1")  # which JAX has read long ago
    succeeds("train", "--workdir", workdir)
    assert (
        f"train: XLA_FLAGS is '--xla_other=1', {before!r} at step 12: numbers may round otherwise "
        "than those of a run that was never stopped" in capsys.readouterr().err
    )


@pytest.mark.parametrize("platforms", ["cuda", "nonsense"])
def test_devices_that_are_not_there_are_one_line(monkeypatch, tmp_path, platforms):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    weights = ("--weights", packaged("digits_teacher"))
    said = finish(start("sample", *weights, "--num", 1, "--out", tmp_path / "a.npy"), code=2)
    assert f"dmd-jax: error: JAX_PLATFORMS is {platforms}, and JAX finds no such devices" in said
    assert "Traceback" not in said


def test_a_fall_back_to_the_cpu_is_said_once(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    weights = ("--weights", packaged("digits_teacher"))
    said = finish(start("sample", *weights, "--num", 1, "--out", tmp_path / "a.npy"), code=0)
    assert said.count("dmd-jax: warning: JAX_PLATFORMS is cuda,cpu, of which only cpu has") == 1


@pytest.mark.parametrize(
    "found, asked, installed, said",
    [
        ("cpu", None, [], None),
        ("cpu", "cpu", ["jax_cuda13_plugin"], None),
        ("gpu", None, ["jax_cuda13_plugin"], None),
        ("cpu", None, ["jax_cuda13_plugin"], "finds no NVIDIA GPU here"),
        ("cpu", "", ["libtpu"], "finds no TPU here"),
        ("cpu", "cuda,cpu", [], "JAX_PLATFORMS is cuda,cpu"),
    ],
)
def test_what_is_a_fall_back(found, asked, installed, said):
    line = fall_back(found, asked, installed)
    assert line is None if said is None else said in line
