"""Folders and zips of image files."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import unicodedata
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmd_jax.data.images import open_images
from dmd_jax.data.png import decode_png
from dmd_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def png(value, *, size=(4, 4), mode="L"):
    stream = io.BytesIO()
    Image.new(mode, size, value).save(stream, "PNG")
    return stream.getvalue()


def write_folder(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return str(root)


def write_zip(root, files):
    path = root.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data if isinstance(data, bytes) else json.dumps(data))
    return str(path)


@pytest.fixture(params=[write_folder, write_zip], ids=["folder", "zip"])
def write(request, tmp_path):
    """Writes {name: bytes, or an object for JSON} as a folder or as a zip; gives the source."""
    return lambda files: request.param(tmp_path / "set", files)


def labels_of(source):
    return [int(source[i]["label"]) for i in range(len(source))]


def first_pixels(source):
    return [source[i]["x0"][0, 0].tolist() for i in range(len(source))]


def test_classes_from_sorted_sub_folders(write):
    source = open_images(
        write(
            {
                "dog/b.png": png(255),
                "cat/z/a.PNG": png(0),
                "cat/c.png": png(51),
                "ant/a.png": png(102),
                "readme.txt": b"not an image",
                "dog/notes.json": b"{",
                "__MACOSX/dog/._b.png": b"resource fork",
                ".thumbs/a.png": b"hidden",
            }
        ),
        resolution=4,
    )
    assert (len(source), source.sample_shape, source.num_classes) == (4, (4, 4, 1), 3)
    assert labels_of(source) == [0, 1, 1, 2]
    # 102, 51, 0, 255 over 127.5, less 1
    np.testing.assert_allclose(first_pixels(source), [[-0.2], [-0.6], [-1], [1]], atol=1e-7)
    assert source[0]["x0"].dtype == np.float32 and source[0]["label"].dtype == np.int32


@pytest.mark.parametrize("prefix", ["", "all/of/them/"])
def test_all_in_one_folder_has_no_labels(write, prefix):
    source = open_images(write({f"{prefix}{i}.png": png(i) for i in range(3)}))
    assert source.num_classes == 0 and labels_of(source) == [0, 0, 0]


def test_a_common_folder_names_no_class(write):
    source = open_images(write({"set/b/1.png": png(1), "set/a/2.png": png(2)}))
    assert labels_of(source) == [0, 1] and source.num_classes == 2


def test_folders_that_are_numbers_are_their_own_labels(write):
    names = [0, 1, 2, 9, 10, 11, 100]
    source = write({f"{name}/a.png": png(name) for name in names})
    images = open_images(str(source))
    found = {round((float(e["x0"].max()) + 1) * 127.5): int(e["label"]) for e in images}
    assert found == {name: name for name in names}
    assert images.num_classes == 101


def test_folders_of_one_number_are_refused(write):
    source = write({"1/a.png": png(0), "01/a.png": png(0), "2/a.png": png(0)})
    with pytest.raises(UserError, match="two folders of classes have the same number"):
        open_images(str(source))


def test_what_is_passed_over_is_counted(write, capsys):
    source = write({"a.png": png(0), "b.gif": b"x", "c.GIF": b"x", "d": b"x"})
    assert len(open_images(str(source))) == 1
    said = capsys.readouterr().err
    assert "1 image files are read; passed over: " in said
    assert "2 of .gif" in said and "1 of no suffix" in said


def test_names_of_dataset_json_may_be_composed_otherwise(write):
    name = unicodedata.normalize("NFD", "é.png")
    listing = {"labels": [[unicodedata.normalize("NFC", "é.png"), 4]]}
    source = open_images(str(write({name: png(0), "dataset.json": json.dumps(listing).encode()})))
    assert [int(example["label"]) for example in source] == [4]


@pytest.mark.parametrize(
    "kind, head", [(b"zTXt", b"workflow\0\0"), (b"iCCP", b"profile\0\0"), (b"tEXt", b"a\0")]
)
def test_large_texts_and_profiles_are_no_reason_to_refuse(kind, head):
    stream, pixels = io.BytesIO(), np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(pixels).save(stream, "PNG")
    data = stream.getvalue()
    text = b"a" * (2 << 20)
    body = kind + head + (text if kind == b"tEXt" else zlib.compress(text))
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    np.testing.assert_array_equal(decode_png(data[:33] + chunk + data[33:], "a"), pixels)


def test_edm_dataset_json(write):
    files = {f"0000{i % 2}/img{i}.png": png((i, 0, 255), mode="RGB") for i in range(4)}
    labels = {"labels": [[name, 6 - i] for i, name in enumerate(files)]}
    source = open_images(write(files | {"dataset.json": labels}))
    assert source.sample_shape == (4, 4, 3) and source.num_classes == 7
    # Sorted by name: images 0, 2, 1, 3.
    assert labels_of(source) == [6, 4, 5, 3]
    np.testing.assert_allclose(source[1]["x0"][3, 3], [2 / 127.5 - 1, -1, 1], atol=1e-7)

    unlabelled = open_images(write(files | {"dataset.json": {"labels": None}}))
    assert unlabelled.num_classes == 0 and labels_of(unlabelled) == [0] * 4


def test_one_bit_and_palette_images_keep_their_pixels(tmp_path):
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4) % 3
    palette = Image.fromarray(pixels).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.save(tmp_path / "a.png")
    x0 = open_images(str(tmp_path))[0]["x0"]
    table = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]])
    np.testing.assert_allclose(x0, table[pixels] / 127.5 - 1, atol=1e-7)

    Image.fromarray(pixels * 127).convert("1", dither=0).save(tmp_path / "a.png")
    x0 = open_images(str(tmp_path))[0]["x0"]
    assert x0.shape == (4, 4, 1) and set(np.unique(x0)) == {-1, 1}


def test_every_image_is_read_by_threads_and_pickles(write):
    source = open_images(write({f"{i:03d}.png": png(i) for i in range(200)}))
    expected = [[pytest.approx(i / 127.5 - 1, abs=1e-6)] for i in range(200)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda i: source[i]["x0"][0, 0].tolist(), range(200))) == expected
    assert first_pixels(pickle.loads(pickle.dumps(source))) == expected


# Both children and the parent read through what was one file handle before the fork.
FORK = """
import os, sys
from dmd_jax.data.images import open_images

