"""A run that is killed or stopped anywhere ends as the run that never was."""

import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from commands import fails, finish, start, succeeds

from dmd_jax.errors import UserError
from dmd_jax.reporting.metrics import MetricsWriter, read_metrics
from dmd_jax.storage.weights import load_weights

STEPS = "--config.steps=60"
OFTEN = ("--config.checkpoint_every=5", "--config.log_every=1", "--config.picture_every=60")


def parameters(workdir):
    return jax.tree.leaves(load_weights(workdir / "weights").params)


@pytest.fixture(scope="module")
def never_stopped(tiny, tmp_path_factory):
    """The workdir of the run that nothing disturbs."""
    workdir = tmp_path_factory.mktemp("whole")
    finish(start("train", *tiny, "--workdir", workdir, STEPS, *OFTEN))
    return workdir


def wait_for_step(workdir, process, step):
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in read_metrics(workdir)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_five_kills_change_no_bit(tiny, never_stopped, tmp_path):
    moments = random.Random(0)
    steps = sorted(moments.sample(range(2, 58), 5))
    for step in steps:
        process = start("train", *tiny, "--workdir", tmp_path, STEPS, *OFTEN)
        wait_for_step(tmp_path, process, step)
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    output = finish(start("train", "--workdir", tmp_path))
    assert "going on from step" in output
    for found, expected in zip(parameters(tmp_path), parameters(never_stopped)):
        np.testing.assert_array_equal(found, expected)
    # The record is that of the whole run as well: each step once.
    timeless = [
        [{k: v for k, v in line.items() if k != "images_per_second"} for line in read_metrics(path)]
        for path in (tmp_path, never_stopped)
    ]
    assert timeless[0] == timeless[1]


def test_sigterm_saves_and_another_number_of_devices_goes_on(tiny, never_stopped, tmp_path):
    process = start("train", *tiny, "--workdir", tmp_path, STEPS, *OFTEN)
    wait_for_step(tmp_path, process, 7)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert "stopped at step" in output and "Traceback" not in output
    stopped_at = int(output.partition("stopped at step ")[2].partition(";")[0])
    assert (tmp_path / "checkpoints" / str(stopped_at)).is_dir()
    assert 7 <= stopped_at < 60
    output = finish(start("train", "--workdir", tmp_path, devices=4))
    assert f"going on from step {stopped_at}" in output
    for found, expected in zip(parameters(tmp_path), parameters(never_stopped)):
        np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()))


def test_a_run_is_not_taken_for_a_shorter_one(trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    line = fails(capsys, "train", "--workdir", workdir, "--config.steps=11")
    assert f"{workdir} is at step 12, not 11; expected steps of at least that, or another" in line
    # Nor does the refused config take the place of the run's own, which is finished.
    succeeds("train", "--workdir", workdir)
    assert "going on from step 12" in capsys.readouterr().err
    for found, expected in zip(parameters(workdir), parameters(trained)):
        np.testing.assert_array_equal(found, expected)


def test_an_error_leaves_the_checkpoint_before_it_whole(tiny, tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise UserError("no picture can be written")

    monkeypatch.setattr(MetricsWriter, "picture", refuse)
    options = (*tiny, "--workdir", tmp_path, "--config.picture_every=4")
    assert "no picture can be written" in fails(capsys, "train", *options)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]
