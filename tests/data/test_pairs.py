"""Writing and reading noise-image pairs, and everything that can go wrong with them."""

import dataclasses
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from shard_labels import write_records

from dmd_jax.data.pair_shards import PairsMetadata, PairSource, write_pairs
from dmd_jax.data.shards import MAX_OPEN_SHARDS
from dmd_jax.errors import UserError
from dmd_jax.storage.seals import read_sealed, write_sealed

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (4, 4, 3)
RECORD_BYTES = 8 * 48 + 4


def metadata(**changes):
    values = dict(
        teacher="a test",
        teacher_sha256="00" * 32,
        sampler="heun",
        num_steps=18,
        guidance=1.0,
        seed=5,
        count=23,
        shard_size=5,
        sample_shape=SHAPE,
        num_classes=10,
        compute_dtype="float32",
        matmul_precision="highest",
    )
    return PairsMetadata(**(values | changes))


def make_shard(start, stop):
    numbers = np.arange(start, stop)
    z_ref = np.stack([np.random.default_rng(n).standard_normal(SHAPE) for n in numbers])
    z_ref = z_ref.astype(np.float32)
    return {"z_ref": z_ref, "y_ref": np.tanh(z_ref), "label": numbers % 10}


def shard(folder, index, total=5):
    return folder / f"pairs-{index:05d}-of-{total:05d}.array_record"


def open_pairs(folder):
    return PairSource(folder, sample_shape=SHAPE, num_classes=10)


@pytest.fixture
def folder(tmp_path):
    write_pairs(tmp_path / "pairs", metadata(), make_shard)
    return tmp_path / "pairs"


def assert_complete(folder):
    source, expected = open_pairs(folder), make_shard(0, 23)
    assert len(source) == 23
    for index in range(23):
        for name, values in expected.items():
            np.testing.assert_array_equal(source[index][name], values[index])
    names = {path.name for path in folder.iterdir()}
    assert names == {"metadata.json"} | {shard(folder, i).name for i in range(5)}


def test_pairs_come_back_to_the_bit(folder):
    assert_complete(folder)
    source = open_pairs(folder)
    pair = source[np.int64(22)]
    assert pair["z_ref"].dtype == pair["y_ref"].dtype == np.float32
    assert pair["label"].dtype == np.int32 and pair["label"] == 2
    assert source.sample_shape == SHAPE and source.num_classes == 10
    for index in (23, -1):
        with pytest.raises(IndexError):
            source[index]


def test_the_record_is_as_documented(folder):
    record = ArrayRecordReader(str(shard(folder, 2))).read([3])[0]
    assert len(record) == RECORD_BYTES
    expected = make_shard(13, 14)
    values = np.frombuffer(record[:-4], "<f4").reshape(2, *SHAPE)
    np.testing.assert_array_equal(values[0], expected["z_ref"][0])
    np.testing.assert_array_equal(values[1], expected["y_ref"][0])
    assert int.from_bytes(record[-4:], "little") == 3


def test_metadata_file(folder):
    written, trusted = read_sealed(folder / "metadata.json", "a test's")
    assert trusted
    assert written == {
        "format_version": 1,
        "teacher": "a test",
        "teacher_sha256": "00" * 32,
        "sampler": "heun",
        "num_steps": 18,
        "guidance": 1.0,
        "seed": 5,
        "count": 23,
        "shard_size": 5,
        "sample_shape": [4, 4, 3],
        "dtype": "float32",
        "num_classes": 10,
        "compute_dtype": "float32",
        "matmul_precision": "highest",
    }
    assert open_pairs(folder).metadata == metadata()


def test_pairs_that_do_not_say_their_precision_are_read_and_not_gone_on_with(folder):
    path = folder / "metadata.json"
    values, _ = read_sealed(path, "a test's")
    del values["compute_dtype"], values["matmul_precision"]
    path.write_text(json.dumps(values))
    for file in folder.glob("*.array_record"):
        reader = ArrayRecordReader(str(file))
        write_records(file, reader.read(list(range(reader.num_records() - 1))))
    found = open_pairs(folder).metadata
    assert found == metadata(compute_dtype=None, matmul_precision=None)
    with pytest.raises(UserError, match="compute_dtype None there, 'float32' now; matmul_precisi"):
        write_pairs(folder, metadata(), make_shard)
    with pytest.raises(UserError, match="matmul_precision is 3, expected text, or null"):
        metadata(matmul_precision=3)


