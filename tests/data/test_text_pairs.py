"""Pairs with a text: what differs from those with labels, and that neither is taken for the other.

What both share (torn shards, full disks, damaged records) is in test_pairs.py.
"""

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from dmd_jax.data.pair_shards import PairSource, write_pairs
from dmd_jax.data.pairs_metadata import PairsMetadata, TextPairsMetadata
from dmd_jax.errors import UserError
from dmd_jax.storage.seals import read_sealed, write_sealed

SHAPE = (2, 3, 4)
LENGTH = 7
VOCAB = 530
RECORD_BYTES = 8 * 24 + 4 * LENGTH
COMMON = dict(
    teacher="a test",
    teacher_sha256="00" * 32,
    sampler="pndm",
    num_steps=50,
    guidance=3.0,
    seed=5,
    count=8,
    shard_size=5,
    sample_shape=SHAPE,
    num_classes=0,
)
TEXT = dict(
    compute_dtype="bfloat16",
    matmul_precision="high",
    token_length=LENGTH,
    vocab_size=VOCAB,
    text_encoder_sha256="11" * 32,
    prompts=3,
    prompts_sha256="22" * 32,
    sampling={"timestep_spacing": "leading", "steps_offset": 1},
)


def metadata(**changes):
    return TextPairsMetadata(**(COMMON | TEXT | changes))


def make_shard(start, stop):
    numbers = np.arange(start, stop)
    z_ref = np.stack([np.random.default_rng(n).standard_normal(SHAPE) for n in numbers])
    z_ref = z_ref.astype(np.float32)
    tokens = (numbers[:, None] * 100 + np.arange(LENGTH)) % VOCAB
    return {"z_ref": z_ref, "y_ref": 2 * z_ref, "tokens": tokens}


def shard(folder, index):
    return folder / f"pairs-{index:05d}-of-00002.array_record"


def open_pairs(folder, **changes):
    return PairSource(
        folder, **(dict(sample_shape=SHAPE, num_classes=0, token_length=LENGTH) | changes)
    )


@pytest.fixture
def folder(tmp_path):
    write_pairs(tmp_path / "pairs", metadata(), make_shard)
    return tmp_path / "pairs"


def test_text_pairs_come_back_to_the_bit(folder):
    source, expected = open_pairs(folder), make_shard(0, 8)
    assert len(source) == 8 and source.metadata == metadata()
    for index in range(8):
        pair = source[index]
        assert list(pair) == ["z_ref", "y_ref", "tokens"]
        assert pair["tokens"].dtype == np.int32 and not pair["tokens"].flags.writeable
        for name, values in expected.items():
            np.testing.assert_array_equal(pair[name], values[index])


def test_the_record_is_as_documented(folder):
    record = ArrayRecordReader(str(shard(folder, 1))).read([2])[0]
    assert len(record) == RECORD_BYTES
    expected = make_shard(7, 8)
    values = np.frombuffer(record[: -4 * LENGTH], "<f4").reshape(2, *SHAPE)
    np.testing.assert_array_equal(values, [expected["z_ref"][0], expected["y_ref"][0]])
    np.testing.assert_array_equal(
        np.frombuffer(record[-4 * LENGTH :], "<i4"), expected["tokens"][0]
    )


def test_stable_diffusions_record_has_the_documented_size():
    dtype = metadata(sample_shape=(64, 64, 4), token_length=77).record_dtype
    assert dtype.itemsize == 131_072 + 308


def test_metadata_file(folder):
    written, _ = read_sealed(folder / "metadata.json", "a test's")
    shared = COMMON | {"sample_shape": [2, 3, 4], "format_version": 1, "dtype": "float32"}
    assert written == shared | TEXT


def test_only_what_is_missing_is_made_and_other_pairs_are_not_touched(folder):
    shard(folder, 1).unlink()
    asked = []
    write_pairs(folder, metadata(), lambda a, b: asked.append((a, b)) or make_shard(a, b))
    assert asked == [(5, 8)]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    other = dict(guidance=8.0, prompts_sha256="33" * 32)
    with pytest.raises(UserError, match="other pairs .guidance 3.0 there, 8.0 now; prompts_sha256"):
        write_pairs(folder, metadata(**other), make_shard)
    with pytest.raises(UserError, match=r"unknown keys \['prompts', 'prompts_sha256', 'sampling'"):
        write_pairs(folder, PairsMetadata(**COMMON), make_shard)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def with_labels(folder):
    make = lambda a, b: make_shard(a, b) | {"label": np.zeros(b - a, np.int32)}  # noqa: E731
    write_pairs(folder, PairsMetadata(**COMMON), make)


