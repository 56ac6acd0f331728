"""Small real inputs of every kind with their readers, and the limits of what reading may cost."""

import contextlib
import faulthandler
import gzip
import io
import struct
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet
from safetensors.numpy import save
from small_tokenizer import write_tokenizer

from dmd_jax.config.files import SCHEMA
from dmd_jax.convert.torch_file import load_state_dict
from dmd_jax.data.images import open_images
from dmd_jax.data.pair_shards import PairsMetadata, PairSource, write_pairs
from dmd_jax.data.prompt_rows import PromptRows
from dmd_jax.models import abstract_params
from dmd_jax.reporting.metrics import read_metrics
from dmd_jax.reporting.sample_files import read_latents
from dmd_jax.storage.checkpoints import Checkpoints
from dmd_jax.storage.seals import write_sealed
from dmd_jax.storage.untrusted import read_json, read_npz
from dmd_jax.storage.weights import Weights, load_weights, save_weights
from dmd_jax.teachers.tokenizer import load_tokenizer

IMAGE = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
HANG = 60  # seconds
NETWORK = {"name": "mlp", "dim": 2, "width": 4, "depth": 1}
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


def zipped(members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def tarred(members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def table(captions):
    stream = io.BytesIO()
    parquet.write_table(pa.table({"caption": captions}), stream)
    return stream.getvalue()


def files_of(write):
    """The files of a folder that `write` makes, by their paths in it."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def weights_files(folder):
    save_weights(folder, Weights(NETWORK, PARAMS, "a test"))


def workdir_files(folder):
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(4, {"ema": PARAMS}, {"batch": 1})
    checkpoints.close()
    config = {"schema": SCHEMA, "command": "train", "config": {"network": NETWORK}}
    write_sealed(folder / "config.json", config)
    (folder / "metrics.jsonl").write_text('{"step": 4, "loss": 0.5}\n{"step": 8, "loss": 0.25}\n')


def pairs_files(folder):
    metadata = PairsMetadata(
        teacher="a test",
        teacher_sha256="00" * 32,
        sampler="heun",
        num_steps=18,
        guidance=1.0,
        seed=1,
        count=2,
        shard_size=2,
        sample_shape=(2, 2, 1),
        num_classes=0,
    )
    images = np.zeros((2, 2, 2, 1), np.float32)
    batch = {"z_ref": images, "y_ref": images, "label": np.zeros(2, np.int32)}
    write_pairs(folder, metadata, lambda start, stop: batch)


def every_pair(path):
    pairs = PairSource(path.parent, sample_shape=(2, 2, 1), num_classes=0)
    return [pairs[index] for index in range(len(pairs))]


def folder_kinds(name, write, read, only):
    """A kind for each of these files of a folder, with the others beside it."""
    files = files_of(write)
    for file in only:
        content = next(files[path] for path in files if path.endswith(file))
        path = next(path for path in files if path.endswith(file))
        others = {f"{name}/{other}": files[other] for other in files if other != path}
        yield f"{name}/{path}", Kind(content, read, others)


class Kind(NamedTuple):
    content: bytes
    read: Callable  # path -> anything but None
    others: Mapping[str, bytes] = MappingProxyType({})  # the files beside it


PARAMS = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), abstract_params(NETWORK))
NPZ = arrays(np.savez, images=IMAGE[None], labels=np.zeros(1, int))
TOKENIZER = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")


def prompts(path):
    return list(PromptRows(path))


def latents(path):
    return read_latents(path, (4, 4, 1), None)


def in_a_folder_of(reader, up=0):
    return lambda path: reader(path.parents[up])


KINDS = {
    **{
        f"set/a.{form.lower()}": Kind(picture(form), in_a_folder_of(every_image))
        for form in ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
    },
    "set.zip": Kind(
        zipped({"0/a.png": picture("PNG"), "dataset.json": b'{"labels": [["0/a.png", 3]]}'}),
        every_image,
    ),
    "a.npz": Kind(NPZ, every_image),
    "state.npz": Kind(NPZ, load_state_dict),
    "statistics.npz": Kind(NPZ, lambda path: read_npz(path, "statistics")),
    "z.npy": Kind(arrays(np.save, np.zeros((2, 4, 4, 1), np.float32)), latents),
    "train-images-idx3-ubyte": Kind(IDX, every_image),
    "t10k-images-idx3-ubyte.gz": Kind(gzip.compress(IDX), every_image),
    "config.json": Kind(b'{"network": {"name": "mlp"}}', lambda path: read_json(path, "a config")),
    "a.safetensors": Kind(save({"w": np.ones(3, np.float32)}), load_state_dict),
    "a.jsonl": Kind(b'{"caption": "a cat"}\n', prompts),
    "a.txt": Kind(b"a cat\na dog\n", prompts),
    "a.tar": Kind(tarred({"0.jpg": b"\xff" * 600, "0.txt": b"a cat", "1.txt": b"a dog"}), prompts),
    "a.parquet": Kind(table(["a cat", "a dog"]), prompts),
    **dict(
        folder_kinds(
            "weights",
            weights_files,
            in_a_folder_of(load_weights),
            ("config.json", "model.safetensors"),
        )
    ),
    **dict(folder_kinds("tokenizer", write_tokenizer, in_a_folder_of(load_tokenizer), TOKENIZER)),
    **dict(folder_kinds("run", workdir_files, in_a_folder_of(load_weights), ("config.json",))),
    **dict(folder_kinds("run", workdir_files, in_a_folder_of(read_metrics), ("metrics.jsonl",))),
    **dict(
        folder_kinds(
            "run",
            workdir_files,
            in_a_folder_of(load_weights, up=3),
            ("4/state/_METADATA", "4/position/metadata"),
        )
    ),
    **dict(
        folder_kinds(
            "pairs", pairs_files, every_pair, ("metadata.json", "00000-of-00001.array_record")
        )
    ),
}


@contextlib.contextmanager
def within_limits(*, seconds=2.0, memory=1 << 30):
    """No more work and bytes than that beyond what the process had, and no hang."""
    faulthandler.dump_traceback_later(HANG, exit=True)
    try:
        before, start = most_memory(), time.process_time()
        yield
        assert time.process_time() - start < seconds
        assert most_memory(reset=False) - before < memory
    finally:
        faulthandler.cancel_dump_traceback_later()


def most_memory(*, reset=True):
    """The bytes that this process has held at most since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
