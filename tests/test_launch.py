"""The launch scripts, run for real: in a copy of the checkout, with stubs in the place of Python.

The stub Python keeps a log of what it is asked to do and does nothing but make the files that the
real one would, so that no test installs anything.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from dmd_jax.commands import ablate, study_command

ROOT = Path(__file__).resolve().parents[1]
SOURCED = ("launch/common.sh", "launch/gpu.sh")
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "launch").rglob("*.sh"))
TOOLS = ("bash", "cat", "cksum", "cp", "dirname", "env", "grep", "mkdir", "rm", "tr")
EXTRA_PINS = ("tests/requirements-torch.txt", "tests/requirements-tpu.txt")

STUB_PYTHON = r"""#!/usr/bin/env bash
case "$*" in
  "-c import sys; sys.exit("*) exit "${STUB_TOO_OLD:-0}" ;;
  "-c import ensurepip, venv") exit "${STUB_NO_VENV:-0}" ;;
  "-c import sys; print("*) echo python3.11-venv; exit ;;
  "-m pip --version") exit "${STUB_NO_PIP:-0}" ;;
esac
printf '%s' "${0##*/}" >>"$STUB_LOG"
printf ' [%s]' "$@" >>"$STUB_LOG"
printf '\n' >>"$STUB_LOG"
case "$1 $2" in
  "-m venv")
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    cp "$0" "$3/bin/dmd-jax" ;;
  "-m pip") exit "${STUB_PIP_FAILS:-0}" ;;
  train*) env >"$STUB_LOG.environment" ;;
  "-m pytest" | "quickstart --workdir") exit "${STUB_RUN_FAILS:-0}" ;;
esac
"""


class Checkout:
    """A copy of what the scripts read, and a PATH with only stubs and a few plain tools."""

    def __init__(self, folder: Path):
        self.root = folder / "a checkout"  # a space, as paths of people have
        self.tools, self.log = folder / "bin", folder / "log"
        for path in (self.root / "tests", self.tools):
            path.mkdir(parents=True)
        shutil.copytree(ROOT / "launch", self.root / "launch")
        for name in ("setup.py", "requirements.txt", *EXTRA_PINS):
            shutil.copy(ROOT / name, self.root / name)
        for tool in TOOLS:
            (self.tools / tool).symlink_to(shutil.which(tool))

    def add_python(self, name: str = "python3.11", folder: Path | None = None) -> None:
        path = (folder or self.tools) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STUB_PYTHON)
        path.chmod(0o755)

    def run(self, script: str, *arguments: str, cwd: Path | None = None, **environment: str):
        environment = {
            "PATH": str(self.tools),
            "STUB_LOG": str(self.log),
            **environment,
        }
        return subprocess.run(
            [str(self.tools / "bash"), str(self.root / "launch" / script), *arguments],
            cwd=cwd or self.root.parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[str]:
        """What was asked of the Pythons since the last look."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [line.replace(str(self.root), "ROOT") for line in lines]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


