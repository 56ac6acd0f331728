"""Prompts out of every kind of file into shards and back, and every way they can be broken."""

import hashlib
import io
import itertools
import json
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from commands import fails, succeeds
from pyarrow import parquet
from small_tokenizer import write_tokenizer

from dmd_jax.data.loader import batches
from dmd_jax.data.prompt_rows import MAX_ROW_BYTES, BrokenRow, PromptRows
from dmd_jax.data.prompts import PromptSource, TokenSource, write_prompts
from dmd_jax.errors import UserError
from dmd_jax.tokenizer import load_tokenizer

PROMPTS = [
    "a red cat",
    " A dog, 2\u20133 of them ",
    "caf\u00e9 \U0001f600",
    "the\u2028end\x0b\x85",
    "x",
]


def write_txt(path, prompts):
    path.write_bytes("".join(f"{prompt}\n" for prompt in prompts).encode())


def write_jsonl(path, prompts, key="caption"):
    lines = [json.dumps({"url": "", key: prompt}) for prompt in prompts]
    path.write_text("".join(f"{line}\n" for line in lines))


def write_parquet(path, prompts, key="caption", kind=None):
    columns = {"url": [""] * len(prompts), key: pa.array(prompts, kind)}
    parquet.write_table(pa.table(columns), path, row_group_size=2)


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "0.txt"
            else:
                content = content if isinstance(content, bytes) else content.encode()
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content or b""))


def tar_members(prompts, extension):
    for number, prompt in enumerate(prompts):
        content = prompt if extension == "txt" else json.dumps({"caption": prompt}, indent=1)
        yield from (
            (f"./{number:05d}.jpg", b"\xff" * 700),
            (f"./{number:05d}.{extension}", content),
        )
        yield f"./{number:05d}.mask.txt", "not the caption"


WRITERS = {
    "lines.txt": write_txt,
    "rows.jsonl": write_jsonl,
    "LAION.jsonl": lambda path, prompts: write_jsonl(path, prompts, "TEXT"),
    "table.parquet": write_parquet,
    "large.parquet": lambda *a: write_parquet(*a, kind=pa.large_string()),
    "binary.parquet": lambda *a: write_parquet(*a, key="text", kind=pa.binary()),
    "coded.parquet": lambda *a: write_parquet(*a, kind=pa.dictionary(pa.int32(), pa.string())),
    "txt.tar": lambda path, prompts: write_tar(path, tar_members(prompts, "txt")),
    "json.tar": lambda path, prompts: write_tar(path, tar_members(prompts, "json")),
}


def read(source, **options):
    rows = list(PromptRows(source, **options))
    assert list(PromptRows(source, **options)) == rows
    return [row if isinstance(row, BrokenRow) else row.decode() for row in rows]