def test_pairs_of_the_other_kind_are_refused(folder, tmp_path):
    with_labels(tmp_path / "labels")
    with pytest.raises(UserError, match="labels: pairs have labels, expected text as the config"):
        open_pairs(tmp_path / "labels")
    with pytest.raises(UserError, match="pairs: pairs have text, expected labels as the config"):
        PairSource(folder, sample_shape=SHAPE, num_classes=0)
    assert open_pairs(tmp_path / "labels", token_length=None)[0]["label"] == 0


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (dict(sample_shape=(4, 4, 4)), r"resolution \(2, 3\), expected \(4, 4\)"),
        (dict(sample_shape=(2, 3, 8)), "channels 4, expected 8"),
        (dict(num_classes=10), "num_classes 0, expected 10"),
        (dict(token_length=77), "token_length 7, expected 77"),
    ],
)
def test_pairs_that_do_not_fit_the_configuration(folder, expected, message):
    with pytest.raises(UserError, match=f"{folder}: pairs have {message}"):
        open_pairs(folder, **expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": ...}, r"missing keys \['vocab_size'\], unknown keys \[\]"),
        ({"extra": 1}, r"missing keys \[\], unknown keys \['extra'\]"),
        ({"vocab_size": 0}, "vocab_size is 0, expected a whole number of at least 1"),
        ({"token_length": 7.0}, "token_length is 7.0"),
        ({"prompts": 0}, "prompts is 0"),
        ({"prompts_sha256": None}, "prompts_sha256 is None, expected text"),
        ({"text_encoder_sha256": 3}, "text_encoder_sha256 is 3, expected text"),
        ({"sampling": "leading"}, "sampling is 'leading', expected a JSON object"),
        ({"num_classes": 10}, "num_classes is 10, expected 0 for pairs with a text"),
    ],
)
def test_bad_metadata(folder, change, message):
    path = folder / "metadata.json"
    values = read_sealed(path, "a test's")[0] | change
    write_sealed(path, {k: v for k, v in values.items() if v is not ...})
    with pytest.raises(UserError, match=f"metadata.json: .*{message}"):
        open_pairs(folder)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.full((5, LENGTH), VOCAB), r"tokens from 530 to 530, expected 0\.\.529"),
        (np.full((5, LENGTH), -1), r"tokens from -1 to -1, expected 0\.\.529"),
        (np.zeros((5, LENGTH)), "tokens is float64"),
        (np.zeros((5, 77), np.int32), r"tokens is int32 \(5, 77\), expected integers \(5, 7\)"),
        (np.zeros(5, np.int32), r"tokens is int32 \(5,\), expected integers \(5, 7\)"),
    ],
)
def test_what_a_shard_may_not_hold(tmp_path, tokens, message):
    with pytest.raises(UserError, match=f"pairs 0 to 4: {message}"):
        write_pairs(tmp_path, metadata(), lambda a, b: make_shard(a, b) | {"tokens": tokens})
    assert [path.name for path in tmp_path.iterdir()] == ["metadata.json"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"x" * (RECORD_BYTES - 1), "219 bytes, expected 220"),
        (bytes(RECORD_BYTES - 4) + (530).to_bytes(4, "little"), r"tokens 530, expected 0\.\.529"),
        (bytes(RECORD_BYTES - 8) + b"\xff" * 4 + bytes(4), r"tokens -1, expected 0\.\.529"),
    ],
)
def test_records_that_are_no_pairs(folder, record, message):
    writer = ArrayRecordWriter(str(shard(folder, 0)), "group_size:1,uncompressed")
    for _ in range(5):
        writer.write(record)
    writer.close()
    with pytest.raises(UserError, match=rf"00000-of-00002.array_record: record 2 .*{message}"):
        open_pairs(folder)[2]
