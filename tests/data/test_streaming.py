"""Pairs and prompts of a bucket that are read through a cache smaller than they are."""

import hashlib
import os
import random
import signal
import threading
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from commands import TINY, fails, finish, start, succeeds

from dmd_jax.data import shard_stream, shards
from dmd_jax.data.loader import batches
from dmd_jax.data.pair_shards import PairsMetadata, PairSource, write_pairs
from dmd_jax.data.prompt_shards import PromptSource, write_prompts
from dmd_jax.errors import UserError
from dmd_jax.storage.block_cache import limit_cache
from dmd_jax.storage.bucket_copies import cache_folder
from dmd_jax.storage.buckets import BucketPath
from dmd_jax.storage.files import path_of

PAGE = 4096
SHAPE = (4, 4, 3)
COUNT, SHARD_SIZE = 230, 50


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """An empty cache folder for each test, and no limit that outlives it."""
    monkeypatch.setenv("DMD_JAX_CACHE", str(tmp_path / "cache"))
    yield
    limit_cache(20)


def write_small_pairs(folder, count=COUNT, shard_size=SHARD_SIZE):
    metadata = PairsMetadata(
        teacher="a test",
        teacher_sha256="00" * 32,
        sampler="heun",
        num_steps=18,
        guidance=1.0,
        seed=5,
        count=count,
        shard_size=shard_size,
        sample_shape=SHAPE,
        num_classes=10,
    )

    def make(start, stop):
        z = np.random.default_rng(start).standard_normal((stop - start, *SHAPE), np.float32)
        return {"z_ref": z, "y_ref": np.tanh(z), "label": np.arange(start, stop) % 10}

    write_pairs(folder, metadata, make)
    return folder


@pytest.fixture
def pairs(gcs, tmp_path, request):
    """A folder of pairs here, and the same in the bucket."""
    here = write_small_pairs(tmp_path / "pairs")
    name = request.node.name.partition("[")[0]
    gcs.put_folder("bucket", name, here)
    return here, path_of(f"gs://bucket/{name}")


def open_pairs(folder):
    return PairSource(folder, sample_shape=SHAPE, num_classes=10)


def shards_size(folder):
    return sum(path.stat().st_size for path in folder.glob("*.array_record"))


