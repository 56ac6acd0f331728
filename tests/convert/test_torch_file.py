"""State dicts come out of PyTorch's files to the bit, and damage is one clear error."""

from __future__ import annotations

import io
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import torch_bytes
from safetensors.numpy import save_file

from dmd_jax.convert.torch_file import load_state_dict
from dmd_jax.errors import UserError

BASE = np.arange(24, dtype=np.float32)
TENSORS = {
    "conv.weight": torch_bytes.tensor(BASE.reshape(2, 3, 4)),
    "transposed": torch_bytes.Tensor(BASE, 3, (4, 2), (1, 4)),
    "scalar": torch_bytes.tensor(np.array(3.5, np.float16)),
    "empty": torch_bytes.tensor(np.zeros((0, 3), np.float32)),
    **{
        name: torch_bytes.tensor(np.array([0, 1, 3]).astype(jnp.dtype(name)))
        for name in torch_bytes.STORAGES
    },
}
WRITERS = {"legacy": torch_bytes.legacy_file, "zip": torch_bytes.zip_file}


def expected_arrays():
    arrays = {
        name: value.flat.reshape(value.size) for name, value in TENSORS.items() if name[0] != "t"
    }
    return arrays | {"transposed": BASE[[[3, 7], [4, 8], [5, 9], [6, 10]]]}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name
        assert found[name].flags.c_contiguous


@pytest.mark.parametrize("form", WRITERS)
def test_every_type_shape_and_stride(tmp_path, form):
    (tmp_path / "weights.pth").write_bytes(WRITERS[form](TENSORS))
    assert_equal(load_state_dict(tmp_path / "weights.pth"), expected_arrays())


def test_npz_and_safetensors(tmp_path):
    arrays = {"a.b": BASE.reshape(4, 6), "half": np.array([1, 2], np.float16)}
    arrays |= {"scalar": np.array(7)}
    np.savez(tmp_path / "weights.npz", **arrays)
    save_file(arrays, tmp_path / "weights.safetensors")
    for name in ("weights.npz", "weights.safetensors"):
        assert_equal(load_state_dict(tmp_path / name), arrays)


@pytest.mark.torch
def test_what_torch_itself_saves(tmp_path):
    import torch

    base = torch.arange(24, dtype=torch.float32)
    tensors = {"view": base.reshape(4, 6)[1:, ::2].t(), "base": base, "half": base[:3].half()}
    tensors |= {"brain": base.to(torch.bfloat16), "yes": base > 2, "one": torch.tensor(7)}
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    for state in (tensors, module.state_dict()):
        for is_zip in (False, True):
            path = tmp_path / "weights.pth"
            torch.save(state, path, _use_new_zipfile_serialization=is_zip)
            found = load_state_dict(path)
            assert list(found) == list(state)
            for name, value in state.items():
                wanted = value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
                np.testing.assert_array_equal(found[name].astype(wanted.dtype), wanted)
                assert found[name].dtype.name == str(value.dtype).removeprefix("torch.")


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_torch_reads_what_the_tests_write():
    import torch

    for writer in WRITERS.values():
        found = torch.load(io.BytesIO(writer(TENSORS)), weights_only=True)
        for name, array in expected_arrays().items():
            np.testing.assert_array_equal(found[name].float().numpy(), array.astype(np.float32))
    storage = torch.storage._load_from_bytes(torch_bytes.legacy_storage(BASE))
    np.testing.assert_array_equal(np.array(storage.tolist()), BASE)