TESTS = "python [-m] [pytest] [--numprocesses=2] [--dist=loadfile] [--no-loadscope-reorder]"
PYTEST = f"{TESTS} [-m] [not torch and not tpu]"
BASE = "[-m] [pip] [install] [-qq] [--requirement] [ROOT/requirements.txt]"
EDITABLE = "[-m] [pip] [install] [-qq] [--no-deps] [--no-build-isolation] [--editable] [ROOT]"


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_parses_the_script(script):
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_shellcheck_finds_nothing():
    shellcheck = Path(sysconfig.get_path("scripts")) / "shellcheck"
    command = [str(shellcheck), "--external-sources", "--shell=bash", *SCRIPTS, ".ci/run"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


@pytest.mark.parametrize(
    "script", [*(script for script in SCRIPTS if script.count("/") == 1), ".ci/run"]
)
def test_script_is_executable(script):
    assert os.access(ROOT / script, os.X_OK) == (script not in SOURCED)


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_no_python_at_all(checkout, script):
    result = checkout.run(script)
    assert result.returncode == 1
    assert result.stderr == (
        f"{script}: error: found no Python 3.11 or newer among python3.11, python3.12, python3.13 "
        "and python3; on Debian and Ubuntu: apt-get install python3.11 python3.11-venv\n"
    )
    assert not (checkout.root / ".venv").exists()


def test_only_an_old_python(checkout):
    checkout.add_python("python3")
    result = checkout.run("quickstart.sh", STUB_TOO_OLD="1")
    assert result.returncode == 1
    assert "found no Python 3.11 or newer" in result.stderr
    assert checkout.calls() == []


def test_python_without_the_venv_module(checkout):
    checkout.add_python("python3")
    result = checkout.run("quickstart.sh", STUB_NO_VENV="1")
    assert result.returncode == 1
    assert result.stderr == (
        f"quickstart.sh: error: {checkout.tools}/python3 has no venv module, which makes virtual "
        "environments; on Debian and Ubuntu: apt-get install python3.11-venv\n"
    )
    assert checkout.calls() == []


def test_another_python_is_taken_where_the_first_has_no_venv_module(checkout):
    checkout.add_python("python3.12")
    broken = checkout.tools / "python3.11"
    broken.write_text('#!/usr/bin/env bash\n[[ "$*" != *ensurepip* ]]\n')
    broken.chmod(0o755)
    assert checkout.run("test.sh").returncode == 0
    assert checkout.calls()[0] == "python3.12 [-m] [venv] [ROOT/.venv]"


def test_the_pythons_are_tried_in_the_order_of_the_pins(checkout):
    for name in ("python3", "python3.13", "python3.11", "python3.12"):
        checkout.add_python(name)
    checkout.run("test.sh")
    assert checkout.calls()[0] == "python3.11 [-m] [venv] [ROOT/.venv]"


def test_quickstart_from_nothing_and_again(checkout, tmp_path):
    checkout.add_python()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    result = checkout.run("quickstart.sh", "--seed", "a b", cwd=elsewhere)
    assert result.returncode == 0, result.stderr
    start = "dmd-jax [quickstart] [--workdir] [ROOT/runs/quickstart]"
    assert checkout.calls() == [
        "python3.11 [-m] [venv] [ROOT/.venv]",
        f"python {BASE}",
        f"python {EDITABLE}",
        f"{start} [--seed] [a b]",
    ]
    assert list(elsewhere.iterdir()) == []
    result = checkout.run("quickstart.sh")
    assert (result.returncode, result.stderr) == (0, "")
    assert checkout.calls() == [start]


@pytest.mark.parametrize("changed", ["requirements.txt", "setup.py"])
def test_changed_pins_are_installed_once(checkout, changed):
    checkout.add_python()
    checkout.run("test.sh")
    checkout.calls()
    with (checkout.root / changed).open("a") as file:
        file.write("# one more\n")
    checkout.run("test.sh")
    assert checkout.calls() == [f"python {BASE}", f"python {EDITABLE}", PYTEST]
    checkout.run("test.sh")
    assert checkout.calls() == [PYTEST]


def test_a_moved_checkout_is_installed_again(checkout):
    environment = checkout.root.parent / "environment"
    for name in ("python", "dmd-jax"):
        checkout.add_python(name, environment / "bin")
    checkout.run("test.sh", VIRTUAL_ENV=str(environment))
    checkout.calls()
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    checkout.run("test.sh", VIRTUAL_ENV=str(environment))
    assert checkout.calls()[1] == f"python {EDITABLE}"


def test_what_some_tests_need_is_installed_and_they_are_added_only_when_asked_for(checkout):
    checkout.add_python()
    checkout.run("test.sh", "-x", "--with-torch", "tests/data")
    assert checkout.calls()[1:] == [
        f"python {BASE} [--requirement] [ROOT/{EXTRA_PINS[0]}]",
        f"python {EDITABLE}",
        f"{TESTS} [-m] [not tpu] [-x] [tests/data]",
    ]
    checkout.run("test.sh", "--with-tpu")
    assert checkout.calls() == [
        f"python {BASE} [--requirement] [ROOT/{EXTRA_PINS[1]}]",
        f"python {EDITABLE}",
        f"{TESTS} [-m] [not torch]",
    ]
    checkout.run("test.sh", "-x")
    assert checkout.calls()[-1] == f"{PYTEST} [-x]"


def test_an_active_environment_is_used(checkout, tmp_path):
    environment = tmp_path / "active"
    for name in ("python", "dmd-jax"):
        checkout.add_python(name, environment / "bin")
    result = checkout.run("quickstart.sh", VIRTUAL_ENV=str(environment))
    assert result.returncode == 0, result.stderr
    assert checkout.calls()[0] == f"python {BASE}"
    assert not (checkout.root / ".venv").exists()


@pytest.mark.parametrize("too_old", ["0", "1"])
def test_an_active_environment_without_a_recent_python(checkout, tmp_path, too_old):
    environment = tmp_path / "active"
    if too_old == "1":
        checkout.add_python("python", environment / "bin")
    result = checkout.run("test.sh", VIRTUAL_ENV=str(environment), STUB_TOO_OLD=too_old)
    assert result.returncode == 1
    assert result.stderr == (
        f"test.sh: error: {environment}/bin/python is no working Python 3.11 or newer: deactivate "
        f"{environment} if it is the active environment, else remove it, and try again\n"
    )


def test_an_environment_whose_python_is_gone_is_left_alone(checkout):
    checkout.add_python()
    (checkout.root / ".venv" / "bin").mkdir(parents=True)
    (checkout.root / ".venv" / "bin" / "python").symlink_to("/no/such/python")
    result = checkout.run("test.sh")
    assert result.returncode == 1
    assert ".venv/bin/python is no working Python 3.11 or newer" in result.stderr
    assert checkout.calls() == []


def test_pip_is_added_where_the_environment_has_none(checkout):
    checkout.add_python()
    checkout.run("test.sh", STUB_NO_PIP="1")
    assert checkout.calls()[1:3] == ["python [-m] [ensurepip]", f"python {BASE}"]


def test_a_failed_installation_ends_it_and_is_tried_again(checkout):
    checkout.add_python()
    result = checkout.run("quickstart.sh", STUB_PIP_FAILS="7")
    assert result.returncode == 7
    assert checkout.calls()[1:] == [f"python {BASE}"]
    assert checkout.run("quickstart.sh").returncode == 0
    assert checkout.calls()[:2] == [f"python {BASE}", f"python {EDITABLE}"]


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_exit_code_of_the_command_is_that_of_the_script(checkout, script):
    checkout.add_python()
    assert checkout.run(script, STUB_RUN_FAILS="5").returncode == 5


def test_ci_runs_all_tests(checkout):
    shutil.copytree(ROOT / ".ci", checkout.root / ".ci")
    checkout.add_python()
    checkout.run("../.ci/run", CI="true")
    assert checkout.calls()[-1] == f"{TESTS} [-m] []"


def add_gpus(checkout, *drivers: str, code: int = 0) -> None:
    lines = "".join(f"echo '{driver}'\n" for driver in drivers)
    path = checkout.tools / "nvidia-smi"
    path.write_text(f"#!/usr/bin/env bash\n{lines}exit {code}\n")
    path.chmod(0o755)


def test_gpu_training_from_nothing(checkout):
    checkout.add_python()
    add_gpus(checkout, "580.65.06", "580.65.06")
    result = checkout.run("gpu_train.sh", "--config", "configs/a b.py", "--config.steps=7")
    assert result.returncode == 0, result.stderr
    assert checkout.calls() == [
        "python3.11 [-m] [venv] [ROOT/.venv]",
        f"python {BASE}",
        f"python {BASE} [--no-build-isolation] [--editable] [ROOT[gpu]]",
        "dmd-jax [train] [--config] [configs/a b.py] [--config.steps=7]",
    ]
    environment = (checkout.log.parent / "log.environment").read_text().splitlines()
    assert "JAX_PLATFORMS=cuda,cpu" in environment
    assert f"JAX_COMPILATION_CACHE_DIR={checkout.root}/.cache/jax" in environment
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.9" in environment
    assert "XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true" in environment
    assert "driver" not in result.stderr
    checkout.run("gpu_train.sh")
    assert checkout.calls() == ["dmd-jax [train]"]


def test_gpu_settings_of_the_user_are_kept_and_one_gpu_exchanges_nothing(checkout):
    checkout.add_python()
    add_gpus(checkout, "535.1")
    result = checkout.run(
        "gpu_train.sh", XLA_PYTHON_CLIENT_MEM_FRACTION="0.5", JAX_PLATFORMS="cuda"
    )
    assert "the driver is 535.1, and CUDA 13" in result.stderr
    environment = (checkout.log.parent / "log.environment").read_text().splitlines()
    assert {"XLA_PYTHON_CLIENT_MEM_FRACTION=0.5", "JAX_PLATFORMS=cuda"} <= set(environment)
    assert not any(line.startswith("XLA_FLAGS") for line in environment)
    add_gpus(checkout, "580.1", "580.1")
    checkout.run("gpu_train.sh", XLA_FLAGS="--xla_dump_to=d")
    environment = (checkout.log.parent / "log.environment").read_text().splitlines()
    assert "XLA_FLAGS=--xla_dump_to=d" in environment


def test_no_gpu_is_one_line_and_nothing_is_installed(checkout):
    checkout.add_python()
    result = checkout.run("gpu_train.sh")
    assert (result.returncode, result.stderr) == (
        1,
        "gpu_train.sh: error: nvidia-smi is not on the PATH; expected an NVIDIA GPU and its "
        "driver\n",
    )
    add_gpus(checkout, "NVIDIA-SMI has failed", "because it has no driver", code=9)
    result = checkout.run("gpu_train.sh")
    assert (result.returncode, result.stderr) == (
        1,
        "gpu_train.sh: error: nvidia-smi does not work: NVIDIA-SMI has failed because it has no "
        "driver\n",
    )
    add_gpus(checkout, "No devices were found")
    result = checkout.run("gpu_train.sh")
    assert result.stderr == "gpu_train.sh: error: nvidia-smi lists no GPU\n"
    assert checkout.calls() == []


def test_the_flags_for_gpus_are_the_pinned_xlas():
    flags = re.findall(r"--xla_\w+=\w+", (ROOT / "launch" / "gpu.sh").read_text())
    assert flags
    # XLA ends the process at a flag that it does not know.
    for flag, fails in [*((flag, False) for flag in flags), ("--xla_gpu_no_such=true", True)]:
        command = "from jaxlib import xla_client; xla_client.make_cpu_client()"
        environment = {**os.environ, "XLA_FLAGS": flag}
        result = subprocess.run(
            [sys.executable, "-c", command], env=environment, capture_output=True, text=True
        )
        assert (result.returncode != 0) == fails, result.stderr


def evaluated(line):
    """What `dmd-jax ablate`, called as the line says, measures by, as evaluate's arguments."""
    parser = argparse.ArgumentParser()
    ablate.add_arguments(parser)
    given, _ = parser.parse_known_args(re.findall(r"\[(.*?)\]", line)[1:])
    return study_command._parsed(
        study_command.evaluate_arguments(given, ConfigDict({"data": {"images": "digits"}}))
    )


def test_gpu_bench_does_what_has_no_figures(checkout):
    checkout.add_python()
    add_gpus(checkout, "580.1")
    folder = checkout.root / "figures of mine"
    folder.mkdir()
    for name in ("cifar10_cond.json", "sd15_latency.json"):
        (folder / name).touch()
    result = checkout.run("gpu_bench.sh", str(folder))
    assert result.returncode == 0, result.stderr
    bench, *others = [line for line in checkout.calls() if line.startswith("dmd-jax")]
    assert bench.startswith("dmd-jax [bench] [--json] [ROOT/figures of mine/sd15.json]")
    assert bench.count("[--peer]") == 2
    assert [line.split()[1] for line in others] == ["[convert]", "[teacher]", "[ablate]"]
    assert all(
        "[--config.data.images=pad2:tfds:fashion_mnist:train]" in line for line in others[1:]
    )
    judge = evaluated(others[-1])
    assert (judge.num, judge.features) == (10_000, ["vgg16"]) and judge.repeat_grey
    assert str(judge.lpips) == str(folder / "lpips.safetensors")
    assert (folder / "fashion_mnist.seconds").read_text().strip().isdigit()
    again = checkout.run("gpu_bench.sh", str(folder))
    assert [line for line in checkout.calls() if line.startswith("dmd-jax")] == [bench]
    assert f"the figures are in {folder}" in again.stderr


def test_gpu_bench_is_rehearsed_without_a_gpu(checkout):
    checkout.add_python()
    result = checkout.run("gpu_bench.sh", "--small")
    assert result.returncode == 0, result.stderr
    lines = [line for line in checkout.calls() if line.startswith("dmd-jax")]
    parts = [line.split()[1] for line in lines]
    assert parts == ["[bench]"] * 3 + ["[convert]", "[teacher]", "[ablate]"]
    judge = evaluated(lines[-1])
    assert (judge.num, judge.vgg_resolution, judge.num_reference) == (640, 64, 1000)
    assert (checkout.root / "runs" / "gpu_bench" / "fashion_mnist.seconds").exists()


def test_tpu_table_compiles_what_has_no_figures(checkout):
    checkout.add_python()
    folder = checkout.root / "runs" / "tpu_table"
    folder.mkdir(parents=True)
    (folder / "cifar10_cond-v5e-2x4-highest.json").touch()
    assert checkout.run("tpu_table.sh").returncode == 0
    *compiled, joined = [line for line in checkout.calls() if line.startswith("dmd-jax")]
    files = [re.search(r"\[--json\] \[(.*?)\]", line)[1] for line in compiled]
    assert len(files) == len(set(files)) == 7
    files.insert(0, "ROOT/runs/tpu_table/cifar10_cond-v5e-2x4-highest.json")
    assert joined == f"dmd-jax [compile] [--join] {' '.join(f'[{file}]' for file in files)}"
