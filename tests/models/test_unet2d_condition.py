"""Stable Diffusion's U-Net against PyTorch diffusers (see diffusers_golden.py), and its traps."""

from __future__ import annotations

import functools
import math

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers_golden import (
    GRADIENTS,
    UNETS,
    V1,
    V2,
    block_inputs,
    drawn_input,
    outputs,
    unet_inputs,
)
from once import once
from torch_weights import drawn_params, params_of, relative_error

from dmd_jax.convert.torch_layout import to_torch, torch_key
from dmd_jax.errors import UserError
from dmd_jax.models import abstract_params, build_denoiser, build_network
from dmd_jax.models.ops.layers import GroupNorm, layer_norm
from dmd_jax.models.stable_diffusion.transformer2d import GEGLU, Attention, Transformer2D
from dmd_jax.models.stable_diffusion.unet2d_blocks import Downsample2D, ResnetBlock2D, nearest

TOLERANCE = 5e-5  # of the largest magnitude
V15 = {"name": "unet2d_condition", "cross_attention_dim": 768}
V21 = {
    "name": "unet2d_condition",
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,
    "prediction_type": "v_prediction",
}


@functools.cache
def unet(case, **options):
    """The network of a case and its parameters."""
    mapping = {"name": "unet2d_condition"} | UNETS[case][0]
    network = build_network(mapping, **options)
    return network, drawn_params(network)


@pytest.fixture(scope="module")
def output_and_gradients():
    """The v2 network's output, and the gradients by their names in PyTorch, of one program.

    Under the policy "dots"; test_remat compares the two others with each other.
    """
    network, params = unet("v2", remat="dots")
    inputs, cotangent = unet_inputs("v2"), drawn_input("cotangent", (2, 5, 7, 4))

    def loss(params):
        output = network.apply({"params": params}, *inputs)
        return jnp.sum(output * cotangent), output

    gradients, output = once(jax.grad(loss, has_aux=True))(params)
    flat = flax.traverse_util.flatten_dict(gradients, sep="/")
    return output, {torch_key(path): to_torch(path, leaf) for path, leaf in flat.items()}


def test_v1_structure_matches_diffusers(golden):
    """Through the door for configurations; a denoiser of "sample" is the network itself."""
    params, (x_t, _, context) = unet("v1")[1], unet_inputs("v1")
    mapping = {"name": "unet2d_condition", "prediction_type": "sample"} | V1
    denoiser = build_denoiser(mapping)
    level = denoiser.schedule.level(jnp.array([999, 20]))
    output = once(denoiser.denoise)(params, x_t, level, context)
    assert relative_error(output, golden("diffusers")["v1/output"]) < TOLERANCE


def test_v2_options_and_odd_sizes_match_diffusers(golden, output_and_gradients):
    output, _ = output_and_gradients
    assert relative_error(output, golden("diffusers")["v2/output"]) < TOLERANCE


@pytest.mark.parametrize("key", GRADIENTS)
def test_gradients_match_pytorch(golden, output_and_gradients, key):
    _, gradients = output_and_gradients
    assert relative_error(gradients[key], golden("diffusers")[f"v2/grad/{key}"]) < 1e-4


@pytest.mark.torch
def test_the_golden_arrays_are_diffusers(golden):
    """To 5e-6: PyTorch's own sums differ in order from machine to machine."""
    from diffusers_golden import torch_unet

    arrays, made = golden("diffusers"), outputs()
    assert set(arrays) == set(made)
    # The gradients and what stands on a mean of 1000 have lost some digits by cancellation.
    loose = {name: 5e-4 for name in arrays if "far" in name} | dict.fromkeys(
        (f"v2/grad/{key}" for key in GRADIENTS), 5e-5
    )
    for name, array in arrays.items():
        assert relative_error(made[name], array) < loose.get(name, 5e-6), name
    for case in UNETS:  # the same names and shapes, and the same weights drawn
        network, params = unet(case)
        theirs = params_of(torch_unet(case), network)
        jax.tree.map(np.testing.assert_array_equal, params, theirs)


