"""Prompts into shards and back, and the command that does it."""

import hashlib
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from commands import fails, succeeds
from prompt_files import (
    PROMPTS,
    WRITERS,
    read,
    write_jsonl,
    write_txt,
)
from small_tokenizer import write_tokenizer

from dmd_jax.data.loader import batches
from dmd_jax.data.prompt_shards import PromptSource, TokenSource, write_prompts
from dmd_jax.errors import UserError
from dmd_jax.storage.seals import read_sealed, write_sealed
from dmd_jax.teachers.tokenizer import load_tokenizer


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_the_same_prompts(tmp_path, name):
    WRITERS[name](tmp_path / name, PROMPTS)
    assert read(tmp_path / name) == PROMPTS
    metadata = write_prompts(tmp_path / "out", tmp_path / name, shard_size=2)
    assert metadata.source == name and metadata.count == 5
    source = PromptSource(tmp_path / "out")
    assert [source[i] for i in range(len(source))] == PROMPTS
    digest = b"".join(len(p.encode()).to_bytes(8, "little") + p.encode() for p in PROMPTS)
    assert metadata.prompts_sha256 == hashlib.sha256(digest).hexdigest()


def test_metadata_and_shards(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", PROMPTS, key="Prompt")
    metadata = write_prompts(tmp_path / "out", tmp_path / "rows.jsonl", shard_size=2)
    assert read_sealed(tmp_path / "out" / "metadata.json", "a test's")[0] == {
        "source": "rows.jsonl",
        "files": 1,
        "key": "Prompt",
        "skipped": 0,
        "prompts_sha256": metadata.prompts_sha256,
        "count": 5,
        "shard_size": 2,
        "format_version": 1,
    }
    names = [f"prompts-0000{i}-of-00003.array_record" for i in range(3)]
    assert sorted(os.listdir(tmp_path / "out")) == ["metadata.json", *names]
    assert PromptSource(tmp_path / "out").metadata == metadata


def test_resuming_writes_only_what_is_missing(tmp_path, caplog):
    write_txt(tmp_path / "a.txt", [f"prompt {i}" for i in range(23)])
    out, reports = tmp_path / "out", []
    write_prompts(out, tmp_path / "a.txt", shard_size=5)
    shards = sorted(out.glob("*.array_record"))
    times = [shard.stat().st_mtime_ns for shard in shards]
    shards[1].unlink()
    shards[3].write_bytes(shards[3].read_bytes()[:1000])
    again = write_prompts(
        out, tmp_path / "a.txt", shard_size=5, written=lambda *a: reports.append(a)
    )
    assert reports == [(13, 23), (18, 23), (23, 23)]
    assert f"{shards[3]} is torn: 0 of 5 prompts readable" in caplog.text
    kept = [shard.stat().st_mtime_ns for shard in shards]
    assert [a == b for a, b in zip(kept, times)] == [True, False, True, False, True]
    source = PromptSource(out)
    assert [source[i] for i in range(23)] == [f"prompt {i}" for i in range(23)]
    assert source.metadata == again


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path):
    prompts = [f"prompt {i}" for i in range(10)]
    for changed in (prompts[:-1], [*prompts[:6], "other", *prompts[7:]]):
        write_txt(tmp_path / "a.txt", prompts)
        out = tmp_path / f"out{len(changed)}"

        def change(rows, changed=changed):
            write_txt(tmp_path / "a.txt", changed)

        with pytest.raises(UserError, match="a.txt: changed while it was read"):
            write_prompts(out, tmp_path / "a.txt", shard_size=5, checked=change)
        names = {path.name for path in out.iterdir()}
        assert names == {"metadata.json", "prompts-00000-of-00002.array_record"}


