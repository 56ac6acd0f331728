"""launch/tpu_train.sh against a stand-in gcloud, whose workers are folders of this machine.

Most tests put a stub in the place of dmd_jax on the workers; one trains for real.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, TINY, free_port
from stand_in_gcloud import Cloud

from dmd_jax.reporting.metrics import read_metrics

ENV = shutil.which("env")
SCRIPT = ROOT / "launch" / "tpu_train.sh"
ZONE = ["my-tpu", "--zone", "us-west4-a"]

# In the place of Python on a worker: notes what it is asked, and does what the test's script says.
STUB = r"""#!/usr/bin/env bash
worker=${HOSTNAME##*-w-}
note=$STUB/$HOSTNAME
echo >>"$note.attempts"
attempt=$(wc -l <"$note.attempts")
printf '%s\n' "$@" >"$note.arguments"
env >"$note.environment"
source "$STUB/script"
"""


class Bench:
    """A stand-in cloud, a stub for the workers, and the script's outputs."""

    def __init__(self, folder: Path):
        self.cloud = Cloud(folder / "cloud")
        self.bin, self.stub, self.folder = folder / "bin", folder / "stub", folder
        self.processes: list[subprocess.Popen] = []
        (self.stub / "venv" / "bin").mkdir(parents=True)
        self.bin.mkdir()
        self.cloud.install(self.bin)
        python = self.stub / "venv" / "bin" / "python"
        python.write_text(STUB)
        python.chmod(0o755)
        self.behave("echo trained")
        self.common = ["--type", "v5e-8", "--workdir", folder / "run", "--poll", "0.1"]
        self.common += ["--venv", self.stub / "venv", "--env", f"STUB={self.stub}"]

    def behave(self, script: str) -> None:
        (self.stub / "script").write_text(script)

    def start(self, *arguments, path: str | None = None) -> subprocess.Popen:
        path = f"{self.bin}:{os.environ['PATH']}" if path is None else path
        # What starts the tests may ignore SIGINT, which bash would inherit and could not undo.
        process = subprocess.Popen(
            [ENV, "--default-signal=INT", "bash", str(SCRIPT), *map(str, arguments)],
            env={"PATH": path, "HOME": str(self.folder)},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def run(self, *arguments, code: int = 0, path: str | None = None):
        return self.finish(self.start(*arguments, path=path), code)

    def finish(self, process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
        out, err = process.communicate(timeout=500)
        assert process.returncode == code, out + err
        return out, err

    def train(self, *arguments, code: int = 0):
        return self.run(*ZONE, *self.common, *arguments, code=code)

    def verbs(self) -> list[str]:
        """What was asked of gcloud, without the looks."""
        verbs = [" ".join(call[2:4]) for call in self.cloud.calls()]
        return [verb for verb in verbs if not verb.endswith("describe")]

    def note(self, worker: str, kind: str) -> list[str]:
        return (self.stub / f"{worker}.{kind}").read_text().splitlines()

    def has_started(self) -> bool:
        """Whether the stub has run on both workers."""
        return all((self.stub / f"my-tpu-w-{worker}.environment").exists() for worker in (0, 1))


def wait_for(condition, process: subprocess.Popen) -> None:
    until = time.monotonic() + 500
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    for process in bench.processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.communicate(timeout=20)
    for name in bench.cloud.names():
        bench.cloud.remove(name)


def test_a_run_from_nothing_to_its_end(bench):
    bench.behave("test -f tests/configs/tiny.py && echo trained")
    words = ["--config.data.prompts=a file's name", '--config.note=$HOME `ls` "&" ü']
    out, err = bench.train(
        "--config",
        "tests/configs/tiny.py",
        "--env=XLA_FLAGS=--one --two",
        "--create-flag=--network=my-net",
        "--",
        *words,
    )
    assert out == "trained\n"
    assert bench.verbs() == [
        "tpu-vm create",
        "tpu-vm ssh",  # is a run going on?
        "tpu-vm scp",
        "tpu-vm ssh",  # unpack and install
        "tpu-vm ssh",  # start
        *["tpu-vm ssh"] * 2,  # its end, and its log
        "tpu-vm delete",
    ]
    (create,) = (call for call in bench.cloud.calls() if call[3] == "create")
    assert {"--accelerator-type=v5litepod-8", "--version=v2-alpha-tpuv5-lite"} <= set(create)
    assert "--network=my-net" in create
    tokens = set()
    for worker in ("my-tpu-w-0", "my-tpu-w-1"):
        workdir = str(bench.folder / "run")
        assert bench.note(worker, "arguments") == [
            *["-m", "dmd_jax", "train", "--config", "tests/configs/tiny.py"],
            *["--workdir", workdir, *words, "--coordinator", "auto"],
        ]
        environment = bench.note(worker, "environment")
        assert "XLA_FLAGS=--one --two" in environment
        assert "JAX_PLATFORMS=tpu,cpu" in environment
        assert f"JAX_COMPILATION_CACHE_DIR={workdir}/jax_cache" in environment
        tokens.update(line for line in environment if line.startswith("DMD_JAX_TOKEN="))
    # All workers of a start have the same token, and nobody else can guess it.
    assert len(tokens) == 1 and re.fullmatch("DMD_JAX_TOKEN=[0-9a-f]{32}", *tokens)
    assert bench.cloud.names() == []
    assert "the run has finished" in err


def test_a_tpu_that_was_there_is_used_and_kept(bench):
    bench.cloud.add("my-tpu", "v5litepod-8", {})
    _, err = bench.train()
    assert "tpu-vm create" not in bench.verbs() and "tpu-vm delete" not in bench.verbs()
    assert "my-tpu stays" in err
    code = bench.cloud.home("my-tpu", 1) / "dmd_jax" / "code"
    assert (code / "dmd_jax" / "commands" / "train.py").read_bytes() == (
        ROOT / "dmd_jax" / "commands" / "train.py"
    ).read_bytes()
    assert not list(code.rglob("__pycache__"))
    _, err = bench.run(*ZONE, *bench.common, "--type", "v4-8", code=1)
    assert "my-tpu is there already, a v5litepod-8; expected a v4-8" in err


def test_a_tpu_that_was_made_is_kept_on_demand(bench):
    bench.train("--keep")
    assert bench.cloud.names() == ["my-tpu"]
    bench.run(*ZONE, "--delete")
    assert bench.cloud.names() == []
    _, err = bench.run(*ZONE, "--delete", code=1)
    assert err == "tpu_train.sh: error: there is no TPU my-tpu in us-west4-a\n"


def test_a_worker_that_dies_is_started_again_with_the_others(bench):
    # The other worker hangs, as one in a collective does.
    bench.behave(
        'case $worker$attempt in 01) sleep 600 ;; 11) seq 30; exit 3 ;; *) echo "went on" ;; esac'
    )
    out, err = bench.train()
    assert out == "went on\n"
    lines = [line for line in err.splitlines() if line.startswith("my-tpu-w-1: ")]
    assert lines == [f"my-tpu-w-1: {number}" for number in range(11, 31)]
    assert "the run ended: 3; starting it again from its newest checkpoint (1 of 3)" in err
    assert bench.verbs().count("tpu-vm create") == 1


def test_retries_are_bounded_and_the_exit_code_is_the_runs(bench):
    bench.behave("exit 7")
    _, err = bench.train("--retries", "1", code=7)
    assert len(bench.note("my-tpu-w-1", "attempts")) == 2
    assert "error: the run ended: 7, after 1 retries; my-tpu stays" in err
    assert "--delete" in err and bench.cloud.names() == ["my-tpu"]


def test_bad_input_is_not_tried_again(bench):
    bench.behave("echo 'dmd-jax: error: config.steps is 0'; exit 2")
    _, err = bench.train(code=2)
    assert len(bench.note("my-tpu-w-0", "attempts")) == 1
    assert re.search("my-tpu-w-[01]: dmd-jax: error: config.steps is 0", err)


def test_a_preempted_tpu_is_replaced_and_the_run_goes_on(bench):
    bench.behave('[ "$attempt" != 1 ] || sleep 600; echo "went on"')
    process = bench.start(*ZONE, *bench.common, "--spot", "--retries", "0")
    wait_for(bench.has_started, process)
    bench.cloud.fault("create", "RESOURCE_EXHAUSTED: There is no more capacity in the zone")
    bench.cloud.preempt("my-tpu")
    out, err = bench.finish(process)
    assert out == "went on\n"
    creations = ["tpu-vm create", "tpu-vm delete", *["tpu-vm create"] * 2, "tpu-vm delete"]
    assert [verb for verb in bench.verbs() if not verb.endswith(("ssh", "scp"))] == creations
    assert "my-tpu is PREEMPTED" in err and "no capacity for my-tpu" in err
    assert all("--spot" in call for call in bench.cloud.calls() if call[3] == "create")


def test_a_stop_by_a_signal_of_the_machine_is_no_end(bench):
    bench.behave(
        'if [ "$attempt" = 1 ]; then echo "dmd-jax: stopped at step 4; go on"; else echo end; fi'
    )
    out, err = bench.train()
    assert out == "dmd-jax: stopped at step 4; go on\nend\n"
    assert "the run ended: stopped; starting it again" in err


def test_interrupted_followed_again_and_stopped(bench):
    bench.behave("trap 'echo dmd-jax: stopped at step 4; exit' TERM; echo going; sleep 600 & wait")
    process = bench.start(*ZONE, *bench.common)
    wait_for(lambda: bench.has_started() and len(bench.verbs()) == 7, process)
    os.killpg(process.pid, signal.SIGINT)
    _, err = bench.finish(process, code=130)
    assert "the run goes on in my-tpu, and so does its cost" in err
    stop = "launch/tpu_train.sh my-tpu --zone=us-west4-a --stop"
    assert stop in err

    _, err = bench.run(*ZONE, *bench.common, "--", "--config.steps=7", code=1)
    assert f"another run is going on in my-tpu; this ends it with a checkpoint: {stop}" in err

    process = bench.start(*ZONE, *bench.common)
    assert process.stdout.readline() == "going\n"
    _, err = bench.run(*shlex.split(stop)[1:])
    assert "has a checkpoint and has ended" in err
    out, err = bench.finish(process)
    assert out == "dmd-jax: stopped at step 4\n"
    assert "the run has a checkpoint and was stopped, as --stop asked; my-tpu stays" in err
    assert len(bench.note("my-tpu-w-0", "attempts")) == 1
    assert bench.cloud.names() == ["my-tpu"]
    _, err = bench.run(*shlex.split(stop)[1:], code=1)
    assert err == "tpu_train.sh: error: no run is going on in my-tpu\n"


def test_a_lost_connection_is_made_again(bench):
    bench.behave('echo 1; until [ -e "$STUB/lost" ]; do sleep 0.1; done; echo 2; echo 3')
    process = bench.start(*ZONE, *bench.common)
    assert process.stdout.readline() == "1\n"
    os.killpg(_connection(process.pid), signal.SIGKILL)
    (bench.stub / "lost").touch()
    out, err = bench.finish(process)
    assert out == "2\n3\n"
    assert "lost the connection to my-tpu" in err


def _connection(script: int) -> int:
    """The process group in which the script runs the ssh whose output it shows."""
    for child in Path(f"/proc/{script}/task/{script}/children").read_text().split():
        if os.getpgid(int(child)) != script:
            return int(child)
    raise AssertionError("the script has no connection")


def test_a_queued_run_of_two_slices(bench):
    _, err = bench.train("--slices", "2", "--coordinator", ":8476")
    create, *_ = (call for call in bench.cloud.calls() if call[3] == "create")
    assert create[2:5] == ["queued-resources", "create", "my-tpu"]
    assert {"--node-count=2", "--node-prefix=my-tpu"} <= set(create)
    assert "my-tpu: WAITING_FOR_RESOURCES" in err and "my-tpu: PROVISIONING" in err
    places = {}
    for process, worker in enumerate(["my-tpu-0-w-0", "my-tpu-0-w-1", "my-tpu-1-w-0"]):
        places[process] = bench.note(worker, "arguments")[-6:]
        assert places[process] == [
            *["--coordinator", "127.0.0.1:8476", "--processes", "4", "--process", str(process)]
        ]
    assert bench.verbs()[-1] == "queued-resources delete"
    assert bench.cloud.names() == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["My TPU"], "the TPU's name is 'My TPU'; expected small letters, digits and hyphens"),
        (["t"], "--zone is missing"),
        (["t", "--zone=z"], "--workdir is missing"),
        (["t", "--zone=z", "--workdir=w"], "--type is missing, such as --type v5e-256"),
        (["t", "--zone"], "--zone is given without its value"),
        (["t", "--zone=z", "--colour=red"], "unknown option --colour"),
        (["t", "u"], "unexpected argument u; arguments of dmd-jax train come after --"),
        (["t", "--zone=z", "--workdir=w", "--type=h100"], "--type h100; expected v4-N, v5e-N"),
        (["t", "--zone=z", "--env", "1=2"], "--env 1=2; expected NAME=VALUE"),
        (["t", "--zone=z", "--slices=0"], "--slices 0; expected a number from 1"),
        (["t", "--zone=z", "--retries=many"], "--retries many; expected a number from 0"),
        (
            ["t", "--zone=z", "--workdir=w", "--type=v4-8", "--config=no.py"],
            "--config no.py: no such file",
        ),
        (
            ["t", "--zone=z", "--workdir=w", "--type=v4-8", "--config", "/etc/passwd"],
            "is not in ",
        ),
        (
            ["t", "--zone=z", "--workdir=w", "--coordinator", "somewhere"],
            "--coordinator somewhere; expected auto, HOST:PORT or :PORT",
        ),
        (
            ["t", "--zone=z", "--workdir=w", "--queued", "--preemptible"],
            "--preemptible is not for queued resources; expected --spot",
        ),
    ],
)
def test_bad_arguments_end_in_one_line_before_anything_is_done(bench, arguments, line):
    _, err = bench.run(*arguments, code=1)
    assert err.startswith("tpu_train.sh: error: ") and line in err
    assert err.count("\n") == 1
    assert bench.cloud.calls() == []


