"""Small real inputs of every kind, each damaged in many ways: a UserError or a value, no more."""

import json
import os
import struct
import time

import numpy as np
import pyarrow as pa
import pytest
from hostile_inputs import IMAGE, KINDS, every_image, latents, table, within_limits
from safetensors import safe_open

from dmd_jax.convert.torch_file import load_state_dict
from dmd_jax.data.prompt_rows import PromptRows
from dmd_jax.errors import UserError
from dmd_jax.storage.seals import read_sealed
from dmd_jax.storage.strict import check_floating
from dmd_jax.storage.weights import load_weights

CHANGES = [f"cut {part}" for part in (1, 3, 5, 7)] + [f"bytes {seed}" for seed in range(8)]
CHANGES += ["magic", "empty", "pointer", "page", "link", "pipe", "nesting", "numbers", "zeros"]


def damaged(path, content, change):
    """Writes the content with the change at the path."""
    word, _, number = change.partition(" ")
    if word == "link":
        path.symlink_to("nowhere")
        return
    if word == "pipe":
        os.mkfifo(path)
        return
    changed = bytearray(content)
    if word == "cut":
        changed = changed[: len(changed) * int(number) // 8]
    elif word == "bytes":
        rng = np.random.default_rng(int(number))
        for place in rng.integers(0, len(changed), 3):
            changed[place] = rng.integers(256)
    elif word == "magic":
        changed[:8] = b"\xde\xad\xbe\xef\xff\xff\xff\xff"
    else:
        changed = {
            "empty": b"",
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "page": b"<!DOCTYPE html><html></html>",
            "nesting": b"[" * 100_000,
            "numbers": json.dumps({"caption": 10**400}).encode() + b"\n[NaN, 1e999]",
            "zeros": bytes(4096),
        }[word]
    path.write_bytes(changed)


def test_the_limits_are_noticed():
    # More than malloc ever takes from what has been freed, so that it is fresh memory.
    with pytest.raises(AssertionError), within_limits(memory=1 << 26):
        np.ones(1 << 27, np.uint8)
    with pytest.raises(AssertionError), within_limits(seconds=0.1):
        work(seconds=0.2)
    with within_limits(memory=1 << 28, seconds=0.5):
        np.ones(1 << 27, np.uint8)
        work(seconds=0.1)


def work(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def write(folder, name, kind):
    path = folder / name
    for file, content in ({name: kind.content} | dict(kind.others)).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    return path


@pytest.mark.parametrize("name", KINDS)
def test_the_whole_ones_are_read(tmp_path, name):
    assert KINDS[name].read(write(tmp_path, name, KINDS[name])) is not None


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", KINDS)
def test_damaged_inputs_are_read_or_refused(tmp_path, name, change):
    content, read, _ = KINDS[name]
    path = write(tmp_path, name, KINDS[name])
    path.unlink()
    damaged(path, content, change)
    refused = None
    with within_limits():
        try:
            read(path)
        except UserError as error:
            refused = str(error)
    assert refused is None or str(tmp_path) in refused
    assert refused or change.split()[0] not in ("pointer", "page", "link", "pipe")


def weights_of_others(path):
    state = load_state_dict(path)
    check_floating(state, str(path))
    return state


# Types of arrays: those that a file's reader takes, of all that NumPy can write.
TYPES = (
    *("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16"),
    *("uint64", "bool", "complex64", "datetime64[s]", "S3", "U3", "V4", "i4,f4", "object"),
)
READ = {
    "images": (every_image, ("float16", "float32", "float64", "uint8")),
    "labels": (every_image, tuple(kind for kind in TYPES if "int" in kind)),
    "z": (latents, ("float16", "float32", "float64")),
    "state": (weights_of_others, ("float16", "float32", "float64")),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", READ)
def test_arrays_of_other_types_are_refused(tmp_path, name, kind):
    read, taken = READ[name]
    array = np.zeros((1,) if name == "labels" else (2, 4, 4, 1), kind)
    if kind.startswith("float"):
        array -= 1  # no image of [0, 1], which is refused
    path = tmp_path / ("z.npy" if name == "z" else "a.npz")
    if name == "z":
        np.save(path, array)
    elif name == "labels":
        np.savez(path, images=IMAGE[None], labels=array)
    else:
        np.savez(path, images=array)
    if kind in taken:
        assert read(path) is not None
        return
    with within_limits(), pytest.raises(UserError) as error:
        read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", ["I32", "F64", "F16", "BF16", "U8", "BOOL", "I64", "F8_E4M3"])
def test_weights_of_other_types_are_refused(tmp_path, kind):
    """Those of float16 and bfloat16 are read."""
    names = [name for name in KINDS if name.startswith("weights/") and "safetensors" in name]
    path = write(tmp_path, names[0], KINDS[names[0]])
    size = {"I32": 4, "F64": 8, "F16": 2, "BF16": 2, "I64": 8}.get(kind, 1)
    header, end = {}, 0
    for leaf, shape in sorted(safetensors_shapes(path).items()):
        begin, end = end, end + size * int(np.prod(shape))
        header[leaf] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(end))
    config = path.with_name("config.json")
    content, _ = read_sealed(config, "a config")
    del content["params_sha256"]
    config.write_text(json.dumps(content))
    with within_limits():
        if kind in ("F16", "BF16"):
            assert load_weights(path.parent).params
        else:
            with pytest.raises(UserError, match=f"is {kind}; expected F32 or"):
                load_weights(path.parent)


def safetensors_shapes(path):
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    "captions",
    [
        pa.array([1, 2]),
        pa.array([0.5, None]),
        pa.array([["a"], []]),
        pa.array([{"a": "b"}]),
        pa.array([None, None]),
        pa.array([b"\xff\xfe", b"cat"]),
        pa.array(["cat", None]).dictionary_encode(),
        pa.array([True]),
    ],
    ids=str,
)
def test_captions_of_other_types_are_rows_that_are_named(tmp_path, captions):
    (tmp_path / "a.parquet").write_bytes(table(captions))
    with within_limits():
        try:
            rows = list(PromptRows(tmp_path / "a.parquet"))
        except UserError as error:
            assert str(tmp_path) in str(error)
        else:
            assert len(rows) == len(captions)