@pytest.mark.parametrize("form", WRITERS)
def test_cut_short_anywhere(tmp_path, form):
    content = WRITERS[form](TENSORS)
    path = tmp_path / "weights.pth"
    for cut in (*range(0, 300, 7), *range(300, len(content), 97), len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(UserError) as error:
            load_state_dict(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("form", WRITERS)
def test_random_damage_is_never_another_exception(tmp_path, form):
    rng = np.random.default_rng(1)
    content = np.frombuffer(WRITERS[form](TENSORS), np.uint8)
    path = tmp_path / "weights.pth"
    for _ in range(150):
        damaged = content.copy()
        damaged[rng.integers(len(content), size=3)] = rng.integers(256, size=3)
        path.write_bytes(damaged.tobytes())
        try:
            load_state_dict(path)
        except UserError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize(
    "offset, size, stride, message",
    [
        (0, (25,), (1,), "beyond its storage of 24 elements"),
        (20, (5,), (1,), "beyond its storage"),
        (0, (2, 2), (24, 1), "beyond its storage"),
        (0, (2**40,), (0,), "beyond its storage"),
        (0, (4, 4, 2), (0, 0, 1), "beyond its storage"),
        (-1, (2,), (1,), "negative size, stride or offset"),
        (0, (-2,), (1,), "negative size"),
        (5, (2,), (-1,), "negative size"),
        (2**63, (2,), (1,), "beyond 63 bits"),
        (0, (2, 2), (1,), "size and stride do not fit"),
        (0, (1,) * 65, (1,) * 65, "65 dimensions"),
        (0, (0, 2**62), (1, 1), "a size that no array has"),
    ],
)
def test_views_outside_their_storage(tmp_path, offset, size, stride, message):
    view = torch_bytes.Tensor(BASE, offset, size, stride)
    for name, writer in WRITERS.items():
        (tmp_path / name).write_bytes(writer({"x": view}))
        with pytest.raises(UserError, match=message):
            load_state_dict(tmp_path / name)


def without_end():
    """A list of lists of one list: to write it out takes for ever."""
    found = ["0"]
    for _ in range(60):
        found = [found, found]
    return found


def legacy(*parts, count=24, content=None):
    """The pickles one after another, then one storage that says it has `count` elements."""
    content = BASE.tobytes() if content is None else content
    pickles = b"".join(torch_bytes.dumps(part, 2) for part in parts)
    return pickles + count.to_bytes(8, "little", signed=True) + content


MACHINE = {"protocol_version": 1001, "little_endian": True}


def identity(flat=BASE, **changes):
    fields = dict(tag="storage", kind=torch_bytes.Global("torch", "FloatStorage"), key="0")
    fields |= dict(device="cpu", count=len(flat)) | changes
    state = torch_bytes.PersistentId((*fields.values(), None))
    return {"x": torch_bytes.rebuilt(torch_bytes.tensor(flat), state)}


@pytest.mark.parametrize(
    "content, message",
    [
        (legacy(17), "not a file of PyTorch's"),
        (legacy(torch_bytes.MAGIC, 1002), "format version 1002; expected 1001"),
        (legacy(torch_bytes.MAGIC, without_end()), "format version a list; expected 1001"),
        (
            legacy(torch_bytes.MAGIC, 1001, MACHINE, identity(), without_end()),
            "not those that its tensors",
        ),
        (legacy(torch_bytes.MAGIC, 1001, {"little_endian": False}), "big-endian"),
        (legacy(torch_bytes.MAGIC, 1001, MACHINE, identity(), []), "not those that its tensors"),
        (legacy(torch_bytes.MAGIC, 1001, MACHINE, identity(), ["0"], count=23), "has 23 elements"),
        (
            legacy(torch_bytes.MAGIC, 1001, MACHINE, identity(), ["0"], content=b"abc"),
            "storage 0 is cut short: 96 bytes expected, 3 left",
        ),
        (
            legacy(torch_bytes.MAGIC, 1001, MACHINE, identity(count=2**60), ["0"], count=2**60),
            "4,611,686,018,427,387,904 bytes expected, 96 left",
        ),
        (
            legacy(torch_bytes.MAGIC, 1001, MACHINE, identity(count=-24), ["0"], count=-24),
            "a storage of a negative size",
        ),
        (
            legacy(torch_bytes.MAGIC, 1001, MACHINE, identity(tag="module"), ["0"]),
            "a persistent id that is no storage's",
        ),
        (
            legacy(torch_bytes.MAGIC, 1001, MACHINE, identity(kind="os.system"), ["0"]),
            "a persistent id that is no storage's",
        ),
        (
            legacy(torch_bytes.MAGIC, 1001, MACHINE, {"x": 3}, []),
            "holds 3 as x; expected a dict",
        ),
        (legacy(torch_bytes.MAGIC, 1001, MACHINE, [], []), "holds a list; expected a dictionary"),
        (
            legacy(torch_bytes.MAGIC, 1001, MACHINE, torch_bytes.Global("os", "system"), []),
            "asks for os.system",
        ),
        (b"hello", "not a whole pickle"),
        (b"PK\x03\x04 hello", "damaged"),
    ],
)
def test_files_that_are_none(tmp_path, content, message):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_state_dict(path)
    assert str(path) in str(error.value) and message in str(error.value)


def rewritten(content, change):
    """The zip with one member changed, or left out where `change` gives None."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            member = change(name, old.read(name))
            if member is not None:
                new.writestr(name, member)
    return out.getvalue()


def test_zips_that_do_not_hold_together(tmp_path):
    content = torch_bytes.zip_file({"x": torch_bytes.tensor(BASE)})

    def without(end):
        return rewritten(content, lambda name, data: None if name.endswith(end) else data)

    def with_(end, other):
        return rewritten(content, lambda name, data: other if name.endswith(end) else data)

    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * 10**6)
    for damaged, message in (
        (without("data.pkl"), "a zip without a data.pkl"),
        (without("data/0"), "storage 0 of 96 bytes is expected; found none"),
        (with_("data/0", b"1234"), "storage 0 of 96 bytes is expected; found one of 4 bytes"),
        (with_("byteorder", b"big"), "big-endian"),
        (bomb.getvalue(), "its parts claim more bytes than it has"),
        (content.replace(BASE.tobytes(), BASE[::-1].tobytes()), "Bad CRC-32"),
    ):
        (tmp_path / "x.pt").write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            load_state_dict(tmp_path / "x.pt")


def test_names_that_would_deface_a_message(tmp_path):
    for name in ("a\nb", "\x1b[2J", "x" * 200):
        np.savez(tmp_path / "a.npz", **{name: BASE})
        (tmp_path / "a.pth").write_bytes(torch_bytes.zip_file({name: torch_bytes.tensor(BASE)}))
        for path in (tmp_path / "a.npz", tmp_path / "a.pth"):
            with pytest.raises(UserError, match="expected a plain name") as error:
                load_state_dict(path)
            assert str(error.value).isprintable()


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_state_dict(tmp_path / "no.pth")
    with pytest.raises(UserError, match="is a folder"):
        load_state_dict(tmp_path)
    for name in ("a.npz", "a.safetensors"):
        (tmp_path / name).write_bytes(b"\x10\0\0\0\0\0\0\0 no header")
        with pytest.raises(UserError, match=rf"{name}"):
            load_state_dict(tmp_path / name)
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="objects.npz: x.npy: holds Python objects"):
        load_state_dict(tmp_path / "objects.npz")