def test_failures_of_gcloud_end_in_one_line(bench):
    tools = bench.folder / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "basename"):
        (tools / tool).symlink_to(shutil.which(tool))
    _, err = bench.run(*ZONE, *bench.common, code=1, path=str(tools))
    assert err == (
        "tpu_train.sh: error: gcloud is not on the PATH; expected the Google Cloud CLI\n"
    )
    bench.cloud.fault("create", "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied")
    _, err = bench.train(code=1)
    assert err.splitlines()[-1] == (
        "tpu_train.sh: error: gcloud compute tpus tpu-vm create failed: ERROR: "
        "(gcloud.compute.tpus.tpu-vm.create) PERMISSION_DENIED: Permission "
        "'tpu.nodes.create' denied ; --queued waits for capacity"
    )
    bench.cloud.fault("describe", *["the network is unreachable"] * 5)
    _, err = bench.train(code=1)
    assert "describe failed: ERROR: " in err and "the network is unreachable" in err
    bench.cloud.fault("scp", "SSH Key is not present in the SSH agent.")
    _, err = bench.train(code=1)
    assert "scp failed" in err and "SSH Key is not present in the SSH agent" in err
    _, err = bench.train("--venv", "/no/such/venv", code=1)
    assert "--venv /no/such/venv: no /no/such/venv/bin/python on my-tpu-w-" in err
    assert bench.verbs().count("tpu-vm delete") == 0