source = open_images(sys.argv[1])
children = [os.fork()]
if children[-1]:
    children.append(os.fork())
ok = all(round(127.5 * (source[i]["x0"][0, 0, 0] + 1)) == i for _ in range(5) for i in range(200))
if not all(children):
    os._exit(0 if ok else 1)
ok &= all(os.waitpid(child, 0)[1] == 0 for child in children)
sys.exit(0 if ok else 1)
"""


def test_forks_of_an_open_zip_do_not_disturb_each_other(tmp_path):
    path = write_zip(tmp_path / "set", {f"{i:03d}.png": png(i) for i in range(200)})
    subprocess.run([sys.executable, "-c", FORK, path], cwd=ROOT, check=True, timeout=60)


GOOD = {"a.png": png(1), "b.png": png(2)}


@pytest.mark.parametrize(
    "files, message",
    [
        ({"readme.txt": b""}, "holds no image file"),
        (GOOD | {"c.png": png(1)[:40]}, "c.png: cannot be read as PNG"),
        (GOOD | {"c.png": b""}, "c.png: is empty; expected "),
        (GOOD | {"c.png": png(1, size=(5, 5))}, r"c.png has shape \(5, 5, 1\), expected \(4, 4, 1"),
        (GOOD | {"c.png": png((1, 2, 3), mode="RGB")}, r"c.png has shape \(4, 4, 3\)"),
        ({"a.png": png(1, size=(4, 3))}, "3x4x1, expected square"),
        ({"a.png": png((1, 2, 3, 4), mode="RGBA")}, "a.png: a PNG of mode RGBA, expected 8-bit"),
        ({"a.png": png(1, mode="I;16")}, "a.png: a PNG of 16 bits a sample"),
        (GOOD | {"x/c.png": png(1)}, "a.png lies beside the sub-folders"),
        (GOOD | {"dataset.json": b"{"}, "dataset.json cannot be read as JSON"),
        (GOOD | {"dataset.json": b"\xff\xfe"}, "dataset.json cannot be read as JSON"),
        (GOOD | {"dataset.json": b"[" * 200_000}, "dataset.json cannot be read as JSON"),
        (GOOD | {"dataset.json": {}}, 'no key "labels"'),
        (GOOD | {"dataset.json": []}, 'no key "labels"'),
        (GOOD | {"dataset.json": {"labels": 3}}, '"labels" is no list'),
        (GOOD | {"dataset.json": {"labels": [["a.png", 0]]}}, "gives no label for b.png"),
        (GOOD | {"dataset.json": {"labels": [["c.png", 0]]}}, "names c.png, which is not there"),
        (GOOD | {"dataset.json": {"labels": [["a.png", 0.5]]}}, r"holds \['a.png', 0.5\]"),
        (GOOD | {"dataset.json": {"labels": [["a.png", True]]}}, "holds .*True"),
        (GOOD | {"dataset.json": {"labels": [["a.png"]]}}, r"expected \[name, whole number\]"),
        (GOOD | {"dataset.json": {"labels": [["a.png", 0], ["a.png", 1]]}}, "a.png two labels"),
        (GOOD | {"dataset.json": {"labels": [["a.png", -1], ["b.png", 0]]}}, "label -1 found"),
        (GOOD | {"dataset.json": {"labels": [["a.png", 10**9], ["b.png", 0]]}}, "label 1000000000"),
        (GOOD | {"dataset.json": {"labels": [["a.png", 10**30], ["b.png", 0]]}}, "labels are obj"),
        (GOOD | {"dataset.json": {"labels": [["../../a.png", 0]]}}, r"'../../a.png' leads out"),
        (GOOD | {"dataset.json": {"labels": [["/etc/a.png", 0]]}}, "'/etc/a.png' leads out"),
        ({"in/a.png": png(1), "in/dataset.json": {"labels": None}}, "in/dataset.json was found"),
    ],
)
def test_bad_sets(write, files, message):
    source = write(files)
    with pytest.raises(UserError, match=message) as caught:
        open_images(source)
    assert source in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../evil.png", "a/../../evil.sh", "/etc/evil.png", "C:\\evil.png"]
)
def test_zip_names_that_leave_it(tmp_path, name):
    path = write_zip(tmp_path / "set", GOOD | {name: png(1)})
    with pytest.raises(UserError, match="set.zip: the name .*evil.* leads out of it"):
        open_images(path)


def test_links_that_leave_the_folder(tmp_path):
    outside = tmp_path / "outside"
    write_folder(outside, {"secret.png": png(9)})
    for name, target in [("c.png", outside / "secret.png"), ("sub", outside)]:
        root = tmp_path / f"with-{name}"
        write_folder(root, GOOD)
        os.symlink(target, root / name)
        with pytest.raises(UserError, match=f"the link {name} leads out of the folder, to .*outsi"):
            open_images(str(root))


def test_links_inside_the_folder(tmp_path):
    root = tmp_path / "set"
    write_folder(root, {"x/a.png": png(51), "y/b.png": png(102)})
    os.symlink(root, root / "y" / "loop")
    os.symlink("../x/a.png", root / "y" / "c.png")
    source = open_images(str(root))
    assert labels_of(source) == [0, 1, 1]
    np.testing.assert_allclose(first_pixels(source), [[-0.6], [-0.2], [-0.6]], atol=1e-7)

    os.unlink(root / "x" / "a.png")
    with pytest.raises(UserError, match="y/c.png: is a link to .../x/a.png., which is not there"):
        open_images(str(root))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    write_folder(tmp_path, GOOD)
    os.mkfifo(tmp_path / "c.png")
    with pytest.raises(UserError, match="c.png: is no regular file but a pipe"):
        open_images(str(tmp_path))


def test_damaged_zip_is_a_user_error_wherever_it_is_cut_or_changed(tmp_path):
    rng = np.random.default_rng(0)
    noise = {f"{i}.png": None for i in range(3)}
    for name in noise:
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(stream, "PNG")
        noise[name] = stream.getvalue()
    whole = open(write_zip(tmp_path / "set", noise), "rb").read()
    cut = tmp_path / "cut.zip"
    for length in rng.integers(0, len(whole), 60):
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut.zip"):
            open_images(str(cut))
    outcomes = set()
    for position in rng.integers(0, len(whole), 200):
        changed = bytearray(whole)
        changed[position] ^= 1 << rng.integers(8)
        cut.write_bytes(changed)
        try:
            source = open_images(str(cut))
            outcomes.add(len(source))
        except UserError:
            outcomes.add("refused")
    assert "refused" in outcomes


def test_damaged_png_is_a_user_error_or_an_image(tmp_path):
    whole = png(7, size=(8, 8))
    rng = np.random.default_rng(1)
    for position in rng.integers(0, len(whole), 200):
        changed = bytearray(whole)
        changed[position] = rng.integers(256)
        (tmp_path / "a.png").write_bytes(changed)
        try:
            assert open_images(str(tmp_path))[0]["x0"].ndim == 3
        except UserError as error:
            assert "a.png" in str(error) or "square" in str(error)
