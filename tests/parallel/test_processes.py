"""Real processes with jax.distributed are one run, which any number of them goes on with."""

import re
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest
from commands import ROOT, TINY, fails, finish, free_port, start, succeeds
from company import each
from strangers import STRANGERS, visit

from dmd_jax.parallel.lifeline import LOST
from dmd_jax.reporting.metrics import read_metrics
from dmd_jax.storage.checkpoints import restore_subtree
from dmd_jax.storage.weights import load_weights

HOST = socket.gethostname()
SMALL = (ROOT / "tests" / "helpers" / "small_teacher.py",)
OFTEN = ("--config.checkpoint_every=3", "--config.log_every=1", "--config.picture_every=100000")


@pytest.fixture
def several():
    """Starts so many processes of one run; none outlives the test."""
    started = []

    def start_several(count, *argv, devices=1, **options):
        address = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", count, "--process")
        run = [start(*argv, *address, index, devices=devices, **options) for index in range(count)]
        started.extend(run)
        return run

    yield start_several
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def several_small(several):
    """As `several`, of `teacher` with the tests' own network."""

    def start_small(count, workdir, *argv, **options):
        endless = "--config.teaching.steps=100000"
        argv = ("teacher", "--config", TINY, "--workdir", workdir, endless, *OFTEN, *argv)
        return several(count, *argv, program=SMALL, **options)

    return start_small


def wait_for_steps(workdir, processes, more):
    """Until the run has done that many steps more than it has by now."""

    def done():
        return max((line["step"] for line in read_metrics(workdir)), default=0)

    before, deadline = done(), time.monotonic() + 500
    while done() < before + more:
        assert all(process.poll() is None for process in processes), [
            process.communicate()[0] for process in processes if process.poll() is not None
        ]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stopped_at(output):
    return int(re.search(r"stopped at step (\d+);", output)[1])


def average(workdir):
    _, _, params = restore_subtree(workdir / "checkpoints", ["players/teacher/ema"])
    return jax.tree.leaves(params)


def same(found, expected):
    """To 1e-5 of the largest number of each array, or of 1."""
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1, np.abs(other).max()))


def test_four_processes_then_two_then_one_are_the_run_of_one(several_small, tmp_path):
    workdir = tmp_path / "run"
    four = several_small(4, workdir, "--config.mesh.fsdp=2")
    wait_for_steps(workdir, four, 5)
    four[2].send_signal(signal.SIGTERM)
    steps = {stopped_at(finish(process)) for process in four}
    assert len(steps) == 1
    (stopped,) = steps
    assert (workdir / "checkpoints" / str(stopped)).is_dir()

    # What one of the four wrote is torn. Two processes fall back together, and one is killed.
    written_by_one = workdir / "checkpoints" / str(stopped) / "state" / "ocdbt.process_3"
    for path in (written_by_one / "d").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    two = several_small(2, workdir, "--config.mesh.fsdp=4", devices=2)
    wait_for_steps(workdir, two, 4)
    two[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    output = finish(two[0], LOST)
    assert time.monotonic() - began < 20
    assert f"dmd-jax: error: process 1 ({HOST}) is gone" in output
    assert "Traceback" not in output
    before = stopped - 1 - (stopped - 1) % 3
    for told in (output, two[1].communicate()[0]):
        assert f"{stopped} is not whole" in told
    assert f"going on from step {before} in" in output or before == 0
    assert (workdir / "checkpoints" / f"broken-{stopped}").is_dir()

    # Ctrl-C in one of two.
    two = several_small(2, workdir, devices=2)
    wait_for_steps(workdir, two, 2)
    two[0].send_signal(signal.SIGINT)
    stopped = stopped_at(finish(two[0], 130))
    assert stopped_at(finish(two[1])) == stopped

    steps = f"--config.teaching.steps={stopped + 3}"
    finish(start("teacher", "--workdir", workdir, steps, program=SMALL))
    argv = ("teacher", "--config", TINY, *OFTEN, steps, "--workdir", tmp_path / "whole")
    finish(start(*argv, program=SMALL))
    same(average(workdir), average(tmp_path / "whole"))
    assert [line["step"] for line in read_metrics(workdir)] == list(range(1, stopped + 4))


def test_two_processes_train_and_give_the_numbers_of_one(several, tiny, trained, tmp_path):
    # Each has half of each large array, also of those that are written at the end.
    argv = ("train", *tiny, "--config.mesh.fsdp=4", "--workdir", tmp_path / "two")
    for process in several(2, *argv, devices=2):
        finish(process)
    two, one = (load_weights(path / "weights").params for path in (tmp_path / "two", trained))
    same(jax.tree.leaves(two), jax.tree.leaves(one))
    for found, expected in zip(read_metrics(tmp_path / "two"), read_metrics(trained), strict=True):
        for name in expected.keys() - {"images_per_second"}:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, err_msg=name)
    # One process goes on from what two wrote.
    succeeds("train", "--workdir", tmp_path / "two", "--config.steps=14")
    assert read_metrics(tmp_path / "two")[-1]["step"] == 14