def test_a_queued_tpu_that_is_refused_ends_in_one_line(bench):
    queue = bench.folder / "cloud" / "queue" / "my-tpu.json"
    queue.parent.mkdir(parents=True)
    queue.write_text('{"nodes": ["my-tpu"], "states": ["FAILED"]}')
    _, err = bench.train("--queued", code=1)
    assert err.splitlines()[-1] == (
        "tpu_train.sh: error: my-tpu is FAILED (no such quota); expected READY: start it, or "
        "delete it with --delete"
    )


def test_dry_run_prints_what_would_be_done_and_does_nothing(bench):
    out, err = bench.run(
        *ZONE,
        *["--type=v6e-64", "--workdir=gs://bucket/my run", "--config=configs/digits.py:a b"],
        *["--project=p", "--preemptible", "--dry-run", "--", "--config.steps=7"],
        path=os.environ["PATH"],
    )
    assert err == "" and bench.cloud.calls() == []
    lines = [shlex.split(line) for line in out.splitlines() if not line.startswith("#")]
    assert [line[:4] for line in lines if line[0] == "gcloud"] == [
        ["gcloud", "compute", "tpus", "tpu-vm"]
    ] * (len(lines) - 1)
    verbs = [line[4] if line[0] == "gcloud" else line[0] for line in lines]
    assert verbs == [
        *["describe", "create", "describe", "ssh", "tar", "scp", "ssh", "ssh", "ssh", "ssh"],
        "delete",
    ]
    assert all(
        {"--zone=us-west4-a", "--project=p"} <= set(line) for line in lines if line[0] == "gcloud"
    )
    assert {"--accelerator-type=v6e-64", "--version=v2-alpha-tpuv6e", "--preemptible"} <= set(
        lines[1]
    )
    (start,) = (word for word in lines[7] if word.startswith("--command="))
    words = shlex.split(start.removeprefix("--command="))
    assert words[:3] == ["bash", "dmd_jax/code/launch/tpu/worker.sh", "start"]
    assert re.fullmatch("DMD_JAX_TOKEN=[0-9a-f]{32}", words[4])
    assert words[5:] == [
        "JAX_PLATFORMS=tpu,cpu",
        "JAX_COMPILATION_CACHE_DIR=gs://bucket/my run/jax_cache",
        "--",
        *["--config", "configs/digits.py:a b", "--workdir", "gs://bucket/my run"],
        *["--config.steps=7", "--coordinator", "auto"],
    ]


