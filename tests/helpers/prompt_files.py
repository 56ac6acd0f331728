"""Prompts in every kind of file, and what comes out of them."""

import io
import json
import tarfile

import pyarrow as pa
from pyarrow import parquet

from dmd_jax.data.prompt_rows import BrokenRow, PromptRows

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
