"""digits, .npz, tfds, and what every kind of source has in common."""

import io
import json
import pickle
import sys

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from dmd_jax.data.images import open_images
from dmd_jax.errors import UserError


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def test_digits_are_scikit_learns_eighths_to_the_bit():
    source = open_images("digits", resolution=8)
    assert len(source) == 1797
    assert source.sample_shape == (8, 8, 1)
    assert source.num_classes == 10
    first = source[0]
    assert first["x0"].dtype == np.float32 and first["label"].dtype == np.int32
    # The first digit is a zero; its top row is 0 0 5 13 9 1 0 0 sixteenths in the UCI file.
    row = [-1, -1, -0.375, 0.625, 0.125, -0.875, -1, -1]
    assert first["x0"][0, :, 0].tolist() == row
    assert first["label"] == 0
    counts = np.bincount([source[i]["label"] for i in range(len(source))])
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    with pytest.raises(IndexError):
        source[1797]


def test_npz_of_bytes(tmp_path):
    images = np.zeros((3, 2, 2, 3), np.uint8)
    images[1] = 255
    images[2, 0, 1, 2] = 51
    path = write_npz(tmp_path / "a.npz", images=images, labels=np.array([0, 4, 2], np.uint8))
    source = open_images(path)
    assert (len(source), source.sample_shape, source.num_classes) == (3, (2, 2, 3), 5)
    assert (source[0]["x0"] == -1).all() and (source[1]["x0"] == 1).all()
    assert source[2]["x0"][0, 1, 2] == pytest.approx(-0.6, abs=1e-7)  # 51 / 127.5 - 1
    assert [source[i]["label"] for i in range(3)] == [0, 4, 2]
    assert pickle.loads(pickle.dumps(source))[1]["label"] == 4


def test_npz_of_floats_under_any_name_without_labels(tmp_path):
    images = np.linspace(-1, 1, 8).reshape(2, 2, 2, 1)
    source = open_images(write_npz(tmp_path / "a.npz", data=images, other=np.zeros(3)))
    assert source.num_classes == 0
    assert source[1]["x0"].dtype == np.float32
    np.testing.assert_array_equal(source[1]["x0"], images[1].astype(np.float32))
    assert source[1]["label"] == 0 and source[1]["label"].dtype == np.int32


IMAGES = np.zeros((2, 4, 4, 1), np.uint8)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"images": IMAGES.astype(np.float32) + 1.01}, r"outside \[-1, 1\]"),
        ({"images": np.full((2, 4, 4, 1), np.nan)}, "NaN"),
        ({"images": IMAGES.astype(np.int64)}, "int64, expected uint8 or float"),
        ({"images": IMAGES[:, :3]}, "3x4x1, expected square"),
        ({"images": IMAGES[:, 0]}, r"shape \(2, 4, 1\), expected \[N, H, W, C\]"),
        ({"images": IMAGES[:0]}, r"shape \(0, 4, 4, 1\)"),
        ({"a": IMAGES, "b": IMAGES}, r"holds a \[2, 4, 4, 1\], b \[2, 4, 4, 1\]; expected"),
        ({"images": IMAGES, "labels": np.array([0, -1])}, r"label -1 found, expected 0\.\."),
        ({"images": IMAGES, "labels": np.array([0, 1_000_000])}, "label 1000000 found"),
        ({"images": IMAGES, "labels": np.array([0.0, 1.0])}, "labels are float64"),
        ({"images": IMAGES, "labels": np.array([1])}, r"of shape \(1,\)"),
        ({"images": np.array([None, {}])}, "images.npy: holds Python objects"),
    ],
)
def test_bad_npz(tmp_path, arrays, message):
    path = write_npz(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=f"bad.npz.*{message}"):
        open_images(path)


def test_npz_of_floats_in_zero_to_one_is_refused_by_its_range(tmp_path):
    path = write_npz(tmp_path / "a.npz", images=np.linspace(0, 1, 16).reshape(4, 2, 2, 1))
    with pytest.raises(UserError, match=r"of \[0, 1\]; expected \[-1, 1\]"):
        open_images(path)


