"""The Fréchet distance's Inception against pytorch-fid, with weights drawn per key.

fid_inception.npz holds what pytorch-fid computed with PyTorch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inception_weights import drawn_state_dict

from dmd_jax.convert.inception import params_from_state_dict
from dmd_jax.errors import UserError
from dmd_jax.models.inception import class_logits, inception_template, pool3, preprocess
from dmd_jax.models.resizing import bilinear, bilinear_from_the_corner

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


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((2, 32, 32, 1), {}, r"shape \(2, 32, 32, 1\); expected \[B, H, W, 3\], three channels"),
        ((32, 32, 3), {}, "three channels"),
        ((2, 32, 32, 3), {"preprocessing": "clean"}, "expected one of pytorch_fid, tensorflow"),
    ],
)
def test_bad_input_is_refused(shape, options, message):
    with pytest.raises(UserError, match=message):
        pool3({}, np.zeros(shape, np.float32), **options)
