"""The comparison of objectives on a tiny network: its runs, its budget, its table, its refusals."""

import json
import shutil

import numpy as np
import pytest
from commands import ROOT, TINY, fails, succeeds
from PIL import Image

from dmd_jax.commands.compare import chosen_objectives, equal_steps
from dmd_jax.config import load_config
from dmd_jax.errors import UserError
from dmd_jax.objectives.kinds import KINDS
from dmd_jax.performance.flops import mean_flops

FAMILY = ROOT / "tests" / "configs" / "family.py"
NUM = 40


@pytest.fixture(scope="module")
def command(tiny):
    options = ("--num", NUM, "--config.log_every=4", "--config.steps=8", tiny[2])
    return ("compare", "--config", FAMILY, *options, "--seeds", "0")


@pytest.fixture(scope="module")
def workdir(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    objectives = "reflow,dmd2,four=dmd2+objective.num_steps=4"
    succeeds(*command, "--objectives", objectives, "--workdir", folder)
    return folder


def test_each_is_trained_with_the_operations_of_the_first(workdir):
    results = json.loads((workdir / "results.json").read_text())
    steps = {name: row["training"]["steps"] for name, row in results["rows"].items()}
    assert list(steps) == ["reflow", "dmd2", "four"] and steps["reflow"] == 8
    budget = 8 * mean_flops(load_config(f"{FAMILY}:reflow", []))
    for name, count in steps.items():
        saved = json.loads((workdir / name / "seed-0" / "config.json").read_text())["config"]
        assert saved["steps"] == count
        config = load_config(f"{FAMILY}:{saved['objective']['name']}", [])
        config.objective.update(saved["objective"])
        assert abs(count * mean_flops(config) - budget) <= mean_flops(config) / 2 or count == 1
        assert results["rows"][name]["training"]["seconds_per_step"] > 0
    four = json.loads((workdir / "four" / "seed-0" / "config.json").read_text())["config"]
    assert (four["objective"]["name"], four["objective"]["num_steps"]) == ("dmd2", 4)


def test_the_table_and_the_picture_hold_them_all(workdir):
    lines = (workdir / "comparison.md").read_text().splitlines()
    assert lines[0] == "# Objectives on family.py" and "from seed 0." in lines[2]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    assert rows[0][2] == "pixels" and rows[0][-4:] == ["precision", "recall", "steps", "ms a step"]
    assert [row[0] for row in rows[2:]] == [
        *("teacher", "teacher_one_step", "reflow", "dmd2", "four")
    ]
    assert rows[6][1] == "dmd2 objective.num_steps=4"
    results = json.loads((workdir / "results.json").read_text())
    for row in rows[4:]:
        figures = results["rows"][row[0]]["features"]["pixels"]["0"]
        assert row[2] == f"{figures['frechet_distance']:.3f}"
        assert row[-4:-2] == [f"{figures[name]:.3f}" for name in ("precision", "recall")]
    with Image.open(workdir / "comparison.png") as picture:
        assert picture.height == 5 * 34 + 2 and picture.width > 20 * 34 + 2


def test_what_is_finished_is_not_done_again_and_pairs_are_made_once(
    workdir, command, tmp_path, capsys
):
    assert (workdir / "pairs" / "metadata.json").exists()
    folder = tmp_path / "again"
    shutil.copytree(workdir, folder)
    succeeds(*command, "--objectives", "reflow,dmd2", "--workdir", folder)
    said = capsys.readouterr().err
    assert said.count("is finished") == 4 and "dmd-jax train" not in said
    # Without one that reads pairs there are none.
    assert not [line for line in said.splitlines() if line.startswith("$ dmd-jax evaluate")]


def test_a_generator_of_four_steps_is_judged_in_four(workdir):
    for name, (sampler, steps) in {"four": ("few-step", 4), "dmd2": ("one-step", 1)}.items():
        results = json.loads((workdir / name / "seed-0" / "results.json").read_text())
        assert (results["sampler"], results["num_steps"]) == (sampler, steps)


def test_mean_operations_are_those_of_the_turns():
    """A generator that updates on each n-th step: (whole + (n - 1) others) / n."""
    config = load_config(f"{FAMILY}:dmd2", [])
    found = []
    for every in (1, 2, 5, 1000):
        config.objective.generator_every = every
        found.append(mean_flops(config))
    whole, others = found[0], 2 * found[1] - found[0]
    assert found[2] == pytest.approx((whole + 4 * others) / 5)
    assert others < whole and found[3] == pytest.approx(others, rel=2e-3)
    assert equal_steps({"a": config, "b": config}) == {"a": 12, "b": 12}
    # The generator of four steps makes one and a half more in the mean: (0 + 1 + 2 + 3) / 4.
    config.objective.generator_every = 1
    config.objective.num_steps = 4
    forward = mean_flops(config) - whole
    reflow = load_config(f"{FAMILY}:reflow", [])  # a forward and a backward pass, of as many
    np.testing.assert_allclose(forward, 1.5 * mean_flops(reflow) / 3, rtol=0.1)


def test_names_of_variants():
    found = chosen_objectives("dmd, k4=dmd2+objective.num_steps=4+batch_size=8")
    assert found == {
        "dmd": ("dmd", []),
        "k4": ("dmd2", ["--config.objective.num_steps=4", "--config.batch_size=8"]),
    }
    for text, message in (
        ("dmd3", f"'dmd3' is unknown; expected some of {', '.join(KINDS)}"),
        ("dmd,dmd", "the name 'dmd' is given twice or is no plain word"),
        ("a/b=dmd", "the name 'a/b' is given twice or is no plain word"),
        ("", "'' is unknown"),
        ("teacher=dmd", "teacher is the study's own name"),
        ("pairs=dmd", "pairs is the study's own name"),
    ):
        with pytest.raises(UserError, match=message):
            chosen_objectives(text)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (("--objectives", "dmd,gan"), "--objectives: 'gan' is unknown; expected some of dmd, dmd2"),
        (("--objectives", "k=dmd2+objective.num_steps=3"), "3 steps of a generator; expected"),
        (("--objectives", "k=dmd2+objective.steps=3"), "the config has no key objective.steps"),
        (("--objectives", "dmd", "--seeds", "1,1"), "--seeds '1,1' has a number twice"),
        (("--objectives", "dmd", "--config", f"{FAMILY}:dmd"), "expected a file alone, whose arg"),
        (("--objectives", "dmd2", "--config.data.images="), "config.data.images is empty"),
        (("--objectives", "dmd", "--config", TINY), "get_config() takes no argument; expected one"),
    ],
)
def test_bad_input_is_named_before_anything_is_made(command, tmp_path, capsys, argv, named):
    assert named in fails(capsys, *command, *argv, "--workdir", tmp_path / "w")
    assert not (tmp_path / "w" / "config.json").exists()
