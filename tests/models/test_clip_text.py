"""CLIP's text tower against transformers, and its refusals."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_weights import draw_parameters, drawn_params, params_of, relative_error

from dmd_jax.errors import UserError
from dmd_jax.models.clip.blocks import LayerOptions
from dmd_jax.models.clip.text import CLIPText, check_tokens

TOLERANCE = 5e-5  # of the largest magnitude
SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 72,
    "projection_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 10,
}
V1 = {"hidden_act": "quick_gelu", "eos_token_id": 2}
V2 = {"hidden_act": "gelu", "eos_token_id": 40}
# Each row has the largest token once and not last, 40 elsewhere and again as padding, and 2.
TOKENS = np.array([[1, 40, 2, 59, 7, 40, 40, 40], [1, 2, 58, 3, 40, 9, 40, 40]], np.int32)


@pytest.mark.torch
@pytest.mark.parametrize("options", [V1, V2], ids=["v1.5", "v2"])
def test_hidden_states_and_features_match_pytorch(options):
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    theirs = draw_parameters(CLIPTextModelWithProjection(CLIPTextConfig(**SMALL, **options)))
    network = CLIPText(**SMALL, **options, with_projection=True)
    params = params_of(theirs, network, without="text_model.")
    ours = jax.jit(network.apply)({"params": params}, TOKENS)
    tokens = torch.from_numpy(TOKENS).long()
    with torch.no_grad():
        expected = theirs(tokens, output_hidden_states=True)
        pooled = theirs.text_model(tokens).pooler_output
    assert len(expected.hidden_states) == 3
    assert relative_error(ours.last_hidden, expected.last_hidden_state) < TOLERANCE
    assert relative_error(ours.penultimate, expected.hidden_states[-2]) < TOLERANCE
    assert relative_error(ours.pooled, pooled) < TOLERANCE
    assert relative_error(ours.projected, expected.text_embeds) < TOLERANCE


@pytest.mark.torch
def test_defaults_are_those_of_the_configuration_files():
    """A config.json need not have the keys whose value is the default."""
    from transformers import CLIPTextConfig

    theirs = CLIPTextConfig()
    options = (*SMALL, *V1, "layer_norm_eps")
    assert {o: getattr(CLIPText(), o) for o in options} == {o: getattr(theirs, o) for o in options}


@pytest.mark.parametrize("eos_token_id, places", [(2, [3, 2]), (40, [1, 4]), (50, [0, 0])])
def test_where_a_prompt_ends(eos_token_id, places):
    network = CLIPText(**SMALL | {"num_hidden_layers": 1}, eos_token_id=eos_token_id)
    output = jax.jit(network.apply)({"params": drawn_params(network)}, TOKENS)
    np.testing.assert_array_equal(
        output.pooled, output.last_hidden[jnp.arange(2), jnp.array(places)]
    )
    assert output.projected is None


def test_without_its_branches_it_is_the_norm_of_the_embeddings():
    network = CLIPText(**SMALL)
    params = drawn_params(network)
    for layer in params["encoder"].values():
        for last in (layer["self_attn"]["out_proj"], layer["mlp"]["fc2"]):
            last.update({name: np.zeros_like(leaf) for name, leaf in last.items()})
    tables = {name: leaf["embedding"] for name, leaf in params["embeddings"].items()}
    x = tables["token_embedding"][TOKENS] + tables["position_embedding"][: TOKENS.shape[1]]
    x = x.astype(np.float64)
    centred = x - x.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    final = params["final_layer_norm"]
    output = jax.jit(network.apply)({"params": params}, TOKENS)
    np.testing.assert_allclose(output.penultimate, x, rtol=0, atol=1e-6)
    expected = normed * final["scale"] + final["bias"]
    np.testing.assert_allclose(output.last_hidden, expected, rtol=0, atol=1e-5)


def test_norms_keep_their_precision_far_from_zero():
    norm = LayerOptions.of(CLIPText(**SMALL)).norm("norm")
    x = jax.random.normal(jax.random.key(0), (4, 32))
    variables = {"params": {"scale": jnp.ones(32), "bias": jnp.zeros(32)}}
    np.testing.assert_allclose(norm.apply(variables, x + 1000), norm.apply(variables, x), atol=5e-4)


def test_a_token_has_no_influence_on_those_before_it():
    network = CLIPText(**SMALL)
    params = drawn_params(network)
    apply = jax.jit(network.apply)
    changed = TOKENS.copy()
    changed[:, 5] = 33
    first, second = (apply({"params": params}, tokens).last_hidden for tokens in (TOKENS, changed))
    np.testing.assert_array_equal(first[:, :5], second[:, :5])
    assert np.abs(first - second)[:, 5:].max(axis=-1).min() > 1e-3


def test_bfloat16_is_near_float32():
    wide, narrow = (CLIPText(**SMALL, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    params = drawn_params(wide)
    expected, actual = (jax.jit(n.apply)({"params": params}, TOKENS) for n in (wide, narrow))
    assert actual.last_hidden.dtype == actual.pooled.dtype == jnp.bfloat16
    error = np.abs(np.asarray(actual.last_hidden, np.float32) - expected.last_hidden)
    assert error.max() < 0.05 * np.abs(expected.last_hidden).max()


@pytest.mark.parametrize(
    "options, released",
    [
        # Stable Diffusion v1.5's and v2's text encoders.
        ({"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}, 123_060_480),
        (
            {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 23,
                "num_attention_heads": 16,
            },
            340_387_840,
        ),
    ],
)
def test_parameter_counts(options, released):
    network = CLIPText(**options)
    shapes = jax.eval_shape(network.init, jax.random.key(0), *network.example_inputs())
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == released


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; expected one of quick_gelu, gelu"),
        ({"hidden_size": 30}, "hidden_size is 30; expected a multiple of num_attention_heads, 4"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; expected 1 to 256"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; expected 1 to 1024"),
        ({"vocab_size": -1}, "CLIPText vocab_size is -1; expected 1 to 10000000"),
        ({"eos_token_id": -1}, "eos_token_id is -1; expected 0 to 10000000"),
        ({"layer_norm_eps": math.nan}, "layer_norm_eps is nan; expected more than 0 and below 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        CLIPText(**SMALL | options)


@pytest.mark.parametrize(
    "tokens", [np.zeros((1, 11), int), np.zeros((1, 0), int), np.zeros(5, int), np.zeros((1, 5))]
)
def test_what_are_no_tokens_is_refused(tokens):
    network = CLIPText(**SMALL)
    message = r"CLIPText tokens are .* expected integers \[B, L\] with L from 1 to 10"
    with pytest.raises(UserError, match=message):
        jax.eval_shape(network.init, jax.random.key(0), tokens)


def test_tokens_outside_the_vocabulary_are_refused():
    check_tokens(TOKENS, 60)
    check_tokens(np.zeros((0, 77), np.int32), 60)
    message = r"token 59 at \[0, 3\] is outside the vocabulary; expected 0 to 58, .* being 59"
    with pytest.raises(UserError, match=message):
        check_tokens(TOKENS, 59)
    with pytest.raises(UserError, match=r"token -1 at \[1, 0\] \(and 1 more\) is outside"):
        check_tokens(np.array([[0, 5], [-1, 60]]), 60)
    with pytest.raises(UserError, match="tokens are float64; expected integers"):
        check_tokens(np.zeros((1, 77)), 60)