def test_threads_and_pickles_read_the_same(folder):
    source = open_pairs(folder)
    order = np.random.default_rng(0).integers(0, 23, 400)
    expected = make_shard(0, 23)["z_ref"]
    with ThreadPoolExecutor(8) as threads:
        for index, pair in zip(order, threads.map(source.__getitem__, order)):
            np.testing.assert_array_equal(pair["z_ref"], expected[index])
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[7]["z_ref"], expected[7])


def test_no_more_shards_stay_open_than_allowed(tmp_path, monkeypatch):
    assert MAX_OPEN_SHARDS <= 512
    monkeypatch.setattr("dmd_jax.data.shards.MAX_OPEN_SHARDS", 3)
    write_pairs(tmp_path, metadata(shard_size=1), make_shard)
    source = open_pairs(tmp_path)

    def open_shards():
        links = [path for path in Path("/proc/self/fd").iterdir() if path.exists()]
        return sum(str(path.readlink()).startswith(str(tmp_path)) for path in links)

    for _ in range(2):
        labels = [int(source[i]["label"]) for i in range(23)]
        assert labels == [i % 10 for i in range(23)]
        assert open_shards() <= 3


def test_processes_share_the_shards(tmp_path):
    asked = [[], [], []]
    for process in (2, 0, 1):
        make = lambda a, b, p=process: asked[p].append((a, b)) or make_shard(a, b)  # noqa: E731
        write_pairs(tmp_path, metadata(), make, process_index=process, process_count=3)
    assert asked == [[(0, 5), (15, 20)], [(5, 10), (20, 23)], [(10, 15)]]
    assert_complete(tmp_path)


