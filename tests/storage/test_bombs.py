"""Small files that would fill the memory are refused by name, within 0.5 GB and 2 seconds."""

import gzip
import io
import os
import socket
import struct
import threading
import zipfile
import zlib

import numpy as np
import pyarrow as pa
import pytest
from peak import cost_of
from PIL import Image
from pyarrow import parquet

IMAGES = "from dmd_jax.data.images import open_images"
PROMPTS = "import pyarrow.parquet\nfrom dmd_jax.data.prompt_rows import PromptRows"
LATENTS = "from dmd_jax.reporting.sample_files import read_latents\nfrom pathlib import Path"
STATISTICS = "from pathlib import Path\nfrom dmd_jax.evaluation.reference import load_statistics"
STATES = "from dmd_jax.convert.torch_file import load_state_dict"
LARGE = 600 << 20  # bytes, more than what a refusal may take


def zeros(count):
    """`count` zero bytes in parts, so that the tests do not hold them."""
    for _ in range(count >> 20):
        yield bytes(1 << 20)


def write_zip(path, members, method=zipfile.ZIP_DEFLATED):
    """Writes members from their parts, and gives the path."""
    with zipfile.ZipFile(path, "w", method, compresslevel=1) as archive:
        for name, parts in members.items():
            with archive.open(name, "w", force_zip64=True) as stream:
                for part in parts:
                    stream.write(part)
    return path