def on_disk():
    """The bytes that the blocks take, in whole pages."""
    total = 0
    for path in (cache_folder() / "blocks").rglob("*"):
        with suppress(FileNotFoundError):  # another thread may remove it meanwhile
            total += -(-path.stat().st_size // PAGE) * PAGE if path.name.isdigit() else 0
    return total


def open_files():
    """The bytes that files of the cache folder take which are open and have no name."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of this listing
            name = os.readlink(link)
            if name.startswith(str(cache_folder())) and name.endswith("(deleted)"):
                total += 512 * link.stat().st_blocks
    return total


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize("pages", [1, 5, 40, 100])
@pytest.mark.parametrize("least_unit", [1, 5000, 1 << 16])
def test_pairs_are_the_same_and_the_cache_is_bounded(pairs, monkeypatch, pages, least_unit):
    monkeypatch.setattr(shard_stream, "LEAST_UNIT", least_unit)
    monkeypatch.setattr(shards, "MAX_OPEN_STREAMS", 3)  # of five
    limit_cache(pages * PAGE / 1e9)
    local, streamed = map(open_pairs, pairs)
    assert on_disk() <= pages * PAGE
    most = 0
    for index in random.Random(0).sample(range(COUNT), 80):
        assert_same(streamed[index], local[index])
        most = max(most, on_disk())
        assert most <= pages * PAGE and open_files() == 0
    if least_unit == 1:
        assert most == pages * PAGE or pages == 100  # it is used, not only bounded
    assert not (cache_folder() / "gs").exists()


def test_prompts_are_the_same(gcs, tmp_path):
    lines = [f"prompt {'x' * (7919 * n % 400)} {n}" for n in range(3000)]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    write_prompts(tmp_path / "prompts", tmp_path / "p.txt", shard_size=1000)
    gcs.put_folder("bucket", "prompts", tmp_path / "prompts")
    limit_cache(100_000 / 1e9)
    source = PromptSource("gs://bucket/prompts")
    order = random.Random(0).sample(range(3000), 200)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(source.__getitem__, order)) == [lines[n] for n in order]
    # A request asks for neighbours as well, about 64 KiB with them.
    sizes = [stop - start for _, start, stop in gcs.ranges if stop - start < 2 * (1 << 16)]
    assert max(sizes) > 40_000
    assert on_disk() <= 100_000


def test_blocks_are_fetched_as_often_as_the_least_recently_used_are_dropped(
    gcs, pairs, monkeypatch
):
    capacity = 10  # a record takes one page; the ends of shards take more, so none is kept
    monkeypatch.setattr(shard_stream, "LEAST_UNIT", 1)
    monkeypatch.setattr(shards, "AT_ONCE", 1)
    limit_cache(capacity * PAGE / 1e9)
    _, folder = pairs
    source = open_pairs(folder)
    held, expected = OrderedDict(), Counter()

    def use(shard, row):
        if (shard, row) in held:
            held.move_to_end((shard, row))
            return
        expected[shard] += 1
        held[shard, row] = None
        if len(held) > capacity:
            held.popitem(last=False)

    for shard in range(5):
        use(shard, "label")
    indices = [int(n) for n in np.random.default_rng(0).integers(0, 12, 300) * 19]
    for index in indices:
        source[index]
        use(*divmod(index, SHARD_SIZE))
    found, ends = Counter(), Counter()
    for (name, begin, end), times in gcs.ranges.items():
        if name.startswith(f"{folder.name}/pairs-"):
            (found if end - begin < 1000 else ends)[int(name.split("-")[1])] += times
    assert found == expected
    assert 17 < sum(found.values()) < 300
    assert ends == dict.fromkeys(range(5), 2)  # when checked, and when read from


def test_threads_that_want_the_same_fetch_it_once(gcs, pairs, monkeypatch):
    monkeypatch.setattr(shard_stream, "LEAST_UNIT", 1)
    here, folder = pairs
    limit_cache(1.9 * shards_size(here) / 1e9)
    source, local = open_pairs(folder), open_pairs(here)
    order = np.repeat(np.random.default_rng(0).integers(0, COUNT, 100), 3)
    with ThreadPoolExecutor(8) as threads:
        for index, pair in zip(order, threads.map(source.__getitem__, order)):
            assert_same(pair, local[index])
    times = [n for (name, *_), n in gcs.ranges.items() if name.startswith(f"{folder.name}/pairs-")]
    # Five ends, five labels, and each of the records once.
    assert times == [1] * (10 + len(set(order)))


class Watched:
    """Counts the requests to the bucket; most: those at the same time.

    Each waits for a moment, which is a longer one until more than `awaited` have come at once.
    """

    def __init__(self, monkeypatch, awaited=0):
        self.requests = self.most = self.peak = self._running = 0
        changed, read_range = threading.Condition(), BucketPath.read_range

        def watched(*arguments):
            with changed:
                self.requests += 1
                self._running += 1
                self.most = max(self.most, self._running)
                self.peak = max(self.peak, on_disk())
                changed.notify_all()
                late = awaited > 0 and self.most <= awaited
                changed.wait_for(lambda: 0 < awaited < self.most, 0.5 if late else 0.02)
                self._running -= 1
            return read_range(*arguments)

        monkeypatch.setattr(BucketPath, "read_range", watched)


def test_records_of_a_batch_are_asked_for_at_the_same_time(pairs, monkeypatch):
    here, folder = pairs
    limit_cache(1e-9)
    source = open_pairs(folder)
    watched = Watched(monkeypatch, awaited=8)  # the loader has four threads
    expected = batches(open_pairs(here), batch_size=24, seed=3)
    found = batches(source, batch_size=24, seed=3)
    for _ in range(10):  # more than an epoch
        assert_same(next(found), next(expected))
    assert watched.most > 8


def test_a_folder_that_fits_in_half_of_the_cache_is_copied_whole(gcs, pairs):
    here, folder = pairs
    size = shards_size(here)
    for limit, copied in ((2 * size - 1000, False), (2 * size + 1000, True)):
        limit_cache(limit / 1e9)
        gcs.requests.clear()
        assert_same(open_pairs(folder)[7], open_pairs(here)[7])
        assert (cache_folder() / "gs").exists() == copied
    names = gcs.names("bucket", f"{folder.name}/pairs-")
    assert [gcs.requests["READ", "bucket", name] for name in names] == [1] * 5


def test_a_shard_that_changes_meanwhile_is_refused(gcs, pairs):
    here, folder = pairs
    limit_cache(1e-9)
    source = open_pairs(folder)
    assert_same(source[60], open_pairs(here)[60])
    name = f"{folder.name}/pairs-00001-of-00005.array_record"
    shard = gcs.buckets["bucket"][name]
    gcs.put("bucket", name, shard.content)
    with pytest.raises(UserError, match=f"{name} cannot be read: it was written again or removed"):
        source[60]
    assert_same(source[1], open_pairs(here)[1])
    del gcs.buckets["bucket"][name]
    with pytest.raises(UserError, match=f"{name} cannot be read: "):
        source[61]
    gcs.buckets["bucket"][name] = shard
    assert_same(source[60], open_pairs(here)[60])


def outcome(folder):
    """All pairs of a folder, or the error, without the folder's name."""
    try:
        source = open_pairs(folder)
        return [source[index]["z_ref"].tobytes() for index in range(len(source))]
    except UserError as error:
        return str(error).replace(str(folder), "FOLDER")


def test_damage_is_reported_as_of_a_local_folder(gcs, tmp_path):
    here = write_small_pairs(tmp_path / "one", count=12, shard_size=12)
    (path,) = here.glob("*.array_record")
    whole, name = path.read_bytes(), f"damaged/{path.name}"
    gcs.put_folder("bucket", "damaged", here)
    limit_cache(1e-9)
    used = len(whole[: -(1 << 16)].rstrip(b"\0"))
    draws, outcomes = random.Random(0), []
    places = [draws.randrange(used) for _ in range(40)]
    places += [len(whole) - (1 << 16) + draws.randrange(170) for _ in range(10)]
    changed = []
    for at in places:
        changed.append(whole[:at] + bytes([whole[at] ^ 1 << draws.randrange(8)]) + whole[at + 1 :])
    changed += [whole[:at] for at in (0, 1, 100, 1 << 16, used, len(whole) - 1)]
    changed += [whole + b"\0", bytes(len(whole)), b"<!DOCTYPE html>" + bytes(100)]
    changed += [b"version https://git-lfs.github.com/spec/v1\n"]
    for content in changed:
        path.write_bytes(content)
        gcs.put("bucket", name, content)
        outcomes.append(outcome(here))
        assert outcome(path_of("gs://bucket/damaged")) == outcomes[-1]
    kinds = Counter(type(one) for one in outcomes)
    assert kinds[str] > 30 and any("record" in one for one in outcomes if isinstance(one, str))


def test_a_shard_under_anothers_name_is_refused(gcs, pairs):
    _, folder = pairs
    limit_cache(1e-9)
    first, second, *_ = gcs.names("bucket", f"{folder.name}/pairs-")
    objects = gcs.buckets["bucket"]
    objects[first], objects[second] = objects[second], objects[first]
    with pytest.raises(UserError, match=f"{first}: is 'pairs-00001-of-00005.array_record'"):
        open_pairs(folder)


def test_a_shard_whose_index_is_compressed_is_named(gcs, tmp_path):
    here = write_small_pairs(tmp_path / "one", count=12, shard_size=12)
    (path,) = here.glob("*.array_record")
    writer = ArrayRecordWriter(str(path), "group_size:1,zstd")
    for _ in range(12):
        writer.write(bytes(8 * 48 + 4))
    writer.close()
    gcs.put_folder("bucket", "compressed", here)
    limit_cache(1e-9)
    with pytest.raises(UserError, match=r"array_record: its index is compressed .* --cache-gb"):
        open_pairs("gs://bucket/compressed")


KILLED = """
import sys, os, signal
from dmd_jax.storage.block_cache import limit_cache
from dmd_jax.data.pair_shards import PairSource
limit_cache(50 * 4096 / 1e9)
source = PairSource(sys.argv[1], sample_shape=(4, 4, 3), num_classes=10)
source[3]
print("read", flush=True)
sys.stdin.readline() if len(sys.argv) > 2 else os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_have_their_own_folders_and_a_kill_leaves_none_for_long(gcs, pairs, tmp_path):
    here, folder = pairs
    (tmp_path / "killed.py").write_text(KILLED)
    killed = start(folder, program=(tmp_path / "killed.py",))
    assert "read" in finish(killed, -signal.SIGKILL)
    blocks = cache_folder() / "blocks"
    (left,) = [path for path in blocks.iterdir() if path.is_dir()]
    assert any(path.name.isdigit() for path in left.iterdir())

    limit_cache(50 * PAGE / 1e9)
    source = open_pairs(folder)
    (own,) = [path for path in blocks.iterdir() if path.is_dir()]
    assert own != left
    finish(start(folder, program=(tmp_path / "killed.py",)), -signal.SIGKILL)
    assert own.is_dir()
    assert_same(source[9], open_pairs(here)[9])
    limit_cache(20)
    del source
    assert not own.exists()


def test_a_cache_folder_that_is_emptied_is_filled_again(pairs):
    here, folder = pairs
    limit_cache(50 * PAGE / 1e9)
    source = open_pairs(folder)
    assert_same(source[3], open_pairs(here)[3])
    for path in (cache_folder() / "blocks").rglob("*"):
        if path.name.isdigit():
            path.unlink()
    assert_same(source[3], open_pairs(here)[3])


def test_a_disk_with_too_little_room_is_named(pairs, monkeypatch):
    from dmd_jax.storage import block_cache

    _, folder = pairs
    usage = block_cache.shutil.disk_usage(".")
    monkeypatch.setattr(block_cache.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    limit_cache(500_000 / 1e9)
    with pytest.raises(UserError, match="has 0.0 GB free; expected room for --cache-gb 0.0005"):
        open_pairs(folder)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "much"])
@pytest.mark.parametrize("command", ["train", "pairs"])
def test_a_cache_of_no_size_is_refused(command, value, capsys, tmp_path):
    line = fails(capsys, command, "--config", TINY, "--workdir", tmp_path, f"--cache-gb={value}")
    assert f"argument --cache-gb: {value} is no size; expected gigabytes, more than 0" in line


def weights_sha256(workdir):
    digest = hashlib.sha256()
    files = sorted((Path(workdir) / "weights").rglob("*.safetensors"))
    assert files
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def test_training_through_a_cache_of_a_tenth_gives_the_same_weights(
    gcs, tiny, tmp_path, monkeypatch
):
    many = ("--config.pairs.count=2000", "--config.pairs.shard_size=1000")
    many += ("--config.pairs.batch_size=250",)
    succeeds("pairs", *tiny[:3], *many, "--workdir", tmp_path / "pairs")
    gcs.put_folder("bucket", "training", tmp_path / "pairs")
    limit = shards_size(tmp_path / "pairs") // 10

    watched = Watched(monkeypatch)
    for name, folder in (("here", tmp_path / "pairs"), ("there", "gs://bucket/training")):
        pairs = f"--config.data.pairs={folder}"
        cache = f"--cache-gb={limit / 1e9}"
        succeeds("train", *tiny[:3], pairs, "--workdir", tmp_path / name, cache)
    assert weights_sha256(tmp_path / "there") == weights_sha256(tmp_path / "here")
    assert 0 < watched.peak <= limit and watched.requests > 50 and watched.most > 4
    assert not (cache_folder() / "gs").exists()