@pytest.mark.parametrize("name", ["label", "y", "y_train", "arr_1"])
def test_npz_labels_under_another_name(tmp_path, capsys, name):
    images, labels = np.zeros((6, 2, 2, 1), np.uint8), np.array([2, 0, 1, 1, 0, 2])
    others = {"sizes": np.zeros((6, 2)), "weight": np.ones(6)}
    source = open_images(write_npz(tmp_path / "a.npz", images=images, **{name: labels}, **others))
    assert source.num_classes == 3
    assert [int(source[i]["label"]) for i in range(6)] == labels.tolist()
    assert "passed over: sizes [6, 2], weight [6]" in capsys.readouterr().err


def test_npz_of_two_arrays_that_may_be_labels(tmp_path):
    images = np.zeros((3, 2, 2, 1), np.uint8)
    path = write_npz(tmp_path / "a.npz", images=images, fine=np.arange(3), coarse=np.arange(3))
    with pytest.raises(UserError, match="fine and coarse may each be the labels"):
        open_images(path)


def test_damaged_npz_is_a_user_error_wherever_it_is_cut(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 1), np.uint8)
    whole = open(write_npz(tmp_path / "a.npz", images=images), "rb").read()
    for length in range(0, len(whole), 17):
        (tmp_path / "cut.npz").write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut.npz"):
            open_images(str(tmp_path / "cut.npz"))


def test_padding_adds_black_pixels_at_each_side(tmp_path):
    path = write_npz(tmp_path / "a.npz", images=np.full((2, 3, 3, 1), 255, np.uint8))
    source = open_images(f"pad2:{path}", resolution=7)
    assert (len(source), source.sample_shape, source.num_classes) == (2, (7, 7, 1), 0)
    expected = np.full((7, 7, 1), -1, np.float32)
    expected[2:5, 2:5] = 1
    np.testing.assert_array_equal(source[1]["x0"], expected)
    assert source[1]["x0"].dtype == np.float32 and source[1]["label"] == 0
    with pytest.raises(UserError, match="7x7, expected resolution 8"):
        open_images(f"pad2:{path}", resolution=8)
    for prefix in ("padx:", "pad1000:", "pad1:pad1:"):
        with pytest.raises(UserError, match="pad.*no such file or folder"):
            open_images(f"{prefix}{path}")


def test_the_expected_resolution(tmp_path):
    path = write_npz(tmp_path / "a.npz", images=IMAGES)
    assert open_images(path, resolution=4).sample_shape == (4, 4, 1)
    with pytest.raises(UserError, match="a.npz: images of 4x4, expected resolution 32"):
        open_images(path, resolution=32)


@pytest.mark.parametrize("name", ["nowhere", "digit", "text.txt", "text.txt#test", "x#tset"])
def test_sources_that_are_none(tmp_path, name):
    (tmp_path / "text.txt").write_text("no image")
    with pytest.raises(UserError, match=f"{name}.*(expected|is for a folder)"):
        open_images(str(tmp_path / name))


