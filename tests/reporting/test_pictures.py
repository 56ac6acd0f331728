"""Images to bytes, grids and PNG files."""

import io

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from dmd_jax.errors import UserError
from dmd_jax.reporting.pictures import grid, png_bytes, save_png, signed, to_uint8


def test_bytes_follow_edms_rule():
    # x * 127.5 + 128, clipped, truncated; worked out by hand.
    values = np.array([-2, -1, -0.9961, -0.5, -0.004, 0, 0.0078, 0.5, 0.9961, 1, 7], np.float32)
    expected = [0, 0, 0, 64, 127, 128, 128, 191, 255, 255, 255]
    np.testing.assert_array_equal(to_uint8(values), expected)
    assert to_uint8(values).dtype == np.uint8


def test_rules_at_the_borders_of_bytes():
    """Just below, at and above each border of either rule, against exact decimals."""
    borders = np.concatenate([np.arange(-1, 257), np.arange(-1, 257) + 0.5])
    places = np.concatenate([borders + offset for offset in (-0.01, 0.0, 0.01)])
    images = (places / 127.5 - 1).astype(np.float32)
    exact = images.astype(np.float64)
    for rule, value in (("edm", exact * 127.5 + 128), ("dmd2", (exact + 1) * 127.5)):
        found = to_uint8(images, rule)
        expected = np.clip(np.trunc(value), 0, 255)
        # A place on the border itself is float32's to decide: by float32's own arithmetic.
        single = {"edm": images * np.float32(127.5) + 128, "dmd2": (images + 1) * np.float32(127.5)}
        at_border = np.abs(value - np.round(value)) < 1e-4
        np.testing.assert_array_equal(found[~at_border], expected[~at_border])
        np.testing.assert_array_equal(found, np.clip(np.trunc(single[rule]), 0, 255))
        assert 0.1 < at_border.mean() < 0.2
    hand = np.array([-1.1, -1, -0.9999, 0, 0.9999, 1, 1.1])
    np.testing.assert_array_equal(to_uint8(hand, "dmd2"), [0, 0, 0, 127, 254, 255, 255])
    np.testing.assert_array_equal(to_uint8(hand, "edm"), [0, 0, 0, 128, 255, 255, 255])


def test_every_byte_comes_back():
    values = np.arange(256, dtype=np.float32) / 127.5 - 1
    # The rule adds half a step before it truncates, which is what makes it survive rounding.
    np.testing.assert_array_equal(to_uint8(values), np.arange(256))


def test_half_precision_is_widened_first():
    values = np.array([-1, 0, 0.5, 1], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(to_uint8(values), [0, 128, 191, 255])


def test_infinities_clip_and_nan_is_refused():
    np.testing.assert_array_equal(to_uint8(np.array([-np.inf, np.inf])), [0, 255])
    with pytest.raises(UserError, match="2 of 3 values are NaN"):
        to_uint8(np.array([np.nan, 0.0, np.nan]))
    with pytest.raises(UserError, match="uint8, expected floating point"):
        to_uint8(np.zeros(3, np.uint8))


def test_signed_picture_has_a_grey_zero_and_ignores_an_outlier():
    gradient = np.linspace(-1, 1, 1001, dtype=np.float32)  # 99th percentile of |.|: 0.99
    gradient[0] = -1e6
    picture = signed(gradient)
    assert picture[500] == 128
    assert picture[0] == 0 and picture[-1] == 255
    assert picture[750] == int(0.5 / 0.99 * 127.5 + 128)
    assert picture.dtype == np.uint8


def test_signed_picture_of_almost_only_zeros():
    gradient = np.zeros((4, 8, 8, 1), np.float32)
    np.testing.assert_array_equal(signed(gradient), np.full_like(gradient, 128, np.uint8))
    gradient[0, 0, 0, 0] = -1e-9
    assert signed(gradient)[0, 0, 0, 0] == 0


def test_grid_by_hand():
    images = np.array([10, 20, 30], np.uint8)[:, None, None, None]  # three images of one pixel
    g = 64
    expected = [
        [g, g, g, g, g, g, g, g],
        [g, g, g, g, g, g, g, g],
        [g, g, 10, g, g, 20, g, g],
        [g, g, g, g, g, g, g, g],
        [g, g, g, g, g, g, g, g],
        [g, g, 30, g, g, g, g, g],
        [g, g, g, g, g, g, g, g],
        [g, g, g, g, g, g, g, g],
    ]
    np.testing.assert_array_equal(grid(images, columns=2)[..., 0], expected)


def test_grid_scales_without_blending_and_keeps_colours():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), np.uint8)
    sheet = grid(images, columns=2, scale=5)
    assert sheet.shape == (3 * 5 + 4, 2 * 4 * 5 + 6, 3)
    second = sheet[2:17, 24:44]
    np.testing.assert_array_equal(second, np.kron(images[1], np.ones((5, 5, 1), np.uint8)))


def test_grid_draws_floats_by_the_byte_rule_and_picks_columns():
    images = np.full((10, 2, 2, 1), 0.5, np.float32)
    assert grid(images, scale=1).shape == (3 * 4 + 2, 4 * 4 + 2, 1)
    assert grid(images, columns=99).shape == (4 + 2, 10 * 4 + 2, 1)
    assert grid(images)[2, 2, 0] == 191


@pytest.mark.parametrize("shape", [(8, 8, 1), (2, 8, 8, 2), (0, 8, 8, 1), (1, 2, 8, 8, 1)])
def test_grid_refuses_other_shapes(shape):
    with pytest.raises(UserError, match="a grid takes"):
        grid(np.zeros(shape, np.float32))


@pytest.mark.parametrize(("shape", "mode"), [((4, 5), "L"), ((4, 5, 1), "L"), ((4, 5, 3), "RGB")])
def test_png_holds_the_same_bytes(tmp_path, shape, mode):
    picture = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    path = tmp_path / "new" / "folder" / "picture.png"
    save_png(path, picture)
    for source in (path, io.BytesIO(png_bytes(picture))):
        with Image.open(source) as image:
            assert (image.format, image.mode) == ("PNG", mode)
            np.testing.assert_array_equal(np.asarray(image).reshape(shape), picture)
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]


def test_a_failed_write_leaves_the_earlier_picture(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    save_png(path, np.zeros((2, 2), np.uint8))
    before = path.read_bytes()

    def full(self, content):
        self.open("wb").write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_png(path, np.ones((2, 2), np.uint8))
    assert path.read_bytes() == before
