"""What a run writes and shows."""

import json

import pytest

from dmd_jax import progress
from dmd_jax.reporting import metrics


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (200, "3m20s"), (18_420, "5h07m")],
)
def test_duration(seconds, text):
    assert progress.duration(seconds) == text


def test_progress_tells_rate_and_time_left(monkeypatch, capsys):
    clock = iter([100.0, 110.0, 120.0, 140.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    shown = progress.Progress("train", 1000, start=100, per_step=8)  # at 100 s
    shown.restart(110)  # at 110 s: compilation does not count
    shown.update(210)  # at 120 s: 100 steps in 10 s
    shown.update(310, "loss 0.5")  # at 140 s: 200 steps in 30 s, 100 of them in 20 s
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train  210/1,000  80.0 images/s  1m19s left"
    assert lines[1] == "train  310/1,000  40.0 images/s  1m44s left  loss 0.5"


def test_progress_without_a_known_end(monkeypatch, capsys):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    progress.Progress("check", None, unit="rows").update(5000, "so far")
    assert capsys.readouterr().err == "check  5,000  500.0 rows/s  so far\n"


def test_a_pace_is_due_so_long_after_the_last(monkeypatch):
    clock = iter([100.0, 101.0, 102.5, 103.5, 105.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    pace = progress.Pace(2.0)  # at 100 s
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


@pytest.mark.parametrize(
    "line",
    [
        *(b"\xff\xfe", b"null", b"12", b"[1]", b"", b"\x00", b'{"loss": 1.0}'),
        *(b'{"step": "x"}', b'{"step": true}', b'{"step": 1.5}', b'{"step": 1, "loss": "x"}'),
        *(b"[" * 100_000, b'{"step": 1, "loss": ' * 50_000, b'{"step": 1' + b"0" * 9999),
    ],
)
def test_damaged_lines_are_left_out_and_counted(tmp_path, caplog, line):
    path = tmp_path / "metrics.jsonl"
    whole = [b'{"step": 1, "loss": 0.5}', b'{"step": 2, "loss": NaN}', b'{"step": 3, "loss": 1e-3}']
    path.write_bytes(b"\n".join([whole[0], line, whole[1], line, whole[2]]) + b"\n")
    lines = metrics.read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert f"{path}: 2 damaged lines are left out" in caplog.text
    writer = metrics.MetricsWriter(tmp_path, step=2)
    writer.close()
    assert path.read_bytes() == b"\n".join(whole[:2]) + b"\n"


def test_lines_that_changed_since_a_checkpoint_are_told_of(tmp_path, caplog):
    writer = metrics.MetricsWriter(tmp_path)
    writer.scalars(1, {"loss": 0.1})
    digest = writer.digest
    writer.scalars(2, {"loss": 0.2})
    writer.close()
    writer = metrics.MetricsWriter(tmp_path, step=1, digest=digest)
    assert writer.digest == digest and not caplog.text
    writer.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace("0.1", "0.3"))
    metrics.MetricsWriter(tmp_path, step=1, digest=digest).close()
    assert f"{path} is not as it was at step 1" in caplog.text


def test_other_processes_write_nothing(tmp_path):
    writer = metrics.MetricsWriter(tmp_path / "none", enabled=False)
    writer.scalars(1, {"loss": 0.0})
    writer.close()
    assert not (tmp_path / "none").exists()