def broken(source, **options):
    """(row, problem) of the broken rows."""
    found = [row for row in read(source, **options) if isinstance(row, BrokenRow)]
    assert all(row.where.startswith(f"{source} ") for row in found)
    return [(row.where.removeprefix(f"{source} "), row.problem) for row in found]


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
    assert json.loads((tmp_path / "out" / "metadata.json").read_text()) == {
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


def test_empty_prompts_are_kept_where_somebody_wrote_them(tmp_path):
    prompts = ["a", "", " ", "b"]
    for name in ("rows.jsonl", "table.parquet", "txt.tar", "json.tar"):
        WRITERS[name](tmp_path / name, prompts)
        assert read(tmp_path / name) == prompts
    write_txt(tmp_path / "lines.txt", prompts)
    assert broken(tmp_path / "lines.txt") == [("line 2", "empty line"), ("line 3", "empty line")]


def test_lines_end_where_they_should(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo \r three\nlast")
    assert read(tmp_path / "a.txt") == ["one", "two \r three", "last"]
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}')
    assert read(tmp_path / "a.jsonl") == ["one", "two"]
    long = "x" * MAX_ROW_BYTES
    write_txt(tmp_path / "long.txt", [long, long + "x", "y", long + "xyz", long * 3, "z"])
    assert read(tmp_path / "long.txt")[::2] == [long, "y", BrokenRow(*broken_long(tmp_path, 5))]
    assert [row for row, _ in broken(tmp_path / "long.txt")] == ["line 2", "line 4", "line 5"]
    assert read(tmp_path / "long.txt")[5] == "z"
    (tmp_path / "crlf.txt").write_bytes(long.encode() + b"\r\nb\r\n")
    assert read(tmp_path / "crlf.txt") == [long, "b"]


def broken_long(folder, number):
    return f"{folder / 'long.txt'} line {number}", "more than 1,048,576 bytes"


def test_broken_lines_of_json(tmp_path):
    lines = [
        *(b'{"url": 1}', b'{"caption": "good", "text": "other"}', b'{"caption": "cut'),
        *(b"", b"[1]", b'"caption"', b'{"caption": null}', b'{"caption": 3}', b'{"text": "good"}'),
        *(b'{"caption": "\xff"}', b'{"caption": "\\ud83d"}', b"[" * 100_000),
        *(b'{"caption": ["a"]}', b'{"caption": "\\ud83d\\ude00", "url": NaN}'),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    expected = {
        1: "no key caption, text, prompt; those there: 'url'",
        3: "damaged JSON: Unterminated string",
        4: "empty line",
        5: "no JSON object",
        6: "no JSON object",
        7: "no text but null",
        8: "no text but int",
        9: "no key 'caption'; those there: 'text'",
        10: "no UTF-8: invalid start byte at byte 13",
        11: "no valid Unicode: surrogates not allowed",
        12: "damaged JSON: maximum recursion",
        13: "no text but list",
    }
    found = broken(tmp_path / "a.jsonl")
    assert [row for row, _ in found] == [f"line {number}" for number in expected]
    for (row, problem), start in zip(found, expected.values()):
        assert problem.startswith(start), row
    good = [row for row in read(tmp_path / "a.jsonl") if isinstance(row, str)]
    assert good == ["good", "\U0001f600"]
    assert read(tmp_path / "a.jsonl", key="text")[8] == "good"


def test_many_keys_are_not_all_named(tmp_path):
    row = {f"key{i}" + "y" * 1000: i for i in range(1000)}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    ((_, problem),) = broken(tmp_path / "a.jsonl")
    assert problem.endswith(", …") and len(problem) < 600


def test_broken_rows_of_a_table(tmp_path):
    text = pa.array([b"good", None, b"\xc3", b"", b"x" * (MAX_ROW_BYTES + 1), b"good"], pa.binary())
    # A column that says it is UTF-8 and is not, as other writers make them.
    text = pa.StringArray.from_buffers(len(text), *text.buffers()[1:], text.buffers()[0])
    parquet.write_table(pa.table({"text": text}), tmp_path / "a.parquet", row_group_size=4)
    assert broken(tmp_path / "a.parquet") == [
        ("row 2", "no text but null"),
        ("row 3", "no UTF-8: unexpected end of data at byte 0"),
        ("row 5", "more than 1,048,576 bytes"),
    ]


@pytest.mark.parametrize(
    ("columns", "key", "message"),
    [
        ({"url": ["u"], "id": [1]}, None, "no key caption, text, prompt; those there: 'url', 'id'"),
        ({"text": ["u"]}, "TEXT", "no key 'TEXT'; those there: 'text'"),
        ({"caption": [1, 2]}, None, "column 'caption' is int64, expected text"),
        ({"caption": [["a"]]}, None, "column 'caption' is list<.*>, expected text"),
    ],
)
def test_tables_without_a_column_of_text(tmp_path, columns, key, message):
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=f"a.parquet: {message}"):
        read(tmp_path / "a.parquet", key=key)


def test_samples_of_a_tar(tmp_path):
    members = [
        ("a.v2/0.TXT", "upper case\n"),
        ("a.v2/0.json", '{"caption": "of json"}'),
        ("a.v2/1.jpg", b"\xff"),
        ("a.v2/2.json", '{"caption": 5}'),
        ("._3.txt", "hidden"),
        ("readme", "no extension"),
        ("3.txt", None),  # a link
        ("4.txt", b"\xff"),
        ("5.seg.txt", "another part"),
        ("5.json", '\ufeff{"caption": "good"}'),
        ("6.txt", "x" * (MAX_ROW_BYTES + 1)),
        ("7.txt", "first"),
        ("7.txt", "second"),
    ]
    write_tar(tmp_path / "a.tar", members)
    assert read(tmp_path / "a.tar") == [
        "upper case",
        BrokenRow(f"{tmp_path / 'a.tar'} sample a.v2/1", "no .txt and no .json"),
        BrokenRow(f"{tmp_path / 'a.tar'} sample a.v2/2", "no text but int"),
        BrokenRow(f"{tmp_path / 'a.tar'} sample 4", "no UTF-8: invalid start byte at byte 0"),
        "good",
        BrokenRow(f"{tmp_path / 'a.tar'} sample 6", "more than 1,048,576 bytes"),
        "first",
    ]
    asked = read(tmp_path / "a.tar", key="caption")
    assert [row for row in asked if isinstance(row, str)] == ["of json", "good"]
    assert asked[-1] == BrokenRow(f"{tmp_path / 'a.tar'} sample 7", "no .json")


def test_nothing_of_a_tar_is_written(tmp_path):
    members = [("../out.txt", "up"), ("/abs/out.txt", "absolute")]
    write_tar(tmp_path / "a.tar", members)
    assert read(tmp_path / "a.tar") == ["up", "absolute"]
    assert os.listdir(tmp_path) == ["a.tar"]


def test_a_damaged_tar_is_never_taken_for_a_shorter_one(tmp_path):
    write_tar(tmp_path / "a.tar", tar_members([f"prompt {i}" for i in range(4)], "txt"))
    whole = (tmp_path / "a.tar").read_bytes()
    for length in range(0, len(whole), 512):
        if not any(whole[length:]):
            break
        (tmp_path / "b.tar").write_bytes(whole[:length])
        with pytest.raises(UserError, match="b.tar: "):
            read(tmp_path / "b.tar")
    header = whole.index(b"./00002.jpg")
    (tmp_path / "b.tar").write_bytes(whole[: header + 3] + b"?" + whole[header + 4 :])
    with pytest.raises(UserError, match="b.tar: truncated or damaged, no end where it should be"):
        read(tmp_path / "b.tar")


@pytest.mark.parametrize("size", [-512, -1536])
def test_a_tar_that_leads_back_ends(tmp_path, size):
    """The third member's size is negative: the next one would be the third or the second again."""
    write_tar(tmp_path / "a.tar", [("0.txt", "a"), ("1.txt", "b"), ("2.txt", "c")])
    content = bytearray((tmp_path / "a.tar").read_bytes())
    member = tarfile.TarInfo("2.txt")
    member.size = size
    content[2048 : 2048 + 512] = member.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=f"a.tar: truncated or damaged, a member of {size:,} bytes"):
        list(itertools.islice(PromptRows(tmp_path / "a.tar"), 9))


