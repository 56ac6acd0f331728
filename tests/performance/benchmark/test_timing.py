import itertools

import numpy as np
import pytest

from dmd_jax.performance.benchmark.timing import in_turns, ratio, summary


class Machine:
    """A clock that only work moves, and the order in which it was done."""

    def __init__(self):
        self.now, self.done = 0.0, []

    def work(self, name, seconds):
        taken = iter(seconds)

        def work():
            self.done.append(name)
            self.now += next(taken)

        return work


def test_rivals_take_turns_in_both_orders_and_warm_up_does_not_count():
    machine = Machine()
    rivals = {
        "a": machine.work("a", [100, 1, 2, 3]),
        "b": machine.work("b", itertools.chain([200], itertools.repeat(5))),
    }
    seconds = in_turns(rivals, 3, warm_up=1, clock=lambda: machine.now)
    assert "".join(machine.done) == "abbaabba"
    assert {name: list(each) for name, each in seconds.items()} == {"a": [1, 2, 3], "b": [5, 5, 5]}


def test_summary():
    found = summary(np.arange(1.0, 12.0))
    assert found == {"median": 6.0, "p10": 2.0, "p90": 10.0, "fastest": 1.0, "count": 11}


def test_ratio_is_of_the_medians_with_the_spread_of_the_rounds():
    found = ratio(np.array([2.0, 6.0, 40.0]), np.array([1.0, 2.0, 4.0]))
    assert found["median"] == 3.0
    # The rounds' ratios are 2, 3 and 10.
    assert (found["p10"], found["p90"]) == pytest.approx((2.2, 8.6))