def npy_header(shape, dtype="|u1"):
    stream = io.BytesIO()
    header = {"shape": shape, "fortran_order": False, "descr": dtype}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def black_png(side):
    """A grey PNG of side x side zeros, without holding them."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(side + 1)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def folder_of(write):
    def make(root):
        (root / "set").mkdir()
        write(root / "set")
        return root / "set"

    return make


@folder_of
def large_png(folder):
    (folder / "a.png").write_bytes(black_png(13_000))


@folder_of
def large_jpeg(folder):
    Image.new("L", (13_000, 13_000)).save(folder / "a.jpg", quality=1)


@folder_of
def large_tiff(folder):
    """13,000 x 13,000 by its header alone."""
    Image.new("RGB", (8, 8)).save(folder / "a.tif")
    data = bytearray((folder / "a.tif").read_bytes())
    place = struct.unpack_from("<I", data, 4)[0]
    for entry in range(struct.unpack_from("<H", data, place)[0]):
        at = place + 2 + 12 * entry
        if struct.unpack_from("<H", data, at)[0] in (256, 257):
            struct.pack_into("<HII", data, at + 2, 4, 1, 13_000)
    (folder / "a.tif").write_bytes(data)


@folder_of
def large_bmp(folder):
    header = struct.pack("<2sIHHI", b"BM", 0, 0, 0, 54)
    header += struct.pack("<IiiHHIIiiII", 40, 13_000, 13_000, 1, 24, 0, 0, 0, 0, 0, 0)
    (folder / "a.bmp").write_bytes(header)


@folder_of
def sparse_png(folder):
    with open(folder / "a.png", "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.truncate(8 * LARGE)


@folder_of
def text_chunk_png(folder):
    data = black_png(8)
    bomb = b"comment\0\0" + zlib.compress(bytes(64 << 20))
    (folder / "a.png").write_bytes(data[:33] + chunk(b"zTXt", bomb) * 2 + data[33:50])


@folder_of
def nested_json(folder):
    (folder / "a.png").write_bytes(black_png(8))
    (folder / "dataset.json").write_bytes(b'{"labels": [' + b"[]," * 20_000_000 + b"[]]}")


def member_png(root):
    return write_zip(root / "a.zip", {"a.png": zeros(LARGE)})


def member_of_bzip2(root):
    return write_zip(root / "a.zip", {"a.png": zeros(16 << 20)}, zipfile.ZIP_BZIP2)


def dataset_json(root):
    spaces = (b" " * (1 << 20) for _ in range(LARGE >> 20))
    return write_zip(root / "a.zip", {"a.png": [black_png(8)], "dataset.json": spaces})


def dataset_json_of_lists(root):
    parts = [b'{"labels": [', *[b"[]," * (1 << 18)] * 100, b"[]]}"]
    return write_zip(root / "a.zip", {"a.png": [black_png(8)], "dataset.json": parts})


def idx_gz(root):
    path = root / "train-images-idx3-ubyte.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(struct.pack(">4B3I", 0, 0, 8, 3, 600, 1024, 1024))
        for part in zeros(LARGE):
            stream.write(part)
    return path


def npz_of_zeros(root):
    parts = [npy_header((600, 1024, 1024, 1)), *zeros(LARGE)]
    return write_zip(root / "a.npz", {"images.npy": parts})


def npz_that_claims(root):
    part = npy_header((1 << 20, 1 << 10, 1 << 10, 3)) + bytes(64)
    return write_zip(root / "a.npz", {"images.npy": [part]})


def statistics_that_claim(root):
    mean = npy_header((1 << 40,), "<f8") + bytes(64)
    covariance = npy_header((1 << 20, 1 << 20), "<f8") + bytes(64)
    return write_zip(root / "a.npz", {"mu.npy": [mean], "sigma.npy": [covariance]})


def npy_that_claims(root):
    (root / "z.npy").write_bytes(npy_header((1 << 30, 8, 8, 1), "<f4") + bytes(64))
    return root / "z.npy"


def page_of_parquet(root):
    rows = ["y" * 900_000 + str(row) for row in range(200)]
    path = root / "a.parquet"
    parquet.write_table(pa.table({"caption": rows}), path, use_dictionary=False, compression="zstd")
    return path


OPEN = "open_images({path!r})"
# What writes the file, what is imported, what reads it, and a word of the refusal.
BOMBS = [
    (large_png, IMAGES, OPEN, "13,000 x 13,000 pixels"),
    (large_jpeg, IMAGES, OPEN, "13,000 x 13,000 pixels"),
    (large_tiff, IMAGES, OPEN, "13,000 x 13,000 pixels"),
    (large_bmp, IMAGES, OPEN, "13,000 x 13,000 pixels"),
    (sparse_png, IMAGES, OPEN, "has more than 67,108,864 bytes"),
    (text_chunk_png, IMAGES, OPEN, "cannot be read as PNG"),
    (nested_json, IMAGES, OPEN, "holds more lists and values than fit"),
    (member_png, IMAGES, OPEN, "a.png unpacks to more than"),
    (member_of_bzip2, IMAGES, OPEN, "compressed by method 12"),
    (dataset_json, IMAGES, OPEN, "dataset.json unpacks to more than"),
    (dataset_json_of_lists, IMAGES, OPEN, "holds more lists and values than fit"),
    (idx_gz, IMAGES, OPEN, "its arrays claim 629,145,600 bytes"),
    (npz_of_zeros, IMAGES, OPEN, "its arrays claim"),
    (npz_that_claims, IMAGES, OPEN, "its header claims uint8 of shape"),
    (npz_that_claims, STATES, "load_state_dict({path!r})", "its header claims"),
    (statistics_that_claim, STATISTICS, "load_statistics(Path({path!r}), (8, 8, 1), [])", "claims"),
    (npy_that_claims, LATENTS, "read_latents(Path({path!r}), (8, 8, 1), None)", "claims float32"),
    (page_of_parquet, PROMPTS, "list(PromptRows({path!r}))", "'caption' unpacks from"),
]


@pytest.mark.parametrize("write, imports, code, message", BOMBS)
def test_bombs_are_refused_by_name_in_little_memory_and_time(
    tmp_path, write, imports, code, message
):
    path = write(tmp_path)
    cost = cost_of(imports, code.format(path=str(path)))
    assert cost.message is not None and message in cost.message
    assert str(path) in cost.message
    assert cost.megabytes < 500 and cost.seconds < 2


def test_a_long_text_of_many_rows_is_held_once(tmp_path):
    """Sixteen texts of 900 kB in 1,500 rows are 1.3 GB, of which a batch at most is looked at."""
    texts = pa.array([str(row) + "x" * 900_000 for row in range(16)])
    indices = pa.array(np.arange(1500, dtype=np.int32) % 16)
    table = pa.table({"caption": pa.DictionaryArray.from_arrays(indices, texts)})
    parquet.write_table(table, tmp_path / "a.parquet")
    code = f"assert sum(1 for _ in PromptRows({str(tmp_path / 'a.parquet')!r})) == 1500"
    assert cost_of(PROMPTS, code).megabytes < 500


def test_the_largest_picture_is_read_in_little_memory(tmp_path):
    Image.new("RGB", (4096, 4096), (1, 2, 3)).save(tmp_path / "a.png")
    read = "from dmd_jax.data.image_files import decode_image"
    code = (
        f"pixels = decode_image(open({str(tmp_path / 'a.png')!r}, 'rb').read(), 'a')\n"
        "assert pixels.shape == (4096, 4096, 3) and (pixels == [1, 2, 3]).all()"
    )
    cost = cost_of(read, code)
    assert cost.message is None and cost.megabytes < 500


def no_regular_file(kind, path):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_weights_folder_with_something_else_than_files_does_not_hang(tmp_path, kind, name):
    from dmd_jax.errors import UserError
    from dmd_jax.storage.weights import load_weights, packaged

    for file in packaged("digits_teacher").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / name).unlink()
    no_regular_file(kind, tmp_path / name)
    found = []

    def load():
        try:
            load_weights(tmp_path)
        except UserError as error:
            found.append(str(error))

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(20)
    assert found and f"{name}: is no regular file but a pipe, socket or device" in found[0]
