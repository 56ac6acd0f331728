"""Two real processes with jax.distributed are one run, with the numbers of one process."""

import jax
import numpy as np
from commands import fails, finish, free_port, start, succeeds

from dmd_jax.metrics import read_metrics
from dmd_jax.weights import load_weights


def test_two_processes_train_and_give_the_numbers_of_one(tiny, tmp_path):
    fsdp = "--config.mesh.fsdp=2"
    succeeds("train", *tiny, fsdp, "--workdir", tmp_path / "one")
    address = f"127.0.0.1:{free_port()}"
    processes = [
        start(
            "train",
            *tiny,
            fsdp,
            "--workdir",
            tmp_path / "two",
            "--coordinator",
            address,
            "--processes",
            2,
            "--process",
            index,
            devices=4,
        )
        for index in range(2)
    ]
    for process in processes:
        finish(process)
    one, two = (load_weights(tmp_path / name / "weights").params for name in ("one", "two"))
    for found, expected in zip(jax.tree.leaves(two), jax.tree.leaves(one)):
        np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()))
    for found, expected in zip(read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")):
        for name in expected.keys() - {"images_per_second"}:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, err_msg=name)
    # Either number of processes goes on from what the other wrote.
    succeeds("train", "--workdir", tmp_path / "two", "--config.steps=14")
    assert read_metrics(tmp_path / "two")[-1]["step"] == 14


def test_incomplete_process_flags_are_refused(capsys, tiny, tmp_path):
    line = fails(capsys, "train", *tiny, "--workdir", tmp_path, "--processes", 2)
    assert "--coordinator" in line
    line = fails(capsys, "train", *tiny, "--workdir", tmp_path, "--coordinator", "127.0.0.1:1")
    assert "needs --processes and --process" in line