@pytest.mark.parametrize("image", ["quiet", "far"])
def test_blocks_match_diffusers_where_epsilon_and_mean_matter(golden, image):
    """Residual blocks have epsilon 1e-5, transformers 1e-6; the variance is never E[x^2] - E[x]^2.

    Relative to what the block adds to the image. 1e-3 at a mean of 1000, where float32 rounds to
    6e-5 of a standard deviation; the short-cut's variance is off by several hundredths.
    """
    params, x = unet("v2")[1]["down_blocks_0"], block_inputs()[image]
    context, emb = unet_inputs("v2")[2], drawn_input("emb", (2, 64))
    resnet = jax.jit(ResnetBlock2D(16, groups=4, epsilon=1e-5).apply)
    transformer = jax.jit(Transformer2D(2, groups=4, use_linear_projection=True).apply)
    found = {
        "resnet": resnet({"params": params["resnets_0"]}, x, emb),
        "transformer": transformer({"params": params["attentions_0"]}, x, context),
    }
    tolerance = {"quiet": TOLERANCE, "far": 1e-3}[image]
    for block, output in found.items():
        expected = golden("diffusers")[f"{block}/{image}"]
        assert relative_error(output - x, expected - x) < tolerance, block


@pytest.mark.parametrize(
    "norm, epsilon, axes",
    [
        (GroupNorm(1e-5, groups=2), 1e-5, (1, 2, 4)),
        (layer_norm(name=None, dtype=jnp.float32), 1e-5, (3, 4)),
    ],
)
def test_norms_in_closed_form(norm, epsilon, axes):
    for scale, mean, tolerance in ((3e-3, 0.0, 1e-5), (1.0, 1000.0, 1e-3)):
        x = np.float32(mean + scale * np.random.default_rng(0).standard_normal((2, 3, 3, 8)))
        split = x.astype(np.float64).reshape(2, 3, 3, 2, 4)
        centred = split - split.mean(axis=axes, keepdims=True)
        variance = np.square(centred).mean(axis=axes, keepdims=True)
        expected = (centred / np.sqrt(variance + epsilon)).reshape(x.shape)
        variables = {"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}
        assert relative_error(norm.apply(variables, x), expected) < tolerance


def test_geglu_is_the_exact_one():
    """The tanh approximation is off by 4.7e-4 at 2.7."""
    gate = np.array([-2.7, -0.5, 0.0, 1.0, 2.7], np.float32)
    kernel = np.eye(10, dtype=np.float32)
    variables = {"params": {"proj": {"kernel": kernel, "bias": jnp.zeros(10)}}}
    output = GEGLU(5).apply(variables, np.concatenate([np.full(5, 2, np.float32), gate]))
    expected = [2 * g * (1 + math.erf(g / math.sqrt(2))) / 2 for g in gate.tolist()]
    np.testing.assert_allclose(output, expected, atol=1e-6)


@pytest.mark.parametrize("padding_before, rows", [(1, [0, 2, 4]), (0, [1, 3, 5])])
def test_strided_convolutions_begin_where_diffusers_do(padding_before, rows):
    """The middle tap of output row i lies on input row 2i in the U-Net, 2i + 1 in the VAE."""
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[1, 1] = 1
    x = jnp.arange(36.0).reshape(1, 6, 6, 1)
    variables = {"params": {"conv": {"kernel": kernel, "bias": jnp.zeros(1)}}}
    output = Downsample2D(1, padding_before).apply(variables, x)
    np.testing.assert_array_equal(output, x[:, rows][:, :, rows])


def test_nearest_takes_the_row_above():
    x = jnp.arange(3.0).reshape(1, 3, 1, 1)
    rows = nearest(x, (5, 2))
    np.testing.assert_array_equal(rows[0, :, 0, 0], [0, 0, 1, 1, 2])
    np.testing.assert_array_equal(nearest(x, (6, 2))[0, :, 1, 0], [0, 0, 1, 1, 2, 2])


def test_attention_head_dim_is_the_number_of_heads():
    """Two heads of eight channels by hand, float64; eight heads of two would not be it."""
    params = unet("v2")[1]["down_blocks_0"]["attentions_0"]["transformer_blocks_0"]["attn2"]
    x, context = drawn_input("tokens", (2, 5, 16)), unet_inputs("v2")[2]
    q, k, v = (
        (of @ params[name]["kernel"].astype(np.float64)).reshape(2, -1, 2, 8)
        for name, of in (("to_q", x), ("to_k", context), ("to_v", context))
    )
    weights = np.exp(np.einsum("blhc,bshc->bhls", q, k) / math.sqrt(8))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed = np.einsum("bhls,bshc->blhc", weights, v).reshape(2, 5, 16)
    expected = mixed @ params["to_out_0"]["kernel"] + params["to_out_0"]["bias"]
    assert relative_error(Attention(2).apply({"params": params}, x, context), expected) < 1e-5
    assert relative_error(Attention(8).apply({"params": params}, x, context), expected) > 1e-2


@pytest.mark.parametrize(
    "network, count", [(V15, 859_520_964), (V21, 865_910_724)], ids=["v1.5", "v2.1"]
)
def test_parameter_counts_of_the_released_networks(network, count):
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(network))) == count


