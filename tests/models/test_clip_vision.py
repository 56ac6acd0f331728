"""CLIP's vision tower against transformers, and its refusals."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_weights import draw_parameters, drawn_params, params_of, relative_error

from dmd_jax.errors import UserError
from dmd_jax.models.clip.vision import CLIPVision

TOLERANCE = 5e-5  # of the largest magnitude
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 72,
    "projection_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 21,
    "patch_size": 7,
}


def images_of(network):
    shape = (2, network.image_size, network.image_size, 3)
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@pytest.mark.torch
@pytest.mark.parametrize(
    "options",
    [{"hidden_act": "quick_gelu"}, {"hidden_act": "gelu", "image_size": 23}],
    ids=["OpenAI's", "OpenCLIP's"],
)
def test_hidden_states_and_features_match_pytorch(options):
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    theirs = draw_parameters(CLIPVisionModelWithProjection(CLIPVisionConfig(**SMALL | options)))
    network = CLIPVision(**SMALL | options)
    params = params_of(theirs, network, without="vision_model.")
    images = images_of(network)
    ours = jax.jit(network.apply)({"params": params}, images)
    with torch.no_grad():
        nchw = torch.from_numpy(images).permute(0, 3, 1, 2)
        expected = theirs(nchw)
        pooled = theirs.vision_model(nchw).pooler_output
    assert ours.last_hidden.shape == (2, 1 + 9, 32)  # 23 pixels hold three patches of 7 too
    assert relative_error(ours.last_hidden, expected.last_hidden_state) < TOLERANCE
    assert relative_error(ours.pooled, pooled) < TOLERANCE
    assert relative_error(ours.projected, expected.image_embeds) < TOLERANCE


@pytest.mark.torch
def test_defaults_are_those_of_the_configuration_files():
    """A config.json need not have the keys whose value is the default."""
    from transformers import CLIPVisionConfig

    theirs, ours = CLIPVisionConfig(), CLIPVision()
    options = (*SMALL, "num_channels", "hidden_act", "layer_norm_eps")
    assert {o: getattr(ours, o) for o in options} == {o: getattr(theirs, o) for o in options}


@pytest.mark.parametrize(
    "widths, layers, act, released",
    [
        # The towers with their projections: ViT-L/14, ViT-H/14, ViT-bigG/14.
        ((1024, 4096, 768), 24, "quick_gelu", 303_966_208),
        ((1280, 5120, 1024), 32, "gelu", 632_076_800),
        ((1664, 8192, 1280), 48, "gelu", 1_844_907_264),
    ],
)
def test_parameter_counts(widths, layers, act, released):
    network = CLIPVision(*widths, layers, 16, patch_size=14, hidden_act=act)
    shapes = jax.eval_shape(network.init, jax.random.key(0), *network.example_inputs())
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == released


def test_the_class_token_sees_the_last_patch():
    """Which a causal mask would keep from it."""
    network = CLIPVision(**SMALL)
    params, images = {"params": drawn_params(network)}, images_of(network)
    changed = images.copy()
    changed[0, -1, -1] += 1
    apply = jax.jit(network.apply)
    first, second = (apply(params, x).projected for x in (images, changed))
    assert np.abs(first - second)[0].max() > 1e-3
    np.testing.assert_array_equal(first[1], second[1])


def test_bfloat16_is_near_float32():
    wide, narrow = (CLIPVision(**SMALL, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    params, images = {"params": drawn_params(wide)}, images_of(wide)
    expected, actual = (jax.jit(n.apply)(params, images).projected for n in (wide, narrow))
    assert actual.dtype == jnp.bfloat16
    error = np.abs(np.asarray(actual, np.float32) - expected)
    assert 0 < error.max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"patch_size": 22}, "CLIPVision patch_size is 22; expected at most image_size, 21"),
        ({"image_size": 10**6}, "image_size is 1000000; expected 1 to 8192"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'; expected one of quick_gelu, gelu"),
        ({"projection_dim": 0}, "projection_dim is 0; expected 1 to 65536"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        CLIPVision(**SMALL | options)


def test_images_of_another_shape_are_refused():
    network = CLIPVision(**SMALL)
    with pytest.raises(UserError, match=r"\(1, 3, 21, 21\); expected \[B, 21, 21, 3\]"):
        jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 3, 21, 21)))
