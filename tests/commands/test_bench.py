"""`dmd-jax bench`, on eight virtual devices and beside PyTorch on one."""

import json

import pytest
from commands import TINY, fails, finish, start, succeeds


def bench(tmp_path, *argv):
    """The results of a benchmark of the tiny config."""
    path = tmp_path / "results.json"
    succeeds("bench", "--config", TINY, "--steps", 3, "--json", path, *argv)
    return json.loads(path.read_text())


def test_training_step(tmp_path, capsys):
    results = bench(tmp_path, "--config.mesh.fsdp=2")
    assert results["devices"] == 8 and results["compute_dtype"] == "float32"
    assert results["matmul_precision"] == "highest"
    assert results["config"] == f"{TINY} --config.mesh.fsdp=2"
    (heat,) = results["heats"]
    (ours,) = heat["rivals"]
    assert heat["images"] == 16 and ours["name"] == "dmd_jax"
    assert ours["seconds"]["count"] == 3
    median = ours["seconds"]["median"]
    assert ours["images_per_second"] == pytest.approx(16 / median)
    assert ours["flops_per_second"] == pytest.approx(heat["flops"] / median)
    assert ours["utilisation"] is None  # of a CPU nobody says the peak
    assert ours["donated"] is True
    memory = ours["memory"]
    assert memory["aliased"] >= ours["state_bytes"] > 0
    used = memory["arguments"] + memory["outputs"] + memory["temporaries"] - memory["aliased"]
    assert ours["peak_bytes"] == used
    shown = capsys.readouterr()
    assert f"{ours['seconds']['median'] * 1e3:.4g} ms" in shown.out
    assert "taken over by each step: yes" in shown.out
    assert "bench: training step, dmd_jax: 5/5 rounds" in shown.err  # two of them warm up


def test_latency_is_of_one_image_on_one_device_and_samples_are_of_all(tmp_path):
    results = bench(tmp_path, "--what", "latency")
    assert results["devices"] == 1
    (heat,) = results["heats"]
    assert heat["images"] == 1
    latency_flops = heat["flops"]
    results = bench(tmp_path, "--what", "sample", "--config.pairs.batch_size=12")
    (heat,) = results["heats"]
    assert (results["devices"], heat["images"]) == (8, 16)  # a multiple of the devices
    assert heat["flops"] == 16 * latency_flops


def test_bad_input(capsys, tmp_path):
    command = ["bench", "--config", TINY]
    assert "--steps 0; expected at least 1" in fails(capsys, *command, "--steps", 0)
    line = fails(capsys, *command, "--config.batch_size=12")
    assert "config.batch_size=12 does not divide over 8 devices" in line
    assert "did you mean batch_size?" in fails(capsys, *command, "--config.batch_sise=8")
    assert "--peer numpy; expected MODULE:FUNCTION" in fails(capsys, *command, "--peer", "numpy")
    line = fails(capsys, *command, "--peer", "numpy:no_such")
    assert "--peer numpy:no_such: numpy has no function no_such; expected one" in line
    line = fails(capsys, *command, "--peer", "no_such:eager")
    assert "no_such:eager: ModuleNotFoundError: No module named 'no_such'; expected a" in line
    assert "expected a path on this host" in fails(capsys, *command, "--json", "gs://a/b.json")
    assert "no such file" in fails(capsys, "bench", "--config", tmp_path / "none.py")
    occupied = tmp_path / "file"
    occupied.write_text("")
    line = fails(capsys, *command, "--what", "latency", "--steps", 1, "--json", occupied / "x.json")
    assert "x.json cannot be written" in line


@pytest.mark.torch
def test_beside_pytorch_and_where_it_cannot_compile(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    argv = ["bench", "--config", TINY, "--steps", 2, "--json", path]
    argv += ["--peer", "tests.torch_peer:eager", "--peer", "tests.torch_peer:compiled"]
    monkeypatch.setenv("CXX", "/no/such/compiler")
    output = finish(start(*argv, devices=1))
    (heat,) = json.loads(path.read_text())["heats"]
    ours, eager, compiled = heat["rivals"]
    assert eager["ratio"]["median"] == pytest.approx(
        eager["seconds"]["median"] / ours["seconds"]["median"]
    )
    assert eager["ratio"]["p10"] <= eager["ratio"]["p90"]
    assert set(compiled) == {"name", "error"}
    assert "tests.torch_peer:compiled did not run: " in output


@pytest.mark.torch
def test_pytorch_takes_one_device(capsys):
    line = fails(
        capsys, "bench", "--config", TINY, "--peer", "tests.torch_peer:eager", "--steps", 1
    )
    assert "--peer on 8 devices; expected one" in line