def test_bfloat16_and_v_prediction_of_a_denoiser(golden):
    mapping = {"name": "unet2d_condition", "prediction_type": "v_prediction"} | V2
    denoiser = build_denoiser(mapping, dtype="bfloat16")
    params, (x_t, _, context) = unet("v2")[1], unet_inputs("v2")
    level = denoiser.schedule.level(jnp.array([999, 20]))
    x0 = once(denoiser.denoise)(params, x_t, level, context)
    assert x0.dtype == jnp.float32
    alpha, sigma = (value[:, None, None, None] for value in (level.alpha, level.sigma))
    raw = (alpha * x_t - x0) / sigma
    assert 1e-4 < relative_error(raw, golden("diffusers")["v2/output"]) < 4e-2
    shapes = jax.eval_shape(denoiser.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_remat_keeps_less_and_changes_nothing():
    options = V2 | {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["UpBlock2D"]}
    options |= {"block_out_channels": [16], "attention_head_dim": 2}
    x_t, time, context = unet_inputs("v2")
    kept, gradients = {}, {}
    for remat in ("none", "full", "dots"):
        network = build_network({"name": "unet2d_condition"} | options, remat=remat)

        def loss(params, network=network):
            return jnp.sum(network.apply({"params": params}, x_t, time, context) * x_t)

        params = drawn_params(network)
        residuals = jax.tree.leaves(jax.eval_shape(lambda p, f=loss: jax.vjp(f, p)[1], params))
        kept[remat] = sum(math.prod(leaf.shape) for leaf in residuals)
        if remat != "dots":
            gradients[remat] = once(jax.grad(loss))(params)
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    # What is kept besides the weights, which are kept in any case.
    assert kept["full"] - weights < 0.5 * (kept["dots"] - weights)
    assert kept["dots"] - weights < 0.5 * (kept["none"] - weights)
    errors = jax.tree.map(relative_error, gradients["full"], gradients["none"])
    assert max(jax.tree.leaves(errors)) < 1e-5


def test_the_denoiser_knows_its_schedule():
    mapping = {"name": "unet2d_condition"} | V2 | {"beta_end": 0.02, "num_train_timesteps": 10}
    denoiser = build_denoiser(mapping)
    assert denoiser.sample_shape == (16, 16, 4) and denoiser.num_classes == 0
    assert denoiser.cond_shape == (77, 20)
    betas = np.linspace(0.00085**0.5, 0.02**0.5, 10) ** 2
    np.testing.assert_allclose(denoiser.schedule.alphas, np.cumprod(1 - betas) ** 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_out_channels": [32, 0]}, r"block_out_channels is \(32, 0\); expected 4 to"),
        ({"block_out_channels": []}, r"block_out_channels is \(\); expected 4 to"),
        ({"block_out_channels": [16] * 17}, "block_out_channels has 17 levels; expected 1 to 16"),
        ({"block_out_channels": [16, 32, 32]}, "down_block_types is .*; expected 3 of CrossAttnD"),
        (
            {"block_out_channels": [16, 30]},
            "has 30; expected a multiple of 8: norm_num_groups is 4",
        ),
        ({"block_out_channels": [16, 32], "attention_head_dim": [2, 5]}, "of 20: .* 5 heads"),
        ({"block_out_channels": [5, 5], "attention_head_dim": 1, "norm_num_groups": 1}, "even"),
        ({"attention_head_dim": [2]}, r"attention_head_dim is \[2\]; expected one number, or 2"),
        ({"attention_head_dim": 0}, "attention_head_dim is 0; expected 1 to"),
        ({"attention_head_dim": None}, r"attention_head_dim is None; expected int \| Sequence"),
        ({"up_block_types": ["UpBlock2D"] * 4}, "up_block_types is .*; expected 2 of CrossAttnUp"),
        ({"down_block_types": ["AttnDownBlock2D"] * 2}, "AttnDownBlock2D.* and DownBlock2D"),
        ({"down_block_types": [1, 2, 3]}, r"down_block_types is \[1, 2, 3\]; expected Sequence"),
        ({"layers_per_block": 10**9}, "layers_per_block is 1000000000; expected 1 to 64"),
        ({"norm_eps": math.nan}, "norm_eps is nan; expected 0.0 to 1.0"),
        ({"freq_shift": 2}, "freq_shift is 2; expected 0 to 1"),
        ({"sample_size": None}, "sample_size is None; expected int"),
        ({"act_fn": "silu"}, "no option 'act_fn'"),
        ({"remat": "full"}, "no option 'remat'"),
        ({"prediction_type": "x0"}, "'x0'; expected one of epsilon, v_prediction, sample"),
        ({"beta_start": 0.02}, "beta_start is 0.02; expected at most beta_end, 0.012"),
        ({"beta_end": math.nan}, "beta_end is nan; expected 1e-08 to 0.5"),
        ({"num_train_timesteps": 1}, "num_train_timesteps is 1; expected 2 to 100000"),
        ({"out_channels": 8}, "makes 8 channels of 4; expected in_channels and out_channels equal"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        build_denoiser({"name": "unet2d_condition"} | V2 | options)


def test_bad_names_policies_and_shapes_are_refused():
    with pytest.raises(UserError, match="remat is 'some'; expected one of none, full, dots"):
        build_denoiser(V15, remat="some")
    with pytest.raises(UserError, match="expected none, network mlp knows no other"):
        build_denoiser({"name": "mlp", "dim": 2}, remat="full")
    with pytest.raises(UserError, match="autoencoder_kl denoises nothing; expected one of songun"):
        build_denoiser({"name": "autoencoder_kl"})
    network, _ = unet("v2")
    x_t, time, context = unet_inputs("v2")
    for inputs, message in (
        ((x_t[..., :3], time, context), r"input has shape \(2, 5, 7, 3\); expected \[B, h, w, 4\]"),
        ((x_t, time, context[..., :8]), r"context has shape .*; expected \[2, L, 20\]"),
        ((x_t, time, context[:1]), r"context has shape \(1, 7, 20\); expected \[2, L, 20\]"),
    ):
        with pytest.raises(UserError, match=message):
            jax.eval_shape(network.init, jax.random.key(0), *inputs)
