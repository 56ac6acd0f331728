"""LPIPS and VGG16's features with the real weights, against the reference implementations.

lpips_vgg16.npz holds what the packages lpips and PIQ computed with PyTorch.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.errors import UserError
from dmd_jax.models.judges.lpips import lpips, lpips_template, vgg16_features
from dmd_jax.storage.judge_weights import LPIPS, load_auxiliary

TOLERANCE = 1e-4  # absolute, of distances between 0.28 and 0.81
distance = jax.jit(lpips, static_argnames=("pooling", "resolution", "dtype"))


@pytest.fixture(scope="module")
def params(lpips_file):
    return load_auxiliary(lpips_file, LPIPS)


def nhwc(images):
    return np.transpose(images, (0, 2, 3, 1))


@pytest.mark.parametrize(
    "row, images, options",
    [
        ("lpips_v01", ("x", "y"), dict(pooling="max", resolution=None)),
        ("piq_maxpool", ("x", "y"), dict(pooling="max", resolution=None)),
        ("piq_avgpool", ("x", "y"), dict(pooling="average", resolution=None)),
        ("piq_avgpool_bilinear224", ("x32", "y32"), {}),  # the default
    ],
)
def test_distances_match_the_references(golden, params, row, images, options):
    arrays = golden("lpips_vgg16")
    ours = distance(params, *(nhwc(arrays[name]) for name in images), **options)
    assert ours.shape == (3,) and ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, arrays[row], rtol=0, atol=TOLERANCE)


def test_bfloat16_is_of_the_activations_alone(golden, params):
    """Its eight bits leave the distances within 5e-3 of PIQ's; summed in it they would not be."""
    arrays = golden("lpips_vgg16")
    images = [nhwc(arrays[name]) for name in ("x", "y")]
    ours = distance(params, *images, pooling="average", resolution=None, dtype=jnp.bfloat16)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, arrays["piq_avgpool"], rtol=5e-3)
    assert (distance(params, images[0], images[0], dtype=jnp.bfloat16) == 0).all()


@pytest.mark.parametrize("pooling, resolution", [("average", 24), ("max", None)])
def test_gradient_against_finite_differences(golden, params, pooling, resolution):
    """In float64: a step this small crosses next to none of the kinks of ReLU and maximum."""
    arrays = golden("lpips_vgg16")
    x, y = (nhwc(arrays[name])[:1, :16, :16].astype(np.float64) for name in ("x32", "y32"))
    direction = np.random.default_rng(0).standard_normal(x.shape)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

        @jax.jit
        def value_and_slope(params, x):
            value, gradient = jax.value_and_grad(
                lambda x: lpips(params, x, y, pooling=pooling, resolution=resolution)[0]
            )(x)
            return value, jnp.vdot(gradient, direction)

        step = 1e-8
        above, _ = value_and_slope(wide, x + step * direction)
        below, _ = value_and_slope(wide, x - step * direction)
        _, slope = value_and_slope(wide, x)
        assert above.dtype == np.float64 and abs(slope) > 1e-3
        np.testing.assert_allclose((above - below) / (2 * step), slope, rtol=1e-5)


def test_equal_images_and_dead_positions_have_no_gradient_and_no_nan(params):
    # Biases of -1e3 leave no channel active anywhere: every norm is zero.
    dead = params | {"vgg16": jax.tree.map(lambda leaf: leaf - 1e3, params["vgg16"])}
    x = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    slope = jax.jit(jax.value_and_grad(lambda p, x, y: lpips(p, x, y, resolution=None)[0], 1))
    unlike, gradient = slope(params, x, -x)
    assert unlike > 0.1 and np.abs(gradient).max() > 1e-4
    for weights, y in ((params, x), (dead, -x)):
        value, gradient = slope(weights, x, y)
        # The two sides are compiled apart, and so agree to rounding only.
        assert 0 <= float(value) < 1e-12
        assert np.abs(gradient).max() < 1e-8


def test_it_is_symmetric_and_per_pair(golden, params):
    arrays = golden("lpips_vgg16")
    x, y = nhwc(arrays["x"]), nhwc(arrays["y"])
    pooled = functools.partial(distance, pooling="average", resolution=None)
    both = pooled(params, x, y)
    np.testing.assert_array_equal(pooled(params, y, x), both)
    shuffled = pooled(params, x[::-1], y[::-1])
    np.testing.assert_allclose(shuffled[::-1], both, rtol=1e-6)


def test_features_are_those_of_the_distance(golden, params):
    """The last block's term of the max-pooled distance is a function of the same activations.

    At 16x16 pixels the last block is one position, so that its mean over positions is itself; with
    all other heads zero the distance must be that of the features' unit vectors.
    """
    arrays = golden("lpips_vgg16")
    x, y = (nhwc(arrays[name])[:, :16, :16] for name in ("x", "y"))
    heads = {name: np.zeros_like(head) for name, head in params["heads"].items()}
    last = params | {"heads": heads | {"block5": params["heads"]["block5"]}}
    extract = jax.jit(functools.partial(vgg16_features, resolution=None))
    features = [np.asarray(extract(params, z), np.float64) for z in (x, y)]
    assert features[0].shape == (3, 512)
    a, b = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in features)
    expected = ((a - b) ** 2 @ params["heads"]["block5"].astype(np.float64)).tolist()
    ours = distance(last, x, y, pooling="max", resolution=None)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_template_is_vgg16_without_its_classifier(params):
    leaves = jax.tree.leaves(lpips_template())
    assert len(leaves) == 31
    # VGG16's convolutions have 14,714,688 parameters; the heads 64 + 128 + 256 + 512 + 512.
    assert sum(leaf.size for leaf in leaves) == 14_714_688 + 1_472
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(
        lambda leaf: leaf.shape, lpips_template()
    )


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((2, 32, 32, 1), {}, r"shape \(2, 32, 32, 1\); expected \[B, H, W, 3\], three channels"),
        ((32, 32, 3), {}, "three channels"),
        ((2, 8, 32, 3), {"resolution": None}, "8 pixels a side; expected at least 16"),
        ((2, 32, 32, 3), {"pooling": "mean"}, "pooling is 'mean'; expected one of average, max"),
    ],
)
def test_bad_images_are_refused(shape, options, message):
    x = np.zeros(shape, np.float32)
    with pytest.raises(UserError, match=message):
        lpips(lpips_template(), x, x, **options)


def test_images_of_two_shapes_are_refused():
    with pytest.raises(UserError, match="expected equal shapes"):
        lpips({}, np.zeros((2, 32, 32, 3)), np.zeros((1, 32, 32, 3)))
