"""Heats, of rivals that only move a clock of their own, and their table."""

from types import SimpleNamespace

import numpy as np
import pytest

from dmd_jax import progress
from dmd_jax.performance.benchmark import rivals, timing
from dmd_jax.performance.benchmark.rivals import Heat, Rival, run_heat
from dmd_jax.performance.benchmark.table import table


@pytest.fixture
def machine(monkeypatch):
    """Makes rivals that take so many seconds, and logs what happens."""
    state = {"now": 0.0, "log": []}

    def rival(name, seconds, **facts):
        state["log"].append(f"make {name}")

        def work():
            state["log"].append(name)
            state["now"] += seconds

        return Rival(work, lambda: facts, lambda: state["log"].append(f"release {name}"))

    def in_turns(works, rounds, warm_up, told):
        options = {"warm_up": warm_up, "told": told}
        return timing.in_turns(works, rounds, clock=lambda: state["now"], **options)

    monkeypatch.setattr(rivals, "in_turns", in_turns)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: state["now"]))
    return rival, state["log"]


def test_figures_and_ratio(machine):
    rival, log = machine
    peers = {"torch": lambda: rival("theirs", 0.75, version="2")}
    heat = Heat("step", 8, 4_000, lambda: rival("ours", 0.5, donated=True), peers)
    found = run_heat(heat, 3, separately=False, peak=16_000.0)
    mine, theirs = found["rivals"]
    assert (found["title"], found["images"], found["flops"]) == ("step", 8, 4_000)
    assert (mine["name"], theirs["name"]) == ("dmd_jax", "torch")
    assert mine["seconds"]["median"] == 0.5
    assert mine["images_per_second"] == 16
    assert mine["flops_per_second"] == 8_000 and mine["utilisation"] == 0.5
    assert mine["donated"] is True and theirs["version"] == "2"
    assert "ratio" not in mine
    assert theirs["ratio"] == {"median": 1.5, "p10": 1.5, "p90": 1.5}
    assert log[:2] == ["make ours", "make theirs"]
    assert log[-2:] == ["release ours", "release theirs"]


def test_separately_each_is_released_before_the_next_is_made_and_ours_is_last(machine):
    rival, log = machine
    peers = {"torch": lambda: rival("b", 1), "torch-compile": lambda: rival("c", 3)}
    heat, lines = Heat("step", 1, 1, lambda: rival("a", 2), peers), []
    found = run_heat(heat, 1, separately=True, peak=None, told=lines.append)
    assert [entry for entry in log if " " in entry] == [
        "make b",
        "release b",
        "make c",
        "release c",
        "make a",
        "release a",
    ]
    assert [row["name"] for row in found["rivals"]] == ["dmd_jax", "torch", "torch-compile"]
    ratios = [row.get("ratio", {}).get("median") for row in found["rivals"]]
    assert ratios == [None, 0.5, 1.5]
    assert found["rivals"][0]["utilisation"] is None
    assert lines == [
        "step, torch: compiling",
        "step, torch: 3/3 rounds",
        "step, torch-compile: compiling",
        "step, torch-compile: 3/3 rounds",
        "step, dmd_jax: compiling",
        "step, dmd_jax: 3/3 rounds",
    ]


def test_progress_is_a_line_in_ten_seconds(machine):
    rival, _ = machine
    lines = []
    heat = Heat("step", 1, 1, lambda: rival("a", 2), {"torch": lambda: rival("b", 1)})
    run_heat(heat, 8, separately=False, peak=None, told=lines.append)
    assert [line for line in lines if "rounds" in line] == [
        f"step, dmd_jax, torch: {done}/10 rounds" for done in (4, 8, 10)
    ]


def test_a_peer_that_cannot_run_is_told_of_and_the_others_go_on(machine):
    rival, _ = machine

    def failing():
        raise RuntimeError("no compiler\nand a long trace")

    def failing_at_work():
        return Rival(failing, dict, lambda: None)

    peers = {"torch-compile": failing_at_work, "torch": lambda: rival("b", 1)}
    ours = lambda: rival("a", 2, donated=False, peak_bytes=2**30)  # noqa: E731
    heat = Heat("step", 4, 2_000_000_000, ours, peers)
    found = run_heat(heat, 2, separately=False, peak=None)
    names = [row["name"] for row in found["rivals"]]
    assert names == ["dmd_jax", "torch-compile", "torch"]
    assert found["rivals"][1] == {
        "name": "torch-compile",
        "error": "RuntimeError: no compiler",
    }
    results = {"machine": "a machine", "config": "x.py"}
    results |= {"compute_dtype": "float32", "matmul_precision": "high"}
    shown = table(results | {"heats": [found]})
    assert "torch-compile did not run: RuntimeError: no compiler" in shown
    rows = {line.split()[0]: line for line in shown.splitlines() if line}
    assert np.char.count(rows["dmd_jax"], "2000 ms") == 3
    assert "1.00 GiB" in rows["dmd_jax"] and "0.001" in rows["dmd_jax"]
    assert rows["torch"].endswith("0.50 (0.50 to 0.50)")
    assert "taken over by each step: NO" in shown
    assert "step, 4 images, 2.0 GFLOP" in shown
