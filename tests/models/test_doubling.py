"""The convolution of an enlarged image, in both ways, against its definition in NumPy."""

import jax
import numpy as np
import pytest

from dmd_jax.models.ops.doubling import DoublingConv, as_one, one_by_one


@pytest.mark.parametrize("function", [as_one, one_by_one])
def test_it_is_its_definition(function):
    """To 1e-6 of the largest; the gradients to each other's in the test below."""
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 3, 4, 5)), rng.standard_normal((3, 3, 5, 6))
    enlarged = np.pad(np.repeat(np.repeat(x, 2, 1), 2, 2), ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = sum(
        enlarged[:, i : i + 6, j : j + 8] @ kernel[i, j] for i in range(3) for j in range(3)
    )
    found = function(x.astype("f4"), kernel.astype("f4"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_both_ways_have_the_same_gradients():
    """To 1e-6 of the largest."""
    rng = np.random.default_rng(1)
    x, kernel = rng.standard_normal((2, 3, 4, 5), "f4"), rng.standard_normal((3, 3, 5, 6), "f4")
    weight = rng.standard_normal((2, 6, 8, 6), "f4")
    pairs = zip(*(jax.vjp(function, x, kernel)[1](weight) for function in (as_one, one_by_one)))
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


def test_a_program_for_tpu_has_one_convolution(monkeypatch):
    module, x = DoublingConv(6), np.zeros((1, 3, 4, 5), "f4")
    params = module.init(jax.random.key(0), x)
    for platform, kernel in (("tpu", "4,4,5,6"), ("cpu", "3,3,5,6")):
        monkeypatch.setattr(
            "dmd_jax.models.ops.doubling.platform_in_use", lambda name=platform: name
        )
        text = str(jax.make_jaxpr(module.apply)(params, x))
        (line,) = (line for line in text.splitlines() if "conv_general_dilated[" in line)
        assert line.strip().endswith("f32[1,6,8,6] = conv_general_dilated[") and kernel in text