def test_training_survives_the_death_of_a_worker(bench, tiny, tmp_path):
    workdir = tmp_path / "run"
    steps = ["--config.steps=8", "--config.checkpoint_every=2", "--config.log_every=2"]
    # On CPU a process finds only its own programs in JAX's cache, and only process 0 writes any.
    flags = "--xla_backend_optimization_level=0"
    process = bench.start(
        *ZONE,
        *["--type", "v5e-8", "--workdir", workdir, "--poll", "0.1", "--venv", sys.prefix],
        *["--config", TINY, "--coordinator", f":{free_port()}", "--env", f"XLA_FLAGS={flags}"],
        *["--env", "JAX_PLATFORMS=cpu", "--env", "JAX_ENABLE_COMPILATION_CACHE=false"],
        *["--", *tiny[2:], *steps, "--config.picture_every=8"],
    )
    wait_for(lambda: (workdir / "checkpoints" / "2").exists(), process)
    bench.cloud.kill("my-tpu", 1)
    out, err = bench.finish(process)
    # The other worker's end, for want of this one, may be told first.
    assert re.search("the run on my-tpu-w-(1 ended: lost|0 ended: 75)", err), err + out
    (started_at,) = re.findall(r"going on from step (\d+)", out)
    assert 2 <= int(started_at) < 8
    assert [line["step"] for line in read_metrics(workdir)] == [2, 4, 6, 8]
    assert (workdir / "checkpoints" / "8").is_dir()
    assert (workdir / "weights" / "model.safetensors").is_file()
    assert bench.cloud.names() == []
