"""The Fréchet distance's Inception against pytorch-fid, with weights drawn per key.

fid_inception.npz holds what pytorch-fid computed with PyTorch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inception_weights import drawn_state_dict
from PIL import Image

from dmd_jax.convert.inception import params_from_state_dict
from dmd_jax.errors import UserError
from dmd_jax.models.judges.inception import class_logits, inception_template, pool3, preprocess
from dmd_jax.models.ops.resizing import bilinear, bilinear_from_the_corner, pil_bicubic

TOLERANCE = 1e-4  # of the largest magnitude


def test_pool3_matches_pytorch_fid(golden):
    arrays = golden("fid_inception")
    params = params_from_state_dict(drawn_state_dict(arrays), "the drawn weights")
    features = jax.jit(pool3)(params, arrays["images_uint8"])
    assert features.shape == (3, 2048) and features.dtype == jnp.float32
    error = np.abs(features - arrays["pool3"]).max() / np.abs(arrays["pool3"]).max()
    assert error < TOLERANCE


def test_class_logits_are_the_last_layer_without_its_bias():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((3, 2048)).astype(np.float32)
    kernel = rng.standard_normal((2048, 1008)).astype(np.float32)
    logits = class_logits({"fc": {"kernel": kernel}}, features)
    expected = features.astype(np.float64) @ kernel.astype(np.float64)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3)


def test_template_is_the_published_network(golden):
    """As many weights as the reference has: each convolution's, and a bias for each norm's four."""
    arrays = golden("fid_inception")
    shapes = {str(k): str(s) for k, s in zip(arrays["keys"], arrays["shapes"])}
    convolutions = [key for key in shapes if key.endswith("conv.weight")]
    leaves = jax.tree.leaves(inception_template())
    assert len(convolutions) == 94 and len(leaves) == 2 * 94 + 1
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    template = inception_template()
    assert template["Mixed_6b"]["branch7x7dbl_2"]["kernel"].shape == (7, 1, 128, 128)
    assert shapes["Mixed_6b.branch7x7dbl_2.conv.weight"] == "(128, 128, 7, 1)"
    assert template["fc"]["kernel"].shape == (2048, 1008)


@pytest.mark.parametrize("size", [(20, 9), (3, 4)])
def test_resizing_conventions(size):
    """A plane's value tells where it was sampled: up and down, and without antialiasing."""
    rows, columns = np.indices((8, 6), np.float32)
    image = (rows + 100 * columns)[None, :, :, None]
    up_to = np.array(image.shape[1:3]) - 1
    row, column = (np.arange(n) * (side / n) for n, side in zip(size, (8, 6)))
    half = [side / n / 2 - 0.5 for n, side in zip(size, (8, 6))]
    for resize, (down, right) in ((bilinear, half), (bilinear_from_the_corner, (0, 0))):
        at_row, at_column = (
            np.clip(at, 0, last) for at, last in zip((row + down, column + right), up_to)
        )
        expected = at_row[:, None] + 100 * at_column
        np.testing.assert_allclose(resize(image, size)[0, :, :, 0], expected, rtol=1e-5, atol=1e-5)


def test_preprocessings():
    """Two bytes side by side: each convention by its formula, at every column."""
    images = np.zeros((1, 4, 2, 3), np.float32)
    images[:, :, 1] = 255
    columns = np.arange(299)
    centred = np.clip((columns + 0.5) * 2 / 299 - 0.5, 0, 1)
    cornered = np.clip(columns * 2 / 299, 0, 1)
    for name, expected in (
        ("pytorch_fid", 2 * centred - 1),
        ("tensorflow", (255 * cornered - 128) / 128),
    ):
        ours = preprocess(images, name)
        assert ours.shape == (1, 299, 299, 3)
        expected = np.broadcast_to(expected[:, None], (299, 299, 3))
        np.testing.assert_allclose(ours[0], expected, rtol=0, atol=2e-6)


