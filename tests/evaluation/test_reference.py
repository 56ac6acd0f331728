"""References: images, all or evenly chosen, and statistics as EDM publishes them."""

import numpy as np
import pytest

from dmd_jax.errors import UserError
from dmd_jax.evaluation.features import feature_extractor
from dmd_jax.evaluation.frechet import Statistics
from dmd_jax.evaluation.reference import evenly, open_reference, save_reference

SHAPE = (2, 2, 1)
PIXELS = [feature_extractor("pixels")]


@pytest.fixture
def moments():
    root = np.random.default_rng(0).standard_normal((4, 4))
    return {"mu": np.arange(4.0), "sigma": root @ root.T}


def test_published_statistics_are_read_as_they_are(tmp_path, moments):
    np.savez(tmp_path / "r.npz", **moments)
    found = open_reference(str(tmp_path / "r.npz"), SHAPE, PIXELS)
    assert found.images is None and found.count is None
    np.testing.assert_array_equal(found.statistics.mean, moments["mu"])
    np.testing.assert_array_equal(found.statistics.covariance, moments["sigma"])


def test_saved_statistics_are_read_back_with_their_count(tmp_path, moments):
    path = tmp_path / "deep" / "r.npz"
    save_reference(path, Statistics(7, moments["mu"], moments["sigma"]), PIXELS[0])
    found = open_reference(str(path), SHAPE, PIXELS)
    assert found.count == 7
    np.testing.assert_array_equal(found.statistics.covariance, moments["sigma"])
    small, large = (PIXELS[0]._replace(name="vgg16", origin={"resolution": n}) for n in (32, 224))
    save_reference(path, Statistics(7, moments["mu"], moments["sigma"]), small)
    with pytest.raises(UserError, match="of vgg16 resolution=32, expected of pixels"):
        open_reference(str(path), SHAPE, PIXELS)
    with pytest.raises(UserError, match="resolution=32, expected of vgg16 resolution=224"):
        open_reference(str(path), SHAPE, [large])


def test_images_are_chosen_evenly_over_the_set(tmp_path):
    images = np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(2, 1).repeat(2, 2)
    np.savez(tmp_path / "r.npz", images=images)
    found = open_reference(str(tmp_path / "r.npz"), SHAPE, PIXELS, 5)
    np.testing.assert_array_equal(found.indices, [0, 4, 8, 12, 16])
    assert found.count == 5 and found.statistics is None
    assert open_reference(str(tmp_path / "r.npz"), SHAPE, PIXELS).count == 20
    np.testing.assert_array_equal(evenly(7, 3), [0, 2, 4])
    np.testing.assert_array_equal(evenly(3, 7), [0, 1, 2])


def test_the_origin_tells_other_images_apart_but_not_other_names(tmp_path):
    images = np.zeros((20, 2, 2, 1), np.uint8)
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", images=images)
    images[7] = 1
    np.savez(tmp_path / "c.npz", images=images)
    a, b, c = (open_reference(str(tmp_path / f"{n}.npz"), SHAPE, PIXELS).origin for n in "abc")
    assert a == b != c
    assert a != open_reference(str(tmp_path / "a.npz"), SHAPE, PIXELS, 5).origin


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu": np.zeros(3)}, r"of another dimension: mu \(3,\) and sigma \(4, 4\), expected \(4,"),
        ({"sigma": np.eye(3)}, "of another dimension"),
        ({"mu": np.zeros(2048), "sigma": np.eye(2048)}, "of another dimension"),
        ({"sigma": np.triu(np.ones((4, 4)))}, "sigma is not symmetric"),
        ({"sigma": -np.eye(4)}, "sigma is not symmetric with variances"),
        ({"mu": np.full(4, np.nan)}, "a value is not finite"),
        ({"mu": np.array(["a"] * 4)}, "mu is <U1, expected floating point"),
        ({"mu": np.array([None] * 4)}, "mu.npy: holds Python objects"),
        ({"count": 0}, "count is 0"),
    ],
)
def test_statistics_that_are_none_are_refused(tmp_path, moments, changes, message):
    np.savez(tmp_path / "r.npz", **(moments | changes))
    with pytest.raises(UserError, match=message):
        open_reference(str(tmp_path / "r.npz"), SHAPE, PIXELS)


def test_damaged_statistics_are_refused(tmp_path, moments):
    path = tmp_path / "r.npz"
    np.savez(path, **moments)
    content = bytearray(path.read_bytes())
    content[150] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"r\.npz: cannot be read"):
        open_reference(str(path), SHAPE, PIXELS)
    path.write_bytes(content[:100])
    with pytest.raises(UserError, match=r"r\.npz: cannot be read"):
        open_reference(str(path), SHAPE, PIXELS)


def test_an_archive_of_another_version_is_refused(tmp_path, moments):
    """zipfile raises a NotImplementedError for it."""
    path = tmp_path / "r.npz"
    np.savez(path, **moments)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 99
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"r\.npz: cannot be read .*version 9\.9"):
        open_reference(str(path), SHAPE, PIXELS)


def test_images_that_do_not_fit_the_samples_are_refused(tmp_path, moments):
    path = str(tmp_path / "r.npz")
    np.savez(path, images=np.zeros((9, 2, 2, 3), np.uint8))
    with pytest.raises(UserError, match=r"images of shape \(2, 2, 3\); expected \(2, 2, 1\)"):
        open_reference(path, SHAPE, PIXELS)
    with pytest.raises(UserError, match="expected resolution 4"):
        open_reference(path, (4, 4, 3), PIXELS)
    for num in (1, 10):
        with pytest.raises(UserError, match=f"--num-reference {num}; expected 2 to 9"):
            open_reference(path, (2, 2, 3), PIXELS, num)
    np.savez(path, images=np.zeros((9, 2, 3, 3), np.uint8))
    with pytest.raises(UserError, match="expected square ones"):
        open_reference(path, (2, 2, 3), PIXELS)
    np.savez(path, **moments)
    with pytest.raises(UserError, match="--num-reference 3: .* holds no images"):
        open_reference(path, SHAPE, PIXELS, 3)