def test_processes_of_different_configs_write_nothing(tmp_path):
    workdir = tmp_path / "run"
    address = f"127.0.0.1:{free_port()}"
    several = ("--coordinator", address, "--processes", 2, "--process")
    argv = ("teacher", "--config", TINY, "--workdir", workdir)
    sizes = "--config.teaching.batch_size=8", "--config.teaching.batch_size=4"
    both = [start(*argv, sizes[index], *several, index) for index in range(2)]
    for process in both:
        output = finish(process, 2)
        assert (
            f"dmd-jax: error: the processes are not of one run: in process 1 ({HOST}) "
            f"config.teaching.batch_size is 4 and 8 in process 0 ({HOST}); expected the same "
            "command, config, code and flags in each"
        ) in output
        assert output.count("error:") == 1
    assert not workdir.exists()


def joined(several, count, *argv):
    """So many processes of tests/helpers/waiting.py that have done a step."""
    run = several(count, *argv, program=(ROOT / "tests" / "helpers" / "waiting.py",))
    for process in run:
        assert process.stdout.readline() == "joined\n"
    return run


@pytest.mark.parametrize(("asked", "number"), [(1, signal.SIGTERM), (0, signal.SIGINT)])
def test_a_signal_to_one_stops_all_at_one_step(several, asked, number):
    run = joined(several, 3)
    time.sleep(0.5)
    run[asked].send_signal(number)
    others = [process for process in run if process is not run[asked]]
    outputs = [finish(run[asked], number), *(finish(one, signal.SIGTERM) for one in others)]
    steps = {re.match(r"stopped at (\d+) by \d+\n$", output)[1] for output in outputs}
    assert len(steps) == 1 and int(steps.pop()) > 101


def test_a_second_signal_ends_a_run_that_hangs(several):
    run = joined(several, 3, "--hang")
    time.sleep(1)
    run[1].send_signal(signal.SIGTERM)
    time.sleep(1)
    assert [process.poll() for process in run] == [None] * 3
    run[1].send_signal(signal.SIGTERM)
    line = "ended by a second signal that asked it to stop\n"
    assert finish(run[1], 143) == f"dmd-jax: {line}"
    for process in (run[0], run[2]):
        assert finish(process, 143) == f"dmd-jax: error: process 1 ({HOST}) {line}".replace(
            ") ended", ") ended:"
        )


@pytest.mark.parametrize("killed", [0, 1])
def test_strangers_end_no_run_and_a_killed_process_ends_it_by_one_line(
    several, killed, monkeypatch
):
    monkeypatch.setenv("DMD_JAX_TOKEN", "of this run")
    run = joined(several, 3)
    port = int(run[0].args[run[0].args.index("--coordinator") + 1].rpartition(":")[2])
    client = (
        "import jax; jax.distributed.initialize("
        f"'127.0.0.1:{port}', 3, 1, [0], initialization_timeout=1)"
    )
    jaxs_own = start("-c", client, program=())
    each(len(STRANGERS), lambda index: visit(port, list(STRANGERS.values())[index]))
    jaxs_own.communicate(timeout=100)
    assert jaxs_own.returncode != 0
    assert [process.poll() for process in run] == [None] * 3
    began = time.monotonic()
    run.pop(killed).send_signal(signal.SIGKILL)
    line = f"dmd-jax: error: process {killed} ({HOST}) is gone; its own output may tell why\n"
    assert [finish(process, LOST) for process in run] == [line] * 2
    assert time.monotonic() - began < 5


def test_a_process_that_does_not_come_is_reported(capsys, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    argv = ("teacher", "--config", TINY, "--workdir", tmp_path / "run", "--coordinator", address)
    argv = (*argv, "--processes", 2, "--coordinator-timeout", 1)
    began = time.monotonic()
    line = fails(capsys, *argv, "--process", 0)
    assert f"{address}: 1 of 2 processes came within 1 s; missing: 1" in line
    line = fails(capsys, *argv, "--process", 1)
    assert f"{address} did not answer process 1 ({HOST}) within 1 s" in line
    assert time.monotonic() - began < 10
    assert not (tmp_path / "run").exists()


def test_process_flags_that_are_no_run_are_refused(capsys, tmp_path, monkeypatch):
    for name in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    argv = ("teacher", "--config", TINY, "--workdir", tmp_path / "run")
    address = ("--coordinator", "127.0.0.1:1")
    for flags, expected in (
        (("--processes", 2), "need --coordinator HOST:PORT"),
        (address, "needs --processes and --process"),
        ((*address, "--processes", 2, "--process", 2), "expected one from 0 to 1"),
        (("--coordinator", "here", "--processes", 2, "--process", 1), "expected HOST:PORT or auto"),
        (("--coordinator", "auto", "--processes", 2), "expected neither"),
        (("--coordinator", "auto"), "finds no cluster here"),
        ((*address, "--coordinator-timeout", 0), "--coordinator-timeout 0; expected seconds"),
    ):
        assert expected in fails(capsys, *argv, *flags)
    assert not (tmp_path / "run").exists()


def test_a_profile_has_the_steps_that_were_asked_for(tiny, trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    argv = ("train", "--workdir", workdir, "--config.steps=15")
    for bad in ("3", "0:2", "5:4", "14:16", "a:b"):
        assert f"--profile {bad}; expected A:B" in fails(capsys, *argv, "--profile", bad)
    succeeds(*argv, "--profile", "2:14")
    (path,) = (workdir / "profile").rglob("*.xplane.pb")
    steps = [
        stat[1]
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
        for stat in event.stats
        if stat[0] == "step_num"
    ]
    assert sorted(steps) == [13, 14]  # the run had done 12
    capsys.readouterr()
    succeeds(*argv, "--profile", "2:14")
    assert "the run is at step 15 already; no trace" in capsys.readouterr().err
