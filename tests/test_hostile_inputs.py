"""Small real inputs of every kind, each damaged in many ways: a UserError or a value, no more."""

import gzip
import io
import json
import os
import resource
import struct

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

from dmd_jax.convert.torch_file import load_state_dict
from dmd_jax.data.images import open_images
from dmd_jax.data.prompt_rows import PromptRows
from dmd_jax.errors import UserError
from dmd_jax.sample_files import read_latents
from dmd_jax.untrusted import read_json, read_npz

IMAGE = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
IDX = struct.pack(">4B3I", 0, 0, 8, 3, 2, 4, 4) + bytes(32)


def picture(form):
    stream = io.BytesIO()
    Image.fromarray(IMAGE).save(stream, form)
    return stream.getvalue()


def arrays(write, *positional, **named):
    stream = io.BytesIO()
    write(stream, *positional, **named)
    return stream.getvalue()


def every_image(path):
    images = open_images(str(path))
    return [images[index] for index in range(len(images))]


NPZ = arrays(np.savez, images=IMAGE[None], labels=np.zeros(1, int))
# name of the file -> (its content, its reader)
KINDS = {
    **{
        f"set/a.{form.lower()}": (picture(form), lambda path: every_image(path.parent))
        for form in ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
    },
    "a.npz": (NPZ, every_image),
    "state.npz": (NPZ, load_state_dict),
    "statistics.npz": (NPZ, lambda path: read_npz(path, "statistics")),
    "z.npy": (
        arrays(np.save, np.zeros((2, 4, 4, 1), np.float32)),
        lambda path: read_latents(path, (4, 4, 1), None),
    ),
    "train-images-idx3-ubyte": (IDX, every_image),
    "t10k-images-idx3-ubyte.gz": (gzip.compress(IDX), every_image),
    "config.json": (b'{"network": {"name": "mlp"}}', lambda path: read_json(path, "a config")),
    "a.safetensors": (save({"w": np.ones(3, np.float32)}), load_state_dict),
    "a.jsonl": (b'{"caption": "a cat"}\n', lambda path: list(PromptRows(path))),
    "a.txt": (b"a cat\na dog\n", lambda path: list(PromptRows(path))),
}
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


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", KINDS)
def test_damaged_inputs_are_read_or_refused(tmp_path, name, change):
    content, read = KINDS[name]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    assert read(path) is not None  # the reader takes the real one
    path.unlink()
    damaged(path, content, change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read(path)
    except UserError as error:
        assert str(tmp_path) in str(error)
    assert change.split()[0] not in ("pointer", "page", "link", "pipe") or refuses(read, path)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert kilobytes < 1 << 20


def refuses(read, path):
    with pytest.raises(UserError):
        read(path)
    return True