def write_tfds(root, images, labels, *, name="tiny", file_format="array_record", class_label=True):
    """A data set as tfds leaves it on disk; written by hand, as tfds itself writes only with
    TensorFlow."""
    from tensorflow_datasets.proto import tf_example_pb2

    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    module = "tensorflow_datasets.core.features"
    dimensions = [str(size) for size in images.shape[1:]]
    features = {
        "image": {
            "image": {"dtype": "uint8", "shape": {"dimensions": dimensions}},
            "pythonClassName": f"{module}.image_feature.Image",
        },
        "label": {
            "classLabel": {"numClasses": "3"},
            "pythonClassName": f"{module}.class_label_feature.ClassLabel",
        },
    }
    if not class_label:
        del features["label"]
    (folder / "features.json").write_text(
        json.dumps(
            {
                "featuresDict": {"features": features},
                "pythonClassName": f"{module}.features_dict.FeaturesDict",
            }
        )
    )
    split = {
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "name": "train",
        "shardLengths": [str(len(images))],
    }
    info = {"fileFormat": file_format, "name": name, "splits": [split], "version": "1.0.0"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    shard = folder / f"{name}-train.{file_format}-00000-of-00001"
    writer = ArrayRecordWriter(str(shard), "group_size:1")
    for image, label in zip(images, labels):
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(png_bytes(image))
        if class_label:
            example.features.feature["label"].int64_list.value.append(label)
        writer.write(example.SerializeToString())
    writer.close()
    return shard


def png_bytes(image):
    stream = io.BytesIO()
    Image.fromarray(image[..., 0]).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def tfds_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return tmp_path


TFDS_IMAGES = np.arange(5 * 16, dtype=np.uint8).reshape(5, 4, 4, 1)


def test_tfds_without_tensorflow(tfds_dir):
    write_tfds(tfds_dir, TFDS_IMAGES, [0, 1, 2, 0, 1])
    source = open_images("tfds:tiny:train", resolution=4)
    assert (len(source), source.sample_shape, source.num_classes) == (5, (4, 4, 1), 3)
    np.testing.assert_allclose(source[4]["x0"], TFDS_IMAGES[4] / 127.5 - 1, atol=1e-7)
    assert [source[i]["label"] for i in range(5)] == [0, 1, 2, 0, 1]
    assert source[0]["x0"].dtype == np.float32 and source[0]["label"].dtype == np.int32
    assert pickle.loads(pickle.dumps(source))[2]["label"] == 2

    part = open_images("tfds:tiny:1.0.0:train[2:4]")
    assert len(part) == 2 and part[0]["label"] == 2
    with pytest.raises(IndexError):
        part[2]


def test_tfds_without_labels(tfds_dir):
    write_tfds(tfds_dir, TFDS_IMAGES, [0] * 5, class_label=False)
    source = open_images("tfds:tiny:train")
    assert source.num_classes == 0 and source[3]["label"] == 0


@pytest.mark.parametrize(
    "source, message",
    [
        ("tfds:tiny", "expected tfds:NAME"),
        ("tfds::train", "expected tfds:NAME"),
        ("tfds:absent:train", "absent not found"),
        ("tfds:tiny:test", "Unknown split 'test'"),
        ("tfds:tiny:train[:0]", "cannot be read"),
        ("tfds:mnist:train", "prepared with file_format=array_record"),
        ("tfds:old:train", "prepared with file_format=array_record"),
    ],
)
def test_bad_tfds_names(tfds_dir, source, message):
    write_tfds(tfds_dir, TFDS_IMAGES, [0] * 5)
    write_tfds(tfds_dir, TFDS_IMAGES, [0] * 5, name="old", file_format="tfrecord")
    with pytest.raises(UserError, match=message) as caught:
        open_images(source)
    assert source in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source, module", [("tfds:tiny:train", "tensorflow_datasets"), ("digits", "sklearn.datasets")]
)
def test_a_missing_package_is_named(monkeypatch, source, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match="package (tensorflow-datasets|scikit-learn)"):
        open_images(source)


@pytest.mark.parametrize("label", [-1, 3])
def test_tfds_label_out_of_range(tfds_dir, label):
    write_tfds(tfds_dir, TFDS_IMAGES, [0, label, 0, 0, 0])
    source = open_images("tfds:tiny:train")
    with pytest.raises(UserError, match=rf"example 1 has label {label}, expected 0\.\.2"):
        source[1]


def test_tfds_damaged_shard(tfds_dir):
    shard = write_tfds(tfds_dir, TFDS_IMAGES, [0] * 5)
    data = bytearray(shard.read_bytes())
    data[120] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="tfds:tiny:train: example 0 cannot be read"):
        open_images("tfds:tiny:train")
