"""The loader's promises: a global order that no process count changes, exact resuming."""

import collections
import json
import threading

import numpy as np
import pytest

from dmd_jax.data.loader import EpochOrder, Together, batches
from dmd_jax.data.pair_shards import PairsMetadata, PairSource, write_pairs
from dmd_jax.errors import UserError


class Records:
    """`size` records that count how often each was read."""

    def __init__(self, size):
        self.size, self.reads, self._lock = size, collections.Counter(), threading.Lock()

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError
        with self._lock:
            self.reads[int(index)] += 1
        return {"x0": np.full((2, 2, 1), index, np.float32), "label": np.int32(index)}


def take(iterator, count):
    return [next(iterator)["label"].tolist() for _ in range(count)]


def open_all(size, batch_size, processes, *, seed=3, shuffle=True):
    return [
        batches(
            Records(size),
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            rows=np.split(np.arange(batch_size), processes)[p],
        )
        for p in range(processes)
    ]


def take_global(iterators, count):
    return [sum(parts, []) for parts in zip(*(take(it, count) for it in iterators))]


def test_a_batch_is_a_dict_of_stacked_arrays():
    batch = next(batches(Records(7), batch_size=4, seed=0))
    assert batch["x0"].shape == (4, 2, 2, 1) and batch["x0"].dtype == np.float32
    assert batch["label"].shape == (4,) and batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["x0"][:, 0, 0, 0], batch["label"])


