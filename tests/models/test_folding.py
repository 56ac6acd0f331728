"""Folded images: what is computed of them is what is computed of images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.models.judges.lpips import lpips
from dmd_jax.models.ops import folding
from dmd_jax.models.ops.doubling import DoublingConv
from dmd_jax.models.ops.folding import FoldableConv, fold, unfold
from dmd_jax.models.stable_diffusion.autoencoder_tiny import AutoencoderTiny
from dmd_jax.storage.judge_weights import LPIPS, load_auxiliary

TOLERANCE = 2e-6  # of the largest magnitude


@pytest.fixture
def on_tpu(monkeypatch):
    """Compiles a function as it is traced for TPU."""

    def program_of(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr("dmd_jax.models.ops.folding.platform_in_use", lambda: "tpu")
            return jax.jit(function).lower(*args).compile()

    return program_of


def assert_close(found, expected, tolerance=TOLERANCE):
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def test_a_folded_image_has_a_pixels_right_neighbour_behind_it():
    x = np.arange(24).reshape(1, 2, 4, 3)
    np.testing.assert_array_equal(fold(x)[0, 1, 1], x[0, 1, 2:].ravel())
    np.testing.assert_array_equal(unfold(fold(x)), x)


def test_convolution_is_its_definition():
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 3, 4, 5)), rng.standard_normal((3, 3, 5, 6))
    bias = rng.standard_normal(6)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = bias + sum(
        padded[:, i : i + 3, j : j + 4] @ kernel[i, j] for i in range(3) for j in range(3)
    )
    x, kernel, bias = (array.astype("f4") for array in (x, kernel, bias))
    found = folding.convolve(x, kernel), folding.convolve(fold(x), kernel, folded=True)
    plain, folded = (folding.add_bias(y, bias) for y in found)
    assert_close(plain, expected)
    assert_close(unfold(folded), expected)


@pytest.mark.parametrize("module", [FoldableConv, DoublingConv])
def test_the_same_parameters_have_the_same_gradients(module):
    plain, folded = (module(6, folded=whether) for whether in (False, True))
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 3, 4, 5), "f4")
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, "f4"),
        jax.eval_shape(folded.init, jax.random.key(0), fold(x)),
    )
    ours, our_pullback = jax.vjp(lambda p, x: unfold(folded.apply(p, fold(x))), params, x)
    theirs, their_pullback = jax.vjp(plain.apply, params, x)
    assert_close(ours, theirs)
    direction = rng.standard_normal(theirs.shape, "f4")
    assert_close(our_pullback(direction), their_pullback(direction))


def test_it_pays_on_tpu_for_few_channels(monkeypatch):
    assert not folding.pays(8, 64)
    monkeypatch.setattr("dmd_jax.models.ops.folding.platform_in_use", lambda: "tpu")
    assert folding.pays(8, 64) and not folding.pays(8, 65) and not folding.pays(7, 64)


def test_a_program_for_tpu_decodes_folded_latents(on_tpu):
    """TAESD's widths; its gradient, which is the regression's, as well."""
    network = AutoencoderTiny(num_decoder_blocks=(1, 0, 1, 1))
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda leaf: 0.05 * rng.standard_normal(leaf.shape, "f4"),
        jax.eval_shape(network.init, jax.random.key(0), *network.example_inputs()),
    )
    z = rng.standard_normal((1, 3, 4, 4), "f4")
    direction = rng.standard_normal((1, 24, 32, 3), "f4")

    def decode(params, z):
        image, pullback = jax.vjp(lambda z: network.apply(params, z, method="decode"), z)
        return image, pullback(direction)

    program = on_tpu(decode, params, z)
    assert "f32[1,24,16,128]" in program.as_text()  # two pixels of 64 channels side by side
    assert_close(program(params, z), jax.jit(decode)(params, z), 1e-5)


@pytest.mark.parametrize("pooling", ["average", "max"])
def test_a_program_for_tpu_compares_folded_images(on_tpu, golden, lpips_file, pooling):
    params, arrays = load_auxiliary(lpips_file, LPIPS), golden("lpips_vgg16")
    x, y = (jnp.transpose(arrays[name], (0, 2, 3, 1))[:, :17] for name in ("x32", "y32"))
    distance = functools.partial(lpips, pooling=pooling, resolution=None)

    def slope(params, x, y):
        return jax.value_and_grad(lambda x: distance(params, x, y).sum())(x)

    program = on_tpu(slope, params, x, y)
    assert "f32[3,17,16,128]" in program.as_text()
    assert_close(program(params, x, y), jax.jit(slope)(params, x, y), 1e-5)
