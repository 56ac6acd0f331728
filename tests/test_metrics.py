"""What a run writes and shows."""

import json

import pytest

from dmd_jax import metrics


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (200, "3m20s"), (18_420, "5h07m")],
)
def test_duration(seconds, text):
    assert metrics.duration(seconds) == text


def test_progress_tells_rate_and_time_left(monkeypatch, capsys):
    clock = iter([100.0, 110.0, 120.0, 140.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    progress = metrics.Progress("train", 1000, start=100, per_step=8)  # at 100 s
    progress.restart(110)  # at 110 s: compilation does not count
    progress.update(210)  # at 120 s: 100 steps in 10 s
    progress.update(310, "loss 0.5")  # at 140 s: 200 steps in 30 s, 100 of them in 20 s
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train  210/1,000  80.0 images/s  1m19s left"
    assert lines[1] == "train  310/1,000  40.0 images/s  1m44s left  loss 0.5"


def test_progress_without_a_known_end(monkeypatch, capsys):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    metrics.Progress("check", None, unit="rows").update(5000, "so far")
    assert capsys.readouterr().err == "check  5,000  500.0 rows/s  so far\n"


def test_a_pace_is_due_so_long_after_the_last(monkeypatch):
    clock = iter([100.0, 101.0, 102.5, 103.5, 105.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    pace = metrics.Pace(2.0)  # at 100 s
    assert [pace.due() for _ in range(4)] == [False, True, False, True]


def test_lines_after_the_step_to_go_on_from_are_dropped(tmp_path):
    writer = metrics.MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.scalars(step, {"loss": step / 2})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # as a kill leaves it
    writer = metrics.MetricsWriter(tmp_path, step=2)
    writer.scalars(3, {"loss": 7.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 7.0},
    ]


def test_other_processes_write_nothing(tmp_path):
    writer = metrics.MetricsWriter(tmp_path / "none", enabled=False)
    writer.scalars(1, {"loss": 0.0})
    writer.close()
    assert not (tmp_path / "none").exists()
