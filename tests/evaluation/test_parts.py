"""Parts of work: made once, whole, of one set of settings."""

import json

import numpy as np
import pytest

from dmd_jax.errors import UserError
from dmd_jax.evaluation import parts
from dmd_jax.evaluation.parts import Rows, claim, release

SETTINGS = {"seed": 1, "features": {"pixels": {}}}


class Maker:
    """Makes rows that say their index, and remembers what it was asked for."""

    def __init__(self, dies_at=None):
        self.made, self.start, self.dies_at = [], None, dies_at

    def __call__(self, start, stop):
        if start == self.dies_at:
            raise KeyboardInterrupt
        self.made.append((start, stop))
        index = np.arange(start, stop)
        return {"index": index, "square": np.stack([index, index**2], 1)}

    def started(self, done, total):
        self.start = (done, total)


def made(rows, **options):
    maker = Maker(**options)
    rows.make(maker, maker.started)
    return maker


def test_parts_hold_all_rows_in_order_and_are_made_once(tmp_path):
    rows = Rows(tmp_path, "some", 10, 4)
    first = made(rows)
    assert first.made == [(0, 4), (4, 8), (8, 10)] and first.start == (0, 10)
    index = np.concatenate([part for (part,) in rows.read("index")])
    np.testing.assert_array_equal(index, np.arange(10))
    again = made(rows)
    assert again.made == [] and again.start == (10, 10)
    for square, index in rows.read("square", "index"):
        np.testing.assert_array_equal(square[:, 1], index**2)


def test_an_interrupted_run_goes_on_behind_its_last_part(tmp_path):
    rows = Rows(tmp_path, "some", 10, 4)
    with pytest.raises(KeyboardInterrupt):
        made(rows, dies_at=8)
    with pytest.raises(UserError, match="some-00002.npz is missing or damaged"):
        list(rows.read("index"))
    maker = made(rows)
    assert maker.made == [(8, 10)] and maker.start == (8, 10)


def test_each_process_makes_its_parts(tmp_path, monkeypatch):
    rows = Rows(tmp_path, "some", 10, 4)
    monkeypatch.setattr(parts.jax, "process_count", lambda: 2)
    monkeypatch.setattr(parts.jax, "process_index", lambda: 1)
    assert made(rows).made == [(4, 8)]
    monkeypatch.setattr(parts.jax, "process_index", lambda: 0)
    maker = made(rows)
    assert maker.made == [(0, 4), (8, 10)] and maker.start == (0, 6)
    assert len(list(rows.read("index"))) == 3


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "short"])
def test_a_damaged_part_is_made_again(tmp_path, damage, caplog):
    rows = Rows(tmp_path, "some", 10, 4)
    made(rows)
    path = tmp_path / "some-00001.npz"
    content = bytearray(path.read_bytes())
    if damage == "torn":
        content = content[:-30]
    elif damage == "flipped":
        content[150] ^= 1
    elif damage == "empty":
        content = b""
    path.write_bytes(content)
    if damage == "short":
        np.savez(path, index=np.arange(3), square=np.zeros((3, 2)))
    assert made(rows).made == [(4, 8)]
    assert "some-00001.npz is damaged" in caplog.text
    np.testing.assert_array_equal(np.concatenate(list(rows.read("index")), axis=1)[0], range(10))


def test_a_folder_is_claimed_again_with_the_same_settings_alone(tmp_path):
    folder = tmp_path / "run.parts"
    claim(folder, SETTINGS)
    claim(folder, json.loads(json.dumps(SETTINGS)))
    with pytest.raises(
        UserError, match=r"run.parts holds parts of .*\(seed 1 there, 2 asked for\)"
    ):
        claim(folder, SETTINGS | {"seed": 2})
    with pytest.raises(UserError, match=r"\(num None there, 5 asked for\)"):
        claim(folder, SETTINGS | {"num": 5})


@pytest.fixture
def second_of_two(monkeypatch):
    """This process is the second; what the first one says is in the list, the next one last."""
    first = []
    monkeypatch.setattr(parts.jax, "process_index", lambda: 1)
    monkeypatch.setattr(
        parts.multihost_utils, "process_allgather", lambda own: np.array([first.pop(), own])
    )
    return first


def test_a_process_that_comes_later_checks_its_settings(tmp_path, second_of_two, monkeypatch):
    folder = tmp_path / "run.parts"

    def gather(own):
        """The first process makes the folder when the second has seen none."""
        parts.write_json(folder / "settings.json", SETTINGS)
        return np.array([0, own])

    monkeypatch.setattr(parts.multihost_utils, "process_allgather", gather)
    claim(folder, SETTINGS)
    (folder / "settings.json").unlink()
    with pytest.raises(UserError, match=r"\(seed 1 there, 2 asked for\)"):
        claim(folder, SETTINGS | {"seed": 2})


def test_one_process_that_is_refused_ends_all(tmp_path, second_of_two):
    folder = tmp_path / "run.parts"
    second_of_two[:] = [1]
    with pytest.raises(UserError, match=r"process 0 was refused .*run\.parts"):
        claim(folder, SETTINGS)
    assert not folder.exists()
    # A folder that only the first process sees.
    second_of_two[:] = [0, 0]
    with pytest.raises(UserError, match="settings.json: no such file; expected"):
        claim(folder, SETTINGS)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds no settings.json; expected another --out"):
        claim(tmp_path, SETTINGS)
    for damaged in ("{", "[" * 100_000):
        (tmp_path / "settings.json").write_text(damaged)
        with pytest.raises(UserError, match="settings.json cannot be read as JSON"):
            claim(tmp_path, SETTINGS)
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(UserError, match="parts of another evaluation"):
        claim(tmp_path, SETTINGS)


def test_release_deletes_what_was_made_and_nothing_else(tmp_path):
    for name in ("alone", "shared"):
        folder = tmp_path / name
        claim(folder, SETTINGS)
        rows = Rows(folder, "some", 10, 4)
        made(rows)
        if name == "shared":
            (folder / "diary.txt").write_text("mine")
        release(folder, rows)
    assert [path.name for path in tmp_path.rglob("*")] == ["shared", "diary.txt"]


def test_a_disk_that_is_full_loses_no_finished_part(tmp_path, monkeypatch):
    rows = Rows(tmp_path, "some", 10, 4)
    save, calls = np.savez, []

    def full(file, **arrays):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save(file, **arrays)

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match="some-00001.npz cannot be written: .*No space left"):
        made(rows)
    assert made(rows).made == [(4, 8), (8, 10)]
    assert not list(tmp_path.glob(".*"))