def test_other_prompts_and_pairs_are_not_touched(tmp_path):
    write_txt(tmp_path / "a.txt", PROMPTS[:1])
    write_txt(tmp_path / "b.txt", PROMPTS[1:3])
    write_prompts(tmp_path / "out", tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"already holds other prompts \(count 1 there, 2 now; "):
        write_prompts(tmp_path / "out", tmp_path / "b.txt")
    assert PromptSource(tmp_path / "out")[0] == PROMPTS[0]
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "metadata.json").write_text('{"teacher": "EDM"}')
    with pytest.raises(UserError, match="metadata.json: missing keys .*unknown keys"):
        write_prompts(tmp_path / "pairs", tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"files": 0}, "files is 0"),
        ({"skipped": -1}, "skipped is -1"),
        ({"key": 3}, "key is 3, expected text or null"),
        ({"source": None}, "source is None, expected text"),
        ({"prompts_sha256": ...}, r"missing keys \['prompts_sha256'\]"),
        ({"format_version": 2}, "format_version is 2, expected 1"),
        ({"count": 6}, "00000-of-00003.* of a folder with another metadata.json"),
    ],
)
def test_bad_metadata(tmp_path, change, message):
    write_txt(tmp_path / "a.txt", PROMPTS[:3] + PROMPTS[4:] + ["z"])
    write_prompts(tmp_path, tmp_path / "a.txt", shard_size=2)
    path = tmp_path / "metadata.json"
    values = read_sealed(path, "a test's")[0] | change
    write_sealed(path, {k: v for k, v in values.items() if v is not ...})
    with pytest.raises(UserError, match=message):
        PromptSource(tmp_path)


def test_a_damaged_record_is_named(tmp_path):
    write_txt(tmp_path / "a.txt", ["a red cat", "a red dog"])
    write_prompts(tmp_path / "out", tmp_path / "a.txt")
    (shard,) = (tmp_path / "out").glob("*.array_record")
    shard.write_bytes(shard.read_bytes().replace(b"red dog", b"rad dog"))
    source = PromptSource(tmp_path / "out")
    assert source[0] == "a red cat"
    with pytest.raises(UserError, match=r"record 1 is damaged .*delete the shard and run prompts"):
        source[1]
    for index in (2, -1):
        with pytest.raises(IndexError):
            source[index]


def test_tokens_for_the_loader(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    write_txt(tmp_path / "a.txt", PROMPTS[:3] + PROMPTS[4:])
    write_prompts(tmp_path / "out", tmp_path / "a.txt", shard_size=2)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    prompts = PromptSource(tmp_path / "out")
    source = TokenSource(prompts, tokenizer)
    expected = tokenizer.encode([prompts[i] for i in range(4)])
    first = next(batches(source, batch_size=6, seed=0, shuffle=False))
    assert first["tokens"].dtype == np.int32
    np.testing.assert_array_equal(first["tokens"], expected[[0, 1, 2, 3, 0, 1]])
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(4) as threads:
        for index, found in enumerate(threads.map(copy.__getitem__, [0, 1, 2, 3] * 20)):
            np.testing.assert_array_equal(found["tokens"], expected[index % 4])


def test_command(tmp_path, capsys):
    source, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows = [{"caption": "one"}, {"text": 1}, {"caption": 2}, {"caption": "two"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = fails(capsys, "prompts", source, out)
    assert line == (
        f"dmd-jax: error: {source}: 2 of 4 rows are broken: {source} line 2: no key 'caption'; "
        f"those there: 'text'; {source} line 3: no text but int; --skip-broken leaves them out"
    )
    assert not out.exists()
    for _ in range(2):  # the second time nothing is left to do
        succeeds("prompts", source, out, "--skip-broken", "--shard-size", 1)
        printed = capsys.readouterr()
        assert printed.out == f"prompts: 2 in {out}, 2 broken rows left out\n"
        assert "check  4  " in printed.err and "rows/s" in printed.err
    source = PromptSource(out)
    assert (source[0], source[1], source.metadata.skipped) == ("one", "two", 2)


def test_command_warns_of_what_it_leaves_out(tmp_path, caplog):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n" + b"\xff\n" * 7)
    succeeds("prompts", path, tmp_path / "out", "--skip-broken")
    assert f"{path}: 7 of 8 rows are broken and left out: {path} line 2: no UTF-8" in caplog.text
    assert f"{path} line 6: " in caplog.text and f"{path} line 7: " not in caplog.text
    assert caplog.text.rstrip().endswith("; …")


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"", [], "holds no prompts, expected at least one row"),
        (b"\n\xff\n", ["--skip-broken"], "all 2 rows are broken: .*line 1: empty line"),
        (b"a\n", ["--shard-size", 0], "shard size 0, expected at least 1"),
        (b"a\n", ["--keys", "x"], "unexpected argument '--keys'"),
    ],
)
def test_command_refuses(tmp_path, capsys, content, arguments, message):
    (tmp_path / "a.txt").write_bytes(content)
    line = fails(capsys, "prompts", tmp_path / "a.txt", tmp_path / "out", *arguments)
    assert message.partition(".*")[0] in line and message.rpartition(".*")[2] in line
    assert not (tmp_path / "out").exists()