def test_resuming_makes_only_what_is_missing_or_torn(folder, caplog):
    kept = {i: shard(folder, i).stat().st_mtime_ns for i in (0, 4)}
    shard(folder, 1).unlink()
    torn = shard(folder, 3).read_bytes()
    shard(folder, 3).write_bytes(torn[: len(torn) // 2])
    shard(folder, 2).write_bytes(b"")
    shard(folder, 1).with_name(shard(folder, 1).name + ".tmp").write_bytes(torn[:1000] * 300)
    asked, reports = [], []
    write_pairs(
        folder,
        metadata(),
        lambda a, b: asked.append((a, b)) or make_shard(a, b),
        progress=lambda done, total: reports.append((done, total)),
    )
    assert asked == [(5, 10), (10, 15), (15, 20)]
    assert reports == [(8, 23), (13, 23), (18, 23), (23, 23)]
    for index in (2, 3):
        assert f"{shard(folder, index)} is torn: 0 of 5 pairs readable" in caplog.text
    assert str(shard(folder, 1)) not in caplog.text
    assert {i: shard(folder, i).stat().st_mtime_ns for i in (0, 4)} == kept
    assert_complete(folder)


def test_a_shard_with_too_few_records_is_torn(folder):
    writer = ArrayRecordWriter(str(shard(folder, 0)), "group_size:1,uncompressed")
    writer.write(b"x" * RECORD_BYTES)
    writer.close()
    with pytest.raises(UserError, match="00000-of-00005.*1 pairs are readable, expected 5"):
        open_pairs(folder)
    write_pairs(folder, metadata(), make_shard)
    assert_complete(folder)


def test_an_interrupted_shard_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(temporary, path):
        raise KeyboardInterrupt

    write_pairs(tmp_path, metadata(), make_shard, process_count=2)
    before = sorted(path.name for path in tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("dmd_jax.data.shards._rename_synced", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_pairs(tmp_path, metadata(), make_shard)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    write_pairs(tmp_path, metadata(), make_shard)
    assert_complete(tmp_path)


def test_other_pairs_in_the_folder_are_not_touched(folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    message = r"already holds other pairs \(num_steps 18 there, 40 now; seed 5 there, 6 now\)"
    with pytest.raises(UserError, match=message):
        write_pairs(folder, metadata(seed=6, num_steps=40), make_shard)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_shards_without_metadata_are_not_touched(folder):
    (folder / "metadata.json").unlink()
    with pytest.raises(UserError, match="holds shards but no metadata.json"):
        write_pairs(folder, metadata(), make_shard)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/metadata.json: cannot be written"):
        write_pairs(tmp_path / "file", metadata(), make_shard)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("label", np.array([0, 1, 10, 3, 4]), r"label from 0 to 10, expected 0\.\.9"),
        ("label", np.array([0, 1, -1, 3, 4]), r"label from -1 to 4, expected 0\.\.9"),
        ("label", np.zeros(5), "label is float64"),
        ("label", np.zeros(4, np.int32), r"label is int32 \(4,\), expected integers \(5,\)"),
        ("y_ref", np.full((5, *SHAPE), np.nan, np.float32), "y_ref holds NaN or infinity"),
        ("z_ref", np.full((5, *SHAPE), np.inf, np.float32), "z_ref holds NaN or infinity"),
        ("z_ref", np.zeros((5, *SHAPE)), r"z_ref is float64 \(5, 4, 4, 3\), expected float32"),
        ("y_ref", np.zeros((5, 3, 4, 4), np.float32), r"y_ref is float32 \(5, 3, 4, 4\)"),
    ],
)
def test_what_a_shard_may_not_hold(tmp_path, name, value, message):
    with pytest.raises(UserError, match=f"pairs 0 to 4: {message}"):
        write_pairs(tmp_path, metadata(), lambda a, b: make_shard(a, b) | {name: value})
    assert [path.name for path in tmp_path.iterdir()] == ["metadata.json"]


def test_unconditional_pairs_have_label_0(tmp_path):
    with pytest.raises(UserError, match=r"label from 0 to 4, expected 0\.\.0"):
        write_pairs(tmp_path, metadata(num_classes=0), make_shard)
    make = lambda a, b: make_shard(a, b) | {"label": np.zeros(b - a, np.int32)}  # noqa: E731
    write_pairs(tmp_path, metadata(num_classes=0), make)
    source = PairSource(tmp_path, sample_shape=SHAPE, num_classes=0)
    assert source[3]["label"] == 0


@pytest.mark.parametrize(
    "expected, message",
    [
        (dict(sample_shape=(8, 8, 3), num_classes=10), r"resolution \(4, 4\), expected \(8, 8\)"),
        (dict(sample_shape=(4, 4, 1), num_classes=10), "channels 3, expected 1"),
        (dict(sample_shape=(4, 4, 3), num_classes=0), "num_classes 10, expected 0"),
    ],
)
def test_pairs_that_do_not_fit_the_configuration(folder, expected, message):
    with pytest.raises(UserError, match=message) as caught:
        PairSource(folder, **expected)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (None, "no such file; expected a folder written by"),
        (b"", "metadata.json: is empty"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[" * 200_000, "cannot be read as JSON"),
        (b"[]", "it holds list, not a JSON object"),
        ({"count": ...}, r"missing keys \['count'\], unknown keys \[\]"),
        ({"extra": 1}, r"missing keys \[\], unknown keys \['extra'\]"),
        ({"format_version": 2}, "format_version is 2, expected 1"),
        ({"dtype": "float16"}, "dtype is 'float16', expected 'float32'"),
        ({"count": 0}, "count is 0, expected a whole number of at least 1"),
        ({"count": "23"}, "count is '23'"),
        ({"count": 10**30}, "shard_size is 5, expected at least 1"),
        ({"shard_size": True}, "shard_size is True"),
        ({"seed": -1}, "seed is -1"),
        ({"num_classes": 1.5}, "num_classes is 1.5"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"sample_shape": [4, 0, 3]}, r"sample_shape is \[4, 0, 3\]"),
        ({"sample_shape": 4}, "sample_shape is 4"),
        ({"teacher": None}, "teacher is None, expected text"),
        ({"count": 24}, "of a folder with another metadata.json, expected a shard of this folder"),
        ({"count": 26}, r"6 of 6 shards are missing \(pairs-00000-of-00006"),
    ],
)
def test_bad_metadata(folder, change, message):
    path = folder / "metadata.json"
    if change is None:
        path.unlink()
    elif isinstance(change, bytes):
        path.write_bytes(change)
    else:
        values = read_sealed(path, "a test's")[0] | change
        write_sealed(path, {k: v for k, v in values.items() if v is not ...})
    with pytest.raises(UserError, match=message) as caught:
        open_pairs(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_impossible_metadata_is_refused_before_anything_is_written():
    for change in ({"count": 0}, {"num_steps": 0}, {"shard_size": 0}, {"sample_shape": ()}):
        with pytest.raises(UserError, match=f"pairs: {next(iter(change))} is "):
            metadata(**change)
    with pytest.raises(dataclasses.FrozenInstanceError):
        metadata().seed = 3


def test_missing_shards(folder):
    for index in (0, 1, 3, 4):
        shard(folder, index).unlink()
    message = (
        r"4 of 5 shards are missing \(pairs-00000-of-00005.array_record, pairs-00001\S+ "
        r"pairs-00003\S+ …\): not finished, run pairs again"
    )
    with pytest.raises(UserError, match=message):
        open_pairs(folder)


def test_a_truncated_shard_is_named_wherever_it_is_cut(folder):
    whole = shard(folder, 1).read_bytes()
    assert len(whole) == 131072  # ArrayRecord fills up to a multiple of 64 KiB
    rng = np.random.default_rng(0)
    used = 8 + 5 * (RECORD_BYTES + 64)
    lengths = [0, 1, len(whole) - 1, *rng.integers(0, used, 20), *rng.integers(0, len(whole), 40)]
    for length in lengths:
        shard(folder, 1).write_bytes(whole[:length])
        with pytest.raises(UserError, match="pairs-00001-of-00005.array_record: truncated"):
            open_pairs(folder)


def test_every_damaged_record_is_noticed_and_named(folder):
    whole = shard(folder, 1).read_bytes()
    expected = make_shard(5, 10)
    first = whole.index(expected["z_ref"][0].tobytes())
    last = whole.index(expected["z_ref"][4].tobytes()) + RECORD_BYTES
    rng = np.random.default_rng(0)
    refused = 0
    for position in rng.integers(first, last, 300):
        changed = bytearray(whole)
        changed[position] ^= 1 << rng.integers(8)
        shard(folder, 1).write_bytes(changed)
        source = open_pairs(folder)
        read = []
        for index in range(5, 10):
            try:
                read.append((index, source[index]))
            except UserError as error:
                assert "pairs-00001-of-00005.array_record: record" in str(error)
                assert "delete the shard and run pairs again" in str(error)
                assert "\n" not in str(error)
        # A flipped bit in what lies between two records also makes one of them unreadable.
        assert len(read) < 5
        refused += 5 - len(read)
        for index, pair in read:
            for name, values in expected.items():
                np.testing.assert_array_equal(pair[name], values[index - 5])
        assert open_pairs(folder)[0]["label"] == 0
    assert refused >= 300


def test_damage_anywhere_gives_the_right_pairs_or_a_user_error(folder):
    whole = shard(folder, 4).read_bytes()
    expected = make_shard(20, 23)
    rng = np.random.default_rng(1)
    for _ in range(150):
        changed = bytearray(whole)
        start, length = rng.integers(0, len(whole)), rng.integers(1, 5000)
        changed[start : start + length] = rng.bytes(len(changed[start : start + length]))
        shard(folder, 4).write_bytes(changed)
        try:
            source = open_pairs(folder)
            for index in range(20, 23):
                np.testing.assert_array_equal(source[index]["z_ref"], expected["z_ref"][index - 20])
        except UserError as error:
            assert "pairs-00004-of-00005.array_record" in str(error)


@pytest.mark.parametrize(
    "record, message",
    [
        (b"x" * (RECORD_BYTES - 1), "387 bytes, expected 388"),
        (bytes(RECORD_BYTES - 4) + b"\x0a\0\0\0", r"label 10, expected 0\.\.9"),
        (bytes(RECORD_BYTES - 4) + b"\xff" * 4, r"label -1, expected 0\.\.9"),
    ],
)
def test_records_that_are_no_pairs(folder, record, message):
    writer = ArrayRecordWriter(str(shard(folder, 0)), "group_size:1,uncompressed")
    for _ in range(5):
        writer.write(record)
    writer.close()
    with pytest.raises(UserError, match=rf"00000-of-00005.array_record: record 2 .*{message}"):
        open_pairs(folder)[2]


# A file may not grow beyond LIMIT bytes, which the kernel reports as it does a full disk.
WRITE_WITH_LIMIT = """
import resource, signal, sys
import numpy as np
from dmd_jax.data.pair_shards import PairsMetadata, write_pairs
from dmd_jax.errors import UserError

folder, limit, grown = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
shape = (32, 32, 3)
metadata = PairsMetadata(
    teacher="a test", teacher_sha256="", sampler="heun", num_steps=1, guidance=1.0, seed=0,
    count=6 + grown, shard_size=6, sample_shape=shape, num_classes=0,
)

def make_shard(start, stop):
    if limit and start >= 6:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    z_ref = np.full((stop - start, *shape), start, np.float32)
    return {"z_ref": z_ref, "y_ref": -z_ref, "label": np.zeros(stop - start, np.int32)}

try:
    write_pairs(folder, metadata, make_shard)
except UserError as error:
    print(error)
    sys.exit(2)
"""


def write_with_limit(folder, limit, grown=12):
    return subprocess.run(
        [sys.executable, "-c", WRITE_WITH_LIMIT, str(folder), str(limit), str(grown)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("limit", [1, 70_000])
def test_a_full_disk_keeps_what_is_finished(tmp_path, limit):
    folder = tmp_path / "pairs"
    failed = write_with_limit(folder, limit)
    assert failed.returncode == 2, failed.stderr
    path = shard(folder, 1, total=3)
    assert failed.stdout.startswith(f"{path}: cannot be written (write() failed: File too large")
    assert failed.stdout.count("\n") == 1 and "Traceback" not in failed.stderr
    assert sorted(p.name for p in folder.iterdir()) == ["metadata.json", shard(folder, 0, 3).name]
    with pytest.raises(UserError, match="2 of 3 shards are missing"):
        PairSource(folder, sample_shape=(32, 32, 3), num_classes=0)
    finished = shard(folder, 0, 3).stat().st_mtime_ns

    assert write_with_limit(folder, 0).returncode == 0
    source = PairSource(folder, sample_shape=(32, 32, 3), num_classes=0)
    assert [source[i]["z_ref"][0, 0, 0] for i in (5, 6, 17)] == [0, 6, 12]
    assert shard(folder, 0, 3).stat().st_mtime_ns == finished


def test_a_full_device_is_reported_on_closing(tmp_path):
    write_pairs(tmp_path, metadata(), make_shard, process_count=5)
    path = shard(tmp_path, 1)
    path.with_name(path.name + ".tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="00001-of-00005.*No space left on device"):
        write_pairs(tmp_path, metadata(), make_shard)
    assert not path.exists() and not path.with_name(path.name + ".tmp").is_symlink()
    write_pairs(tmp_path, metadata(), make_shard)
    assert_complete(tmp_path)


def test_a_full_device_for_the_metadata(tmp_path):
    (tmp_path / "metadata.json.0.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="metadata.json: cannot be written .*No space left"):
        write_pairs(tmp_path, metadata(), make_shard)
    assert list(tmp_path.iterdir()) == []
    write_pairs(tmp_path, metadata(), make_shard)
    assert_complete(tmp_path)


def test_a_shard_that_cannot_be_read_back_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("dmd_jax.data.shards.count_records", lambda *args: (4, True))
    with pytest.raises(UserError, match="fewer than its 5 pairs can be read back"):
        write_pairs(tmp_path, metadata(), make_shard)
    assert [path.name for path in tmp_path.iterdir()] == ["metadata.json"]