def test_control_characters_of_a_member_are_written_out(tmp_path):
    write_tar(tmp_path / "a.tar", [("\x1b[2J.txt", b"\xff")])
    assert [row.where for row in PromptRows(tmp_path / "a.tar")] == [
        f"{tmp_path / 'a.tar'} sample \\x1b[2J"
    ]


@pytest.mark.parametrize("name", ["a.parquet", "a.tar"])
def test_random_bytes_give_rows_or_a_user_error(tmp_path, name):
    rng = np.random.default_rng(0)
    path = tmp_path / name
    write = write_parquet if name == "a.parquet" else WRITERS["txt.tar"]
    write(path, PROMPTS)
    whole = path.read_bytes()
    for contents in (b"", whole[:700], rng.bytes(5000)):
        path.write_bytes(contents)
        with pytest.raises(UserError, match=f"{name}: "):
            read(path)
    for _ in range(150):
        changed = bytearray(whole)
        start = rng.integers(0, len(whole))
        changed[start : start + rng.integers(1, 40)] = rng.bytes(rng.integers(1, 40))
        path.write_bytes(changed)
        try:
            rows = list(PromptRows(path))
        except UserError as error:
            assert name in str(error) and "\n" not in str(error)
        else:
            assert all(isinstance(row, bytes | BrokenRow) for row in rows)


def test_folders_and_patterns_are_read_in_order(tmp_path):
    for number in (2, 10, 0):
        write_txt(tmp_path / f"part-{number:02d}.txt", [f"{number}", "more"])
    (tmp_path / ".hidden.txt").write_text("hidden\n")
    (tmp_path / "readme.md").write_text("other")
    expected = ["0", "more", "2", "more", "10", "more"]
    assert read(tmp_path) == read(f"{tmp_path}/*.txt") == read(f"{tmp_path}/**/*.txt") == expected
    metadata = write_prompts(tmp_path / "out", tmp_path)
    assert (metadata.source, metadata.files) == ("part-00.txt to part-10.txt", 3)
    # The same prompts by another name are the same.
    assert write_prompts(tmp_path / "out", f"{tmp_path}/part-*.txt") == metadata


def test_one_key_holds_for_all_files(tmp_path):
    write_jsonl(tmp_path / "0.jsonl", ["a"], key="text")
    (tmp_path / "1.jsonl").write_text('{"caption": "b", "text": "c"}\n')
    assert read(tmp_path) == ["a", "c"]


@pytest.mark.parametrize(
    ("make", "source", "message"),
    [
        (None, "none.txt", "none.txt: no such file or folder, expected .txt, .jsonl"),
        (None, "none*.txt", "holds no prompts, expected .txt, .jsonl, .parquet or .tar"),
        (lambda folder: None, "", "holds no prompts, expected .txt, .jsonl, .parquet or .tar"),
        (lambda folder: (folder / "a.csv").touch(), "a.csv", "unknown kind of file '.csv', expec"),
        (lambda folder: (folder / "a").touch(), "a", "unknown kind of file '', expected .txt"),
        (lambda folder: os.mkfifo(folder / "a.txt"), "a.txt", "expected a regular file"),
        (
            lambda folder: [(folder / name).touch() for name in ("a.txt", "b.tar", "c.md")],
            "",
            r"holds .tar and .txt; expected files of one kind, such as '.*/\*.tar'",
        ),
        (
            lambda folder: (folder / "a.txt").symlink_to(folder.with_name("outside")),
            "",
            r"the link a.txt leads out of the folder; .* '.*/\*.txt' to follow links",
        ),
    ],
)
def test_sources_that_are_refused(tmp_path, make, source, message):
    if make:
        make(tmp_path)
    with pytest.raises(UserError, match=message):
        PromptRows(tmp_path / source)


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
        ({"count": 6}, "00002-of-00003.*1 prompts are readable, expected 2"),
    ],
)
def test_bad_metadata(tmp_path, change, message):
    write_txt(tmp_path / "a.txt", PROMPTS[:3] + PROMPTS[4:] + ["z"])
    write_prompts(tmp_path, tmp_path / "a.txt", shard_size=2)
    path = tmp_path / "metadata.json"
    values = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
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