@pytest.mark.torch
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (17, 40), (512, 512), (299, 299)])
def test_tensorflow_resizing_is_that_of_nvidias_detector(size):
    """NVIDIA's detector samples a grid that is moved by half a pixel of both sizes; torch is asked
    for the images at that grid, which it knows nothing of TensorFlow for."""
    import torch

    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3)).astype(np.float32)
    theta = torch.eye(2, 3, dtype=torch.float64)
    for axis, length in enumerate(size[::-1]):
        theta[axis, 2] = 1 / length - 1 / 299
    grid = torch.nn.functional.affine_grid(theta.repeat(2, 1, 1), [2, 3, 299, 299], False)
    nchw = torch.from_numpy(images.transpose(0, 3, 1, 2)).double()
    expected = torch.nn.functional.grid_sample(
        nchw, grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    expected = (expected.numpy().transpose(0, 2, 3, 1) - 128) / 128
    # Float32 places a row to 1e-7 of the side; neighbours differ by up to two.
    atol = 1e-6 * max(size)
    np.testing.assert_allclose(preprocess(images, "tensorflow"), expected, rtol=0, atol=atol)


def test_clean_resizing_is_pillows_of_each_channel_in_floats():
    images = np.random.default_rng(0).integers(0, 2, (2, 32, 20, 3), np.uint8) * 255
    ours = pil_bicubic(images, (299, 150))
    assert ours.shape == (2, 299, 150, 3) and ours.dtype == np.float32
    overshoot = 0
    for image, found in zip(images, ours):
        for channel in range(3):
            picture = Image.frombytes("F", (20, 32), image[..., channel].astype("<f4").tobytes())
            resized = np.asarray(picture.resize((150, 299), resample=Image.Resampling.BICUBIC))
            overshoot = max(overshoot, resized.max() - 255)
            np.testing.assert_array_equal(found[..., channel], resized.clip(0, 255))
    assert overshoot > 5  # so that clipping is seen
    assert np.ptp(ours - np.round(ours)) > 0.9  # nothing is rounded to bytes


def bicubic_weights(length, target):
    """[target, length]: the cubic convolution of a = -1/2, widened where it shrinks."""
    scale = max(length / target, 1)
    at = (np.arange(target) + 0.5) * length / target
    x = np.abs((np.arange(length) + 0.5 - at[:, None]) / scale)
    inner, outer = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, inner, np.where(x < 2, outer, 0))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("size", [(40, 24), (24, 30), (40, 512)])
def test_clean_resizing_is_the_antialiased_cubic(size):
    images = np.random.default_rng(1).integers(0, 256, (1, *size, 3), np.uint8)
    rows, columns = bicubic_weights(size[0], 31), bicubic_weights(size[1], 99)
    expected = np.einsum("ij,bjkc,lk->bilc", rows, images.astype(np.float64), columns)
    found = pil_bicubic(images, (31, 99))
    np.testing.assert_allclose(found, expected.clip(0, 255), rtol=0, atol=1e-3)


def test_clean_features_see_the_resized_image_alone():
    images = np.random.default_rng(0).uniform(0, 255, (1, 299, 299, 3)).astype(np.float32)
    found = preprocess(images, "clean")
    np.testing.assert_array_equal(found, (images - 128) / 128)


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((2, 32, 32, 3), {"preprocessing": "clean"}, r"shape \(2, 32, 32, 3\); expected 299x299"),
        ((2, 32, 32, 1), {}, r"shape \(2, 32, 32, 1\); expected \[B, H, W, 3\], three channels"),
        ((32, 32, 3), {}, "three channels"),
        ((2, 32, 32, 3), {"preprocessing": "bicubic"}, "of pytorch_fid, tensorflow, clean"),
    ],
)
def test_bad_input_is_refused(shape, options, message):
    with pytest.raises(UserError, match=message):
        pool3({}, np.zeros(shape, np.float32), **options)
