"""Files of few bytes that claim to be large arrays are refused before any is made."""

from __future__ import annotations

import numpy as np
import pytest
import torch_bytes

from dmd_jax.convert.torch_file import load_state_dict
from dmd_jax.errors import UserError

BASE = np.arange(24, dtype=np.float32)


def test_many_views_of_one_storage(tmp_path):
    """Each would be a copy. Weights that are tied have two names or three; four are allowed."""
    turned = torch_bytes.Tensor(BASE, 0, (6, 4), (1, 6))
    for writer in (torch_bytes.legacy_file, torch_bytes.zip_file):
        path = tmp_path / "x.pth"
        path.write_bytes(writer({str(each): turned for each in range(4)}))
        assert load_state_dict(path).keys() == {"0", "1", "2", "3"}
        path.write_bytes(writer({str(each): turned for each in range(5)}))
        with pytest.raises(UserError, match="tensors of 480 bytes in storages of 96"):
            load_state_dict(path)


def test_repeated_elements_within_a_storage(tmp_path):
    (tmp_path / "x.pth").write_bytes(
        torch_bytes.zip_file({"x": torch_bytes.Tensor(BASE, 2, (3, 2), (0, 1))})
    )
    np.testing.assert_array_equal(load_state_dict(tmp_path / "x.pth")["x"], [[2, 3]] * 3)


def test_an_npz_that_unpacks_to_too_much(tmp_path):
    path = tmp_path / "zeros.npz"
    np.savez_compressed(path, x=np.zeros(20 * 10**6, np.float32))
    size = path.stat().st_size
    with pytest.raises(UserError) as error:
        load_state_dict(path)
    assert str(error.value) == (
        f"{path}: its arrays claim 80,000,128 bytes and the file has {size:,}; expected at most "
        "67,108,864"
    )
    weights = np.random.default_rng(0).standard_normal(1000, np.float32)
    np.savez_compressed(path, x=weights, y=np.zeros(10**4))
    assert load_state_dict(path).keys() == {"x", "y"}
