"""Shards that stand under the name of another, of pairs and of prompts alike."""

import hashlib
import json

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from shard_labels import write_records

from dmd_jax.data.pair_shards import PairsMetadata, PairSource, write_pairs
from dmd_jax.data.prompt_shards import PromptSource, write_prompts
from dmd_jax.errors import UserError
from dmd_jax.storage.seals import read_sealed, write_sealed

PROMPTS = [f"prompt {number}" for number in range(8)]


def pairs_of(folder, seed=5):
    """Eight pairs in shards of three, three and two."""
    metadata = PairsMetadata(
        teacher="a test",
        teacher_sha256="00" * 32,
        sampler="heun",
        num_steps=18,
        guidance=1.0,
        seed=seed,
        count=8,
        shard_size=3,
        sample_shape=(2, 2, 1),
        num_classes=0,
    )

    def make(start, stop):
        z = np.arange(start, stop, dtype=np.float32).reshape(-1, 1, 1, 1) * np.ones((1, 2, 2, 1))
        z = z.astype(np.float32)
        return {"z_ref": z, "y_ref": -z, "label": np.zeros(stop - start, np.int32)}

    write_pairs(folder, metadata, make)
    source = PairSource(folder, sample_shape=(2, 2, 1), num_classes=0)
    return [int(source[i]["z_ref"][0, 0, 0]) for i in range(8)]


def prompts_of(folder, prompts=PROMPTS):
    folder.parent.mkdir(exist_ok=True)
    source = folder.with_name(f"{folder.name}.txt")
    source.write_text("\n".join(prompts))
    write_prompts(folder, source, shard_size=3)
    source = PromptSource(folder)
    return [int(source[i].split()[1]) for i in range(8)]


MAKERS = {"pairs": pairs_of, "prompts": prompts_of}
kinds = pytest.mark.parametrize("kind", list(MAKERS))


@kinds
def test_metadata_is_read_once_when_a_folder_is_opened(tmp_path, kind, monkeypatch):
    MAKERS[kind](tmp_path / "folder")
    reads = []

    def noted(path, *args, **options):
        reads.append(path.name)
        return read_sealed(path, *args, **options)

    monkeypatch.setattr("dmd_jax.data.shards_metadata.read_sealed", noted)
    if kind == "pairs":
        PairSource(tmp_path / "folder", sample_shape=(2, 2, 1), num_classes=0)
    else:
        PromptSource(tmp_path / "folder")
    assert reads == ["metadata.json"]


def shards(folder):
    return sorted(folder.glob("*.array_record"))


def swap(first, second):
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


@kinds
def test_the_last_record_is_the_shards_label(kind, tmp_path):
    MAKERS[kind](tmp_path / "out")
    content = json.loads((tmp_path / "out" / "metadata.json").read_text())
    seal = content.pop("sha256")
    sha256 = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert seal == sha256
    for path, (start, stop) in zip(shards(tmp_path / "out"), ((0, 3), (3, 6), (6, 8))):
        reader = ArrayRecordReader(str(path))
        assert reader.num_records() == stop - start + 1
        (label,) = reader.read([stop - start])
        head, _, text = label.partition(b"\n")
        assert head == b"\0dmd_jax shard"
        expected = dict(kind=kind, name=path.name, start=start, stop=stop, metadata_sha256=sha256)
        assert json.loads(text) == expected


@kinds
@pytest.mark.parametrize("first, second", [(0, 1), (1, 2)], ids=["equal", "unequal"])
def test_swapped_shards_are_refused_by_reader_and_writer(kind, first, second, tmp_path):
    """Of the same number of records and of another."""
    folder = tmp_path / "out"
    assert MAKERS[kind](folder) == list(range(8))
    files = shards(folder)
    swap(files[first], files[second])
    before = {path: path.read_bytes() for path in files}
    message = (
        f"{files[first]}: is '{files[second].name}', expected {kind} {3 * first} to "
        f"{3 * first + 2}: give it back its name, or delete it and run {kind} again"
    )
    with pytest.raises(UserError) as caught:
        MAKERS[kind](folder)
    assert str(caught.value) == message
    open_it = {"pairs": open_pairs, "prompts": PromptSource}[kind]
    with pytest.raises(UserError) as caught:
        open_it(folder)
    assert str(caught.value) == message
    assert {path: path.read_bytes() for path in files} == before
    swap(files[first], files[second])
    assert MAKERS[kind](folder) == list(range(8))


def open_pairs(folder):
    return PairSource(folder, sample_shape=(2, 2, 1), num_classes=0)


def test_a_shard_of_another_folder_is_refused(tmp_path):
    pairs_of(tmp_path / "a")
    pairs_of(tmp_path / "b", seed=6)
    ours, theirs = shards(tmp_path / "a")[1], shards(tmp_path / "b")[1]
    ours.write_bytes(theirs.read_bytes())
    message = "a/pairs-00001-of-00003.array_record: is .* of a folder with another metadata.json"
    with pytest.raises(UserError, match=message):
        open_pairs(tmp_path / "a")


def test_metadata_that_was_changed_after_its_shards_is_refused_and_its_layout_does_not_matter(
    tmp_path,
):
    pairs_of(tmp_path / "out")
    path = tmp_path / "out" / "metadata.json"
    content, _ = read_sealed(path, "a test's")
    path.write_text(json.dumps(dict(reversed(content.items()))))
    assert open_pairs(tmp_path / "out")[7]["z_ref"][0, 0, 0] == 7
    write_sealed(path, content | {"seed": 4})
    with pytest.raises(UserError, match="and its metadata.json as it was written"):
        open_pairs(tmp_path / "out")


@kinds
def test_shards_without_labels_are_read_and_gone_on_with_and_said_so(kind, tmp_path, caplog):
    folder = tmp_path / "out"
    MAKERS[kind](folder)
    assert "do not say" not in caplog.text
    for path in shards(folder):
        reader = ArrayRecordReader(str(path))
        write_records(path, reader.read(list(range(reader.num_records() - 1))))
    files = shards(folder)
    kept = files[0].read_bytes()
    files[1].unlink()
    assert MAKERS[kind](folder) == list(range(8))
    assert files[0].read_bytes() == kept
    message = f"{folder}: 2 of 3 shards do not say which they are, as {kind} of earlier versions"
    assert message in caplog.text


def test_a_label_that_is_none_is_refused(tmp_path):
    pairs_of(tmp_path / "out")
    path = shards(tmp_path / "out")[2]
    records = ArrayRecordReader(str(path)).read([0, 1])
    for text in (b"{", b"[]", b'{"kind": "pairs"}', b"\xff", b"7"):
        write_records(path, [*records, b"\0dmd_jax shard\n" + text])
        with pytest.raises(UserError, match="00002-of-00003.array_record: its label .* is none"):
            open_pairs(tmp_path / "out")


def test_a_damaged_label_makes_a_torn_shard(tmp_path, caplog):
    pairs_of(tmp_path / "out")
    path = shards(tmp_path / "out")[0]
    path.write_bytes(path.read_bytes().replace(b'"start": 0', b'"start": 1'))
    with pytest.raises(UserError, match="00000-of-00003.*damaged, 0 pairs are readable"):
        open_pairs(tmp_path / "out")
    assert pairs_of(tmp_path / "out") == list(range(8))
    assert f"{path} is torn: 0 of 3 pairs readable; making it again" in caplog.text
