"""idx files, plain and compressed."""

import gzip
import struct

import numpy as np
import pytest

from dmd_jax.data.images import open_images
from dmd_jax.errors import UserError


def idx_bytes(array):
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(path, array):
    data = idx_bytes(np.asarray(array, np.uint8))
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


IMAGES = np.arange(3 * 16, dtype=np.uint8).reshape(3, 4, 4) * 5


@pytest.fixture(params=["", ".gz"])
def folder(request, tmp_path):
    write_idx(tmp_path / f"train-images-idx3-ubyte{request.param}", IMAGES)
    write_idx(tmp_path / f"train-labels-idx1-ubyte{request.param}", [7, 0, 9])
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{request.param}", IMAGES[:2] + 1)
    write_idx(tmp_path / f"t10k-labels-idx1-ubyte{request.param}", [9, 1])
    return tmp_path


def test_a_folder_gives_train_and_test(folder):
    train = open_images(str(folder), resolution=4)
    assert (len(train), train.sample_shape, train.num_classes) == (3, (4, 4, 1), 10)
    np.testing.assert_allclose(train[2]["x0"][..., 0], IMAGES[2] / 127.5 - 1, atol=1e-7)
    assert [train[i]["label"] for i in range(3)] == [7, 0, 9]
    test = open_images(f"{folder}#test")
    assert len(test) == 2 and test[1]["label"] == 1
    np.testing.assert_allclose(test[0]["x0"][0, 0], 1 / 127.5 - 1, atol=1e-7)
    assert len(open_images(f"{folder}#train")) == 3


def test_a_file_by_its_name(folder):
    (path,) = folder.glob("t10k-images*")
    assert len(open_images(str(path))) == 2


def test_no_label_file_means_no_labels(tmp_path):
    path = write_idx(tmp_path / "emnist-train-images.idx3-ubyte", IMAGES)
    assert open_images(str(path)).num_classes == 0
    write_idx(tmp_path / "emnist-train-labels.idx1-ubyte.gz", [1, 2, 3])
    assert open_images(str(path)).num_classes == 4


def test_a_label_for_every_image(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte", IMAGES)
    write_idx(tmp_path / "train-labels-idx1-ubyte", [1, 2])
    with pytest.raises(UserError, match=r"labels are uint8 of shape \(2,\).*\(3,\)"):
        open_images(str(tmp_path))


def test_the_split_must_be_there(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte", IMAGES)
    with pytest.raises(UserError, match="#test is for a folder that holds"):
        open_images(f"{tmp_path}#test")


@pytest.mark.parametrize(
    "data, message",
    [
        (idx_bytes(IMAGES[0]), "no idx file of unsigned bytes with 3 dimensions.*00 00 08 02"),
        (struct.pack(">4B3I", 0, 0, 13, 3, 1, 1, 1) + b"1234", "no idx file of unsigned bytes"),
        (idx_bytes(IMAGES) + b"\0", "holds more bytes of values, its header says 48"),
        (struct.pack(">4B3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1), "its arrays claim"),
        (idx_bytes(IMAGES[:0]), r"images of shape \(0, 4, 4, 1\)"),
        (idx_bytes(IMAGES[:, :2]), "2x4x1, expected square"),
    ],
)
def test_bad_headers(tmp_path, data, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"train-images-idx3-ubyte.*{message}"):
        open_images(str(path))


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"])
def test_cut_and_changed_files_are_user_errors(tmp_path, name):
    path = write_idx(tmp_path / name, IMAGES)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=name):
            open_images(str(path))
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(whole), 200):
        changed = bytearray(whole)
        changed[position] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        try:
            assert open_images(str(path)).sample_shape[2] == 1
        except UserError as error:
            assert name in str(error)
