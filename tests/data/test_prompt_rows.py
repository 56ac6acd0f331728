"""Rows of prompts out of every kind of file, and every way they can be broken."""

import itertools
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from prompt_files import (
    PROMPTS,
    WRITERS,
    broken,
    read,
    tar_members,
    write_jsonl,
    write_parquet,
    write_tar,
    write_txt,
)
from pyarrow import parquet

from dmd_jax.data.prompt_rows import MAX_ROW_BYTES, BrokenRow, PromptRows
from dmd_jax.data.prompt_shards import write_prompts
from dmd_jax.errors import UserError


def test_empty_prompts_are_kept_where_somebody_wrote_them(tmp_path):
    prompts = ["a", "", " ", "b"]
    for name in ("rows.jsonl", "table.parquet", "txt.tar", "json.tar"):
        WRITERS[name](tmp_path / name, prompts)
        assert read(tmp_path / name) == prompts
    write_txt(tmp_path / "lines.txt", prompts)
    assert broken(tmp_path / "lines.txt") == [("line 2", "empty line"), ("line 3", "empty line")]


def test_lines_end_where_they_should(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo \r three\nlast")
    first, second, third = read(tmp_path / "a.txt")
    assert (first, third) == ("one", "last")
    assert second.problem.startswith("a carriage return inside the line")
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
        BrokenRow(f"{tmp_path / 'a.tar'} sample 3", "a link to what is not before it in the tar"),
        BrokenRow(f"{tmp_path / 'a.tar'} sample 4", "no UTF-8: invalid start byte at byte 0"),
        "good",
        BrokenRow(f"{tmp_path / 'a.tar'} sample 6", "more than 1,048,576 bytes"),
        "first",
    ]
    asked = read(tmp_path / "a.tar", key="caption")
    assert [row for row in asked if isinstance(row, str)] == ["of json", "good"]
    assert asked[-1] == BrokenRow(f"{tmp_path / 'a.tar'} sample 7", "no .json")


def test_a_hard_link_in_a_tar_is_the_member_that_it_names(tmp_path):
    (tmp_path / "s").mkdir()
    for stem, text in (("0", "a cat"), ("2", "a dog")):
        (tmp_path / "s" / f"{stem}.txt").write_text(text)
    os.link(tmp_path / "s" / "0.txt", tmp_path / "s" / "1.txt")
    os.link(tmp_path / "s" / "0.txt", tmp_path / "s" / "3.txt")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(4):
            tar.add(tmp_path / "s" / f"{number}.txt", f"{number}.txt")
        assert [member.islnk() for member in tar.getmembers()] == [False, True, False, True]
    assert read(tmp_path / "a.tar") == ["a cat", "a cat", "a dog", "a cat"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_is_no_prompt(tmp_path, encoding):
    text = "a cat\r\na dog\r\n"
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    rows = read(tmp_path / "a.txt")
    assert rows and all(isinstance(row, BrokenRow) for row in rows)
    (tmp_path / "a.txt").write_bytes(f"\ufeff{text}".encode(encoding))
    with pytest.raises(UserError, match="is in UTF-16"):
        read(tmp_path / "a.txt")


def test_a_nul_character_of_json_is_no_prompt(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\u0000b"}\n{"text": "good"}\n')
    first, second = read(tmp_path / "a.jsonl")
    assert first.problem.startswith("a NUL character") and second == "good"


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
        (lambda folder: os.mkfifo(folder / "a.txt"), "a.txt", "no regular file"),
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
