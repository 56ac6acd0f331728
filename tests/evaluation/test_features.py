"""Raw pixels, networks that see bytes, and feature functions of the user's own."""

import functools

import numpy as np
import pytest

from dmd_jax.errors import UserError
from dmd_jax.evaluation import features as module
from dmd_jax.evaluation.features import feature_extractor
from dmd_jax.models.ops.resizing import pil_bicubic
from dmd_jax.storage.judge_weights import INCEPTION

IMAGES = np.arange(2 * 2 * 3 * 1, dtype=np.float32).reshape(2, 2, 3, 1)

PLUG = """
import numpy as np

def mean_and_peak(images):
    assert images.dtype == np.float32
    flat = images.reshape(len(images), -1).astype(np.float64)
    return np.stack([flat.mean(1), flat.max(1)], 1)

def one_row(images):
    return np.zeros((1, 4))

def no_matrix(images):
    return np.zeros(len(images))

def words(images):
    return [["a", "b"]] * len(images)

constant = 3
"""


@pytest.fixture
def plug(tmp_path, monkeypatch):
    (tmp_path / "own_features.py").write_text(PLUG)
    (tmp_path / "broken_features.py").write_text("raise RuntimeError('no weights here')")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def channel_sums(monkeypatch):
    """In place of Inception: each channel's weighted sum over the image."""
    metadata = {"source": "a.pth", "source_sha256": "12", "recognised": "no", "kind": INCEPTION}
    monkeypatch.setattr(module, "load_auxiliary", lambda path, kind: {"weight": np.float32(2)})
    monkeypatch.setattr(module, "describe_auxiliary", lambda path, kind: metadata)

    def pool3(params, images, *, preprocessing):
        return params["weight"] * images.sum(axis=(1, 2)) + (preprocessing == "tensorflow")

    monkeypatch.setattr(module, "pool3", pool3)
    monkeypatch.setattr(module, "class_logits", lambda params, x: params["weight"] * x[:, :2])


def test_pixels_are_the_flattened_images():
    features = feature_extractor("pixels")
    found = features.extract(IMAGES)
    np.testing.assert_array_equal(found, [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]])
    assert found.dtype == np.float32 and features.logits is None
    assert features.dimensions((2, 3, 1)) == 6 and features.origin == {}


def test_a_function_of_the_users_own_is_imported(plug):
    features = feature_extractor("own_features:mean_and_peak")
    found = features.extract(IMAGES)
    np.testing.assert_array_equal(found, [[2.5, 5.0], [8.5, 11.0]])
    assert found.dtype == np.float64
    assert features.dimensions((2, 3, 1)) == 2 and len(features.origin["module_sha256"]) == 64


@pytest.mark.parametrize("count", [1, 8, 9, 30, 64])
def test_a_network_sees_bytes_by_edms_rule_over_all_devices(channel_sums, monkeypatch, count):
    monkeypatch.setattr(module, "BATCH_PER_DEVICE", 2)  # batches of 16 on eight devices
    features = feature_extractor("inception", inception="file")
    images = np.random.default_rng(0).uniform(-1.1, 1.1, (count, 2, 2, 3)).astype(np.float32)
    expected = 2 * np.floor(np.clip(images * 127.5 + 128, 0, 255)).sum(axis=(1, 2))
    found = features.extract(images)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(features.logits(found), 2 * expected[:, :2])


def test_bytes_come_back_from_images_that_were_bytes(channel_sums):
    features = feature_extractor("inception", inception="file")
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(256, 1, 1, 3)
    found = features.extract(module.bytes_to_float(every))
    np.testing.assert_array_equal(found[:, 0], 2 * np.arange(256))


def test_options_reach_the_network_and_the_origin(channel_sums):
    features = feature_extractor("inception", inception="file", preprocessing="tensorflow")
    np.testing.assert_array_equal(features.extract(np.zeros((1, 1, 1, 3))), [[257, 257, 257]])
    assert features.origin == {
        "source": "a.pth",
        "source_sha256": "12",
        "recognised": "no",
        "preprocessing": "tensorflow",
        "repeat_grey": False,
    }


def test_bytes_are_those_of_the_rule_that_is_given(channel_sums):
    features = feature_extractor("inception", inception="file")
    images = np.linspace(-1, 1, 1001, dtype=np.float32).repeat(3).reshape(-1, 1, 1, 3)
    down = np.trunc((images + 1) * np.float32(127.5))
    found = features.extract(images, functools.partial(module.to_uint8, rule="dmd2"))
    np.testing.assert_array_equal(found, 2 * down[:, 0, 0])
    assert (found != features.extract(images)).mean() > 0.4


