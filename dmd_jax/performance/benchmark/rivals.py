"""What is timed against what, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from dmd_jax.errors import first_line
from dmd_jax.performance.benchmark.timing import Work, in_turns, ratio, summary
from dmd_jax.progress import Pace

OURS = "dmd_jax"
WARM_UP = 2
_SECONDS_A_LINE = 10  # of progress


class Rival(NamedTuple):
    """Something that can be timed."""

    work: Work
    facts: Callable[[], dict[str, Any]]  # what is known of it once it has run, JSON-able
    release: Callable[[], None]  # of its devices' memory


class Heat(NamedTuple):
    """One unit of work, done by us and by others."""

    title: str
    images: int  # of a unit
    flops: int  # that the model needs for it, whoever does it
    ours: Callable[[], Rival]
    peers: Mapping[str, Callable[[], Rival]]
    uneven: bool = False  # units differ, so that speeds are of their mean and not of the median


def run_heat(
    heat: Heat,
    rounds: int,
    *,
    separately: bool,
    peak: float | None,
    told: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Times all of them, and releases them; a peer that cannot run is told of, not raised.

    Args:
      separately: each is released before the next is made, which saves memory; else they take
        turns. Ours is then the last: JAX keeps what it has once taken of a GPU's memory
        (documentation of JAX, "GPU memory allocation"), and PyTorch gives it back.
      peak: the devices' operations a second, where known. told: a line of progress, now and then.

    Returns:
      JSON-able: "title", "images", "flops" and the "rivals", ours first, each with its "name" and
      either "error" or "seconds", "images_per_second", "flops_per_second", "utilisation" and its
      facts; the peers also with "ratio", how many times longer they take.
    """
    results: dict[str, dict[str, Any]] = {name: {} for name in (OURS, *heat.peers)}
    seconds: dict[str, np.ndarray] = {}
    running: dict[str, Rival] = {}

    def finish() -> None:
        if not running:
            return
        works = {name: rival.work for name, rival in running.items()}
        shown = _rounds(f"{heat.title}, {', '.join(works)}", WARM_UP + rounds, told)
        seconds.update(in_turns(works, rounds, warm_up=WARM_UP, told=shown))
        for name, rival in running.items():
            results[name] |= rival.facts()
            rival.release()
        running.clear()

    def make_ours() -> None:
        told(f"{heat.title}, {OURS}: compiling")
        running[OURS] = heat.ours()

    if not separately:
        make_ours()
    for name, make in heat.peers.items():
        told(f"{heat.title}, {name}: compiling")
        try:
            running[name] = make()
            running[name].work()  # compiles, or shows that it cannot
        except Exception as error:  # Its libraries and its compiler may raise anything.
            running.pop(name, None)
            results[name]["error"] = f"{type(error).__name__}: {first_line(error)}"
        if separately:
            finish()
    if separately:
        make_ours()
    finish()
    for name, taken in seconds.items():
        results[name] |= _figures(taken, heat, peak)
        if name != OURS:
            results[name]["ratio"] = ratio(taken, seconds[OURS])
    rows = [{"name": name} | result for name, result in results.items()]
    return {"title": heat.title, "images": heat.images, "flops": heat.flops, "rivals": rows}


def _rounds(names: str, total: int, told: Callable[[str], None]) -> Callable[[int], None]:
    """Tells of rounds, a line in so many seconds at most, and of the last."""
    pace = Pace(_SECONDS_A_LINE)

    def shown(done: int) -> None:
        if done == total or pace.due():
            told(f"{names}: {done}/{total} rounds")

    return shown


def _figures(seconds: np.ndarray, heat: Heat, peak: float | None) -> dict[str, Any]:
    taken = summary(seconds)
    typical = float(np.mean(seconds)) if heat.uneven else taken["median"]
    flops = heat.flops / typical
    return {
        "seconds": taken,
        "images_per_second": heat.images / typical,
        "flops_per_second": flops,
        "utilisation": None if peak is None else flops / peak,
    }
