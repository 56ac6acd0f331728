"""Files written array by array are those that safetensors itself reads, and would write."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dmd_jax.errors import UserError
from dmd_jax.storage.safetensors_stream import write_safetensors

TYPES = [
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8"),
    *("uint64", "uint32", "uint16", "uint8", "bool"),
]


def test_every_type_and_shape_is_read_back(tmp_path):
    arrays = {name: np.array([[0, 1], [3, 1]]).astype(jnp.dtype(name)) for name in TYPES}
    arrays |= {"scalar": np.array(2.5, np.float32), "none": np.zeros((0, 3), np.float16)}
    arrays |= {"turned": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    arrays |= {"big": np.arange(3, dtype=">i4"), "name / é": np.ones(1, np.uint8)}
    write_safetensors(tmp_path / "a", arrays, arrays.__getitem__, metadata={"format": "pt"})
    found = load_file(tmp_path / "a")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].dtype.name, found[name].shape) == (array.dtype.name, array.shape)
        np.testing.assert_array_equal(found[name], array)
    with safe_open(tmp_path / "a", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_bytes_are_those_of_safetensors_itself(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((3, 5), np.float32) for name in ("b/a", "a", "b", "c")}
    write_safetensors(tmp_path / "ours", arrays, arrays.__getitem__)
    save_file(arrays, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_each_array_is_asked_for_once_and_in_order(tmp_path):
    layout = {name: jax.ShapeDtypeStruct((2,), np.float32) for name in ("b", "a", "c")}
    asked = []

    def array_of(name):
        asked.append(name)
        return np.full(2, ord(name), np.float32)

    write_safetensors(tmp_path / "a", layout, array_of)
    assert asked == ["a", "b", "c"]
    assert load_file(tmp_path / "a")["c"].tolist() == [99, 99]


def test_what_does_not_fit_leaves_no_file(tmp_path):
    layout = {"a": jax.ShapeDtypeStruct((2,), np.float32)}
    for array in (np.ones(3, np.float32), np.ones(2, np.float64)):
        with pytest.raises(ValueError, match="a is float.* was announced"):
            write_safetensors(tmp_path / "a", layout, lambda _, array=array: array)
    with pytest.raises(UserError, match="a has type complex64; expected one of float64, float32"):
        write_safetensors(tmp_path / "a", {"a": np.ones(2, np.complex64)}, dict().get)
    assert list(tmp_path.iterdir()) == []