def test_clean_images_are_resized_by_pillow_before_the_network(monkeypatch, channel_sums):
    def pool3(params, images, *, preprocessing):
        assert preprocessing == "clean" and images.shape[1:] == (299, 299, 3)
        return images[:, ::37, ::41].reshape(len(images), -1)

    monkeypatch.setattr(module, "pool3", pool3)
    features = feature_extractor("inception", inception="file", preprocessing="clean")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    found = features.extract(module.bytes_to_float(pixels))
    assert features.dimensions((16, 16, 3)) == found.shape[1]
    expected = pil_bicubic(pixels, (299, 299))[:, ::37, ::41].reshape(3, -1)
    np.testing.assert_array_equal(found, expected)
    assert features.origin["preprocessing"] == "clean" and features.unsaid is None


def test_what_nobody_said_is_named_with_its_choices(channel_sums, lpips_file):
    choices = "--inception-preprocessing pytorch_fid|tensorflow|clean, or --protocol"
    assert feature_extractor("inception", inception="file").unsaid == choices
    assert feature_extractor("vgg16", lpips=lpips_file).unsaid == "--vgg-resolution R"
    said = feature_extractor("inception", inception="file", preprocessing="pytorch_fid")
    assert said.unsaid is feature_extractor("vgg16", lpips=lpips_file, resolution=0).unsaid is None
    assert feature_extractor("pixels").unsaid is None


def test_grey_images_are_repeated_only_if_asked(channel_sums):
    grey = np.zeros((2, 4, 4, 1), np.float32)
    features = feature_extractor("inception", inception="file")
    for refused in (features.extract, lambda images: features.dimensions(images.shape[1:])):
        with pytest.raises(UserError, match=r'"inception": images of shape \(4, 4, 1\).*repeat-g'):
            refused(grey)
    with pytest.raises(UserError, match=r"shape \(4, 4, 2\), expected three channels$"):
        features.extract(grey.repeat(2, axis=-1))
    repeated = feature_extractor("inception", inception="file", repeat_grey=True)
    assert repeated.dimensions((4, 4, 1)) == 3
    np.testing.assert_array_equal(repeated.extract(grey), np.full((2, 3), 2 * 16 * 128))


def test_vgg16_tells_a_real_image_from_noise(lpips_file):
    features = feature_extractor("vgg16", lpips=lpips_file, resolution=0)
    assert features.dimensions((16, 16, 3)) == 512 and features.logits is None
    y, x = np.mgrid[:16, :16] / 8 - 1
    smooth = np.stack([y, x, x * y], axis=-1)
    noise = np.random.default_rng(0).uniform(-1, 1, (16, 16, 3))
    # 0.4 of a byte's step is lost to rounding, so the features are the same.
    bytes_ = np.floor(smooth * 127.5 + 128)
    images = np.stack([bytes_ / 127.5 - 1, (bytes_ + 0.4) / 127.5 - 1, noise])
    found = features.extract(images.astype(np.float32))
    assert found.shape == (3, 512) and found.dtype == np.float32
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[2] - found[0]).max() > 0.1 * np.abs(found[0]).max()
    assert features.origin["recognised"] == "yes" and features.origin["resolution"] == 0


def test_images_too_small_for_vgg16_are_refused(lpips_file):
    for resolution, shape in ((0, (8, 8, 3)), (8, (32, 32, 3)), (-1, (32, 32, 3))):
        features = feature_extractor("vgg16", lpips=lpips_file, resolution=resolution)
        with pytest.raises(UserError, match="expected at least 16"):
            features.dimensions(shape)


def test_a_file_is_needed_and_must_be_of_the_network(lpips_file, tmp_path):
    with pytest.raises(UserError, match='"inception" need --inception FILE; .*convert inception'):
        feature_extractor("inception")
    with pytest.raises(UserError, match='"vgg16" need --lpips FILE; .*convert lpips'):
        feature_extractor("vgg16")
    with pytest.raises(UserError, match="of kind 'lpips_vgg16'; expected 'fid_inception'"):
        feature_extractor("inception", inception=lpips_file)
    with pytest.raises(UserError, match="no such file"):
        feature_extractor("vgg16", lpips=tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fid", 'features "fid": unknown, expected "pixels", "inception", "vgg16" or'),
        ("", 'features "": unknown'),
        (":function", "unknown"),
        ("module:", "unknown"),
        ("no_such_module:f", "no_such_module cannot be imported .ModuleNotFoundError"),
        ("broken_features:f", "cannot be imported .RuntimeError: no weights here"),
        ("own_features:missing", 'own_features has no function "missing"'),
        ("own_features:constant", 'no function "constant"'),
    ],
)
def test_a_name_that_leads_to_no_function_is_refused(plug, name, message):
    with pytest.raises(UserError, match=message):
        feature_extractor(name)


@pytest.mark.parametrize(
    ("function", "shape"),
    [("one_row", r"\(1, 4\)"), ("no_matrix", r"\(2,\)"), ("words", r"\(2, 2\)")],
)
def test_features_of_another_shape_are_refused(plug, function, shape):
    features = feature_extractor(f"own_features:{function}")
    with pytest.raises(UserError, match=rf"{function}.*shape {shape}.*for 2 images"):
        features.extract(IMAGES)