@pytest.mark.parametrize("size, batch_size", [(7, 4), (64, 8), (5, 12), (1, 4)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_any_number_of_processes_gives_the_same_global_batches(size, batch_size, shuffle):
    one = take_global(open_all(size, batch_size, 1, shuffle=shuffle), 20)
    for processes in (2, 4):
        iterators = open_all(size, batch_size, processes, shuffle=shuffle)
        assert take_global(iterators, 20) == one


@pytest.mark.parametrize("size, batch_size", [(7, 4), (12, 4), (9, 1), (5, 12)])
def test_each_epoch_visits_each_record_once_in_another_order(size, batch_size):
    (iterator,) = open_all(size, batch_size, 1)
    stream = sum(take(iterator, 6 * size // batch_size + 1), [])
    epochs = [tuple(stream[e * size : (e + 1) * size]) for e in range(6)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len(set(epochs)) == 6


def test_without_shuffling_the_order_is_the_sources():
    (iterator,) = open_all(5, 3, 1, shuffle=False)
    assert take(iterator, 4) == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]


def test_seeds_give_unrelated_orders():
    streams = [sum(take(open_all(20, 4, 1, seed=seed)[0], 50), []) for seed in (0, 1, 2**40)]
    epochs = [[tuple(s[e * 20 : (e + 1) * 20]) for e in range(10)] for s in streams]
    # Not even an epoch of one seed is an epoch of another.
    assert len(set(sum(epochs, []))) == 30
    assert take(open_all(20, 4, 1, seed=1)[0], 50) == take(open_all(20, 4, 1, seed=1)[0], 50)


def test_a_process_reads_only_its_own_records():
    source = Records(1000)
    iterator = batches(source, batch_size=8, seed=0, shuffle=False, rows=[2, 3])
    assert take(iterator, 3) == [[2, 3], [10, 11], [18, 19]]
    iterator.close()
    assert all(index % 8 in (2, 3) for index in source.reads)
    assert set(source.reads.values()) == {1}


@pytest.mark.parametrize("consumed", [0, 1, 5, 23])
def test_the_state_counts_what_was_handed_out_and_restores_exactly(consumed):
    iterators = {processes: open_all(7, 4, processes) for processes in (1, 2, 4)}
    states = []
    for group in iterators.values():
        take_global(group, consumed)
        states += [iterator.get_state() for iterator in group]
    # The same for every process of every group, though each has read several batches ahead.
    assert all(state == states[0] for state in states)
    saved = json.loads(json.dumps(states[0]))

    following = take_global(iterators[1], 15)
    for processes in (1, 2, 4):
        fresh = open_all(7, 4, processes)
        for iterator in fresh:
            iterator.set_state(saved)
        assert take_global(fresh, 15) == following
    # Also backwards on an iterator that has moved on.
    iterators[1][0].set_state(saved)
    assert take_global(iterators[1], 15) == following


def test_the_state_does_not_run_ahead_while_the_threads_do():
    source = Records(100)
    iterator = batches(source, batch_size=2, seed=0)
    next(iterator)
    for _ in range(200):
        if sum(source.reads.values()) > 2:
            break
        threading.Event().wait(0.01)
    assert sum(source.reads.values()) > 2
    assert iterator.get_state() == {"next_index": 1}


def test_the_order_of_epochs_is_what_batches_follow():
    order = EpochOrder(7, seed=3)
    (iterator,) = open_all(7, 5, 1)
    assert sum(take(iterator, 6), []) == [order(position) for position in range(30)]
    # What checkpoints and unfinished pairs count on.
    expected = [5, 6, 2, 1, 4, 3, 0, 2, 1, 4, 0, 5, 6, 3]
    assert [EpochOrder(7, seed=3)(position) for position in reversed(range(14))] == expected[::-1]


def open_two(process, processes, *, size=5):
    rows = lambda size: np.split(np.arange(size), processes)[process]  # noqa: E731
    pairs = batches(Records(7), batch_size=4, seed=3, rows=rows(4))
    fresh = batches(Records(size), batch_size=8, seed=1, rows=rows(8))
    return Together({"pairs": pairs, "fresh": fresh})


def test_two_iterators_together_are_both():
    first, second = open_all(7, 4, 1)[0], batches(Records(5), batch_size=8, seed=1)
    for _, both in zip(range(6), open_two(0, 1)):
        assert list(both) == ["pairs", "fresh"]
        for name, iterator in (("pairs", first), ("fresh", second)):
            expected = next(iterator)
            assert both[name].keys() == expected.keys() == {"x0", "label"}
            for key, array in expected.items():
                np.testing.assert_array_equal(both[name][key], array)


def test_no_iterator_gives_empty_batches():
    nothing = Together({})
    assert (next(nothing), nothing.get_state()) == ({}, {})


def test_of_batches_that_are_not_used_no_record_is_read():
    read = []

    class Counted(Records):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    def take(used):
        read.clear()
        iterator = batches(Counted(100), batch_size=4, seed=3, used=used)
        return [next(iterator) for _ in range(7)]

    every, third = take(lambda number: True), take(lambda number: number % 3 == 0)
    # Those of the seven and of what is read ahead, and the one that shows their shapes.
    assert len(read) <= 1 + 4 * len(range(0, 7 + 8 + 4, 3))
    for number, (all_read, some) in enumerate(zip(every, third, strict=True)):
        for name, array in all_read.items():
            expected = array if number % 3 == 0 else np.zeros_like(array)
            np.testing.assert_array_equal(some[name], expected)
            assert some[name].dtype == array.dtype


def test_the_state_of_two_together_restores_both_on_any_number_of_processes():
    def take_two(iterator, count):
        found = [next(iterator) for _ in range(count)]
        return [tuple(rows["label"].tolist() for rows in both.values()) for both in found]

    whole = open_two(0, 1)
    take_two(whole, 3)
    saved = json.loads(json.dumps(whole.get_state()))
    following = take_two(whole, 5)
    again = open_two(0, 1)
    again.set_state(saved)
    assert take_two(again, 5) == following
    halves = [open_two(process, 2) for process in range(2)]
    for half in halves:
        half.set_state(saved)
    parts = [take_two(half, 5) for half in halves]
    assert [(a + c, b + d) for (a, b), (c, d) in zip(*parts)] == following
    whole.set_state(saved)
    assert take_two(whole, 5) == following


def test_pairs_through_the_loader(tmp_path):
    metadata = PairsMetadata(
        teacher="a test",
        teacher_sha256="",
        sampler="heun",
        num_steps=1,
        guidance=1.0,
        seed=0,
        count=10,
        shard_size=3,
        sample_shape=(2, 2, 1),
        num_classes=10,
    )

    def make_shard(start, stop):
        numbers = np.arange(start, stop)
        z_ref = np.broadcast_to(numbers[:, None, None, None], (len(numbers), 2, 2, 1))
        z_ref = z_ref.astype(np.float32)
        return {"z_ref": z_ref, "y_ref": -z_ref, "label": numbers}

    write_pairs(tmp_path, metadata, make_shard)
    source = PairSource(tmp_path, sample_shape=(2, 2, 1), num_classes=10)
    iterator = batches(source, batch_size=4, seed=0)
    seen = []
    for _ in range(5):
        batch = next(iterator)
        assert batch["z_ref"].shape == batch["y_ref"].shape == (4, 2, 2, 1)
        np.testing.assert_array_equal(batch["z_ref"], -batch["y_ref"])
        np.testing.assert_array_equal(batch["z_ref"][:, 1, 1, 0], batch["label"])
        seen += batch["label"].tolist()
    assert sorted(seen) == sorted(list(range(10)) * 2)

    # Damage after opening comes out of next() as it is.
    path = tmp_path / "pairs-00001-of-00004.array_record"
    data = bytearray(path.read_bytes())
    data[data.index(make_shard(4, 5)["z_ref"].tobytes())] ^= 1
    path.write_bytes(data)
    source = PairSource(tmp_path, sample_shape=(2, 2, 1), num_classes=10)
    with pytest.raises(UserError, match="pairs-00001-of-00004.array_record: record 1 is damaged"):
        take(batches(source, batch_size=4, seed=0), 3)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(batch_size=0), "batch_size 0: expected at least 1"),
        (dict(seed=-1), "seed -1"),
        (dict(source=Records(0)), "the data set is empty"),
    ],
)
def test_bad_arguments(changes, message):
    arguments = dict(source=Records(7), batch_size=4, seed=0) | changes
    with pytest.raises(UserError, match=message):
        batches(arguments.pop("source"), **arguments)
