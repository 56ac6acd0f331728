"""`dmd-jax compile`: for TPUs by their compiler, and for virtual devices of this processor."""

import json
import sys

import pytest
from commands import TINY, fails, finish, start

from dmd_jax.performance.compilation import topology
from dmd_jax.performance.compilation.hlo import COLLECTIVES

BATCHES = ("--config.batch_size=16", "--config.objective.regression_batch_size=16")


def compiled(tmp_path, *arguments, code=0):
    """What the command prints and the figures that it writes."""
    file = tmp_path / "figures.json"
    output = finish(start("compile", "--config", TINY, "--json", file, *arguments), code)
    return output, json.loads(file.read_text())[0]


@pytest.mark.tpu
def test_a_small_step_for_sixteen_tpus_fits_takes_over_its_state_and_gathers_its_weights(tmp_path):
    output, found = compiled(
        tmp_path, *BATCHES, "--topology", "v5e:4x4", "--mesh", "data=1,fsdp=16"
    )
    assert "fits" in output and "v5e:4x4: 16, mesh data=1, fsdp=16" in output
    memory = found["memory"]
    assert found["fits"] and 0 < memory["share"] < 0.01
    # Every leaf of the state lies where it was; the metrics alone are new.
    assert memory["outputs"] - memory["aliased"] < 0.01 * memory["outputs"]
    parts = [memory[name] for name in ("arguments", "outputs", "temporaries", "code")]
    assert memory["total"] == sum(parts) - memory["aliased"]
    # fsdp: weights are gathered, and of their gradients each device keeps its part.
    assert found["collective_bytes"]["all-gather"] > 100_000
    assert found["collective_bytes"].keys() & {"all-reduce", "reduce-scatter"}
    sent = [found["collective_bytes"].get(kind, 0) for kind in ("all-reduce", *COLLECTIVES)]
    assert found["collective_seconds"] == pytest.approx(sum(sent) / 200e9)
    assert found["cycles"] > 100_000 and 0 < found["utilisation"] < 1
    assert found["images_per_second"] == pytest.approx(16 / found["step_seconds"])


@pytest.mark.tpu
def test_its_memory_is_known_before_its_code_is_made(tmp_path):
    arguments = (*BATCHES, "--topology", "v5e:4x4", "--mesh", "data=1,fsdp=16", "--until-memory")
    output, found = compiled(tmp_path, *arguments)
    assert "large buffer" in output and "estimate" not in output
    assert "HBM before the machine code, which adds to it; at most 92%" in output
    memory = found["memory"]
    # The whole step's are 0.8 MB of arguments for each of 16 chips.
    assert memory.keys() == {"arguments", "temporaries", "total", "share"}
    assert found["fits"] and 500_000 < memory["arguments"] < 1_000_000
    assert found["aliased_outputs"] > 50 and found["collective_bytes"]["all-gather"] > 100_000


@pytest.mark.tpu
def test_what_does_not_fit_ends_with_1_and_the_figures(tmp_path):
    many = ("--what", "sample", "--config.pairs.batch_size=16777216")
    output, found = compiled(tmp_path, *many, "--topology", "v5e:2x2", code=1)
    assert "does not fit" in output and "of 15.75G HBM a chip" in output and not found["fits"]


@pytest.mark.tpu
@pytest.mark.parametrize("what", ["pairs", "sample"])
def test_sampling_for_the_chips_of_a_host(tmp_path, what):
    output, found = compiled(tmp_path, "--topology", "v5e:4x4", "--what", what)
    assert found["devices"] == 4 and found["images"] == 16 and found["fits"]
    assert found["collective_bytes"] == {}
    assert ("heun, 2 steps" in output) == (what == "pairs")


@pytest.mark.tpu
def test_slices_that_are_no_topology_are_refused(capsys):
    line = fails(capsys, "compile", "--config", TINY, "--topology", "v5e:3x3")
    assert "v5e:3x3" in line and "v5e:2x2, 2x4" in line


def test_virtual_devices(tmp_path):
    output, found = compiled(tmp_path, "--devices", 4, "--mesh", "fsdp=2")
    assert found["mesh"] == {"data": 2, "fsdp": 2} and found["images"] == 16
    assert found["memory"]["aliased"] > 0.99 * found["memory"]["outputs"]
    assert "utilisation" not in output
    command = ("compile", "--join", tmp_path / "figures.json", tmp_path / "figures.json")
    header, _, *rows = finish(start(*command), 0).splitlines()
    assert header.startswith("| program | slice | devices | mesh | images |")
    assert len(rows) == 2
    assert rows[0].startswith("| tiny | 4 virtual CPU devices | 4 | 2x2 | 16 |")
    assert rows[0].endswith(" | – | – |")  # the time of a step, which needs the TPU compiler


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--topology", "v9:4x4"], "unknown topology 'v9:4x4'; expected v4:2x2x1"),
        (["--topology", "v5e"], "unknown topology 'v5e'"),
        (["--topology", "v5e:4x4", "--devices", 4], "not allowed with"),
        ([], "one of the arguments --topology --devices --join is required"),
        (
            ["--join", __file__],
            "test_compile.py cannot be read as JSON (Extra data: line 1 column 3",
        ),
        (["--join", "none.json"], "none.json: no such file"),
        (["--devices", 0], "--devices 0; expected 1 to 4096"),
        (["--topology", "v5e:4x4", "--slices", 0], "--slices 0; expected at least 1"),
        (["--devices", 4, "--until-memory"], "--until-memory is the TPU compiler's"),
    ],
)
def test_bad_arguments(capsys, arguments, line):
    assert line in fails(capsys, "compile", "--config", TINY, *arguments)


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--mesh", "data=3"], "mesh data=3, fsdp=1 does not multiply to the 4 devices"),
        (["--mesh", "rows=3"], "--mesh rows=3; expected such as data=1,fsdp=64"),
        (["--config.batch_size=18"], "config.batch_size=18 does not divide over 4 devices"),
    ],
)
def test_meshes_and_batches_that_do_not_fit(arguments, line):
    output = finish(start("compile", "--config", TINY, "--devices", 4, *arguments), 2)
    assert line in output.replace("\n", " ")


def test_a_config_is_needed(capsys):
    assert "no --config; expected" in fails(capsys, "compile", "--devices", 4)


def test_without_the_compiler_its_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.setattr(topology, "_ENVIRONMENT", {})
    line = fails(capsys, "compile", "--config", TINY, "--topology", "v5e:4x4")
    assert "pip install dmd_jax[tpu]" in line
