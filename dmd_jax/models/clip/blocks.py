"""What CLIP's two towers share: the encoder of pre-norm transformer layers, and refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.models.edm.unet import check_sizes
from dmd_jax.models.ops.attention import attend
from dmd_jax.models.ops.layers import gelu, layer_norm


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": gelu,
}
# Configuration files come from outside, and a loop over a billion layers would never end.
_SIZES = {
    "hidden_size": (1, 65_536),
    "intermediate_size": (1, 1_000_000),
    "projection_dim": (1, 65_536),
    "num_hidden_layers": (1, 256),
    "num_attention_heads": (1, 1024),
}


def check_clip(network: nn.Module, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Raises a UserError that names the first impossible option of a tower.

    Args:
      sizes: the least and the most of the options that only this tower has.
    """
    check_sizes(network, _SIZES | sizes)
    name = type(network).__name__
    if network.hidden_size % network.num_attention_heads:
        raise UserError(
            f"{name} hidden_size is {network.hidden_size}; expected a multiple of "
            f"num_attention_heads, {network.num_attention_heads}"
        )
    if network.hidden_act not in ACTIVATIONS:
        raise UserError(
            f"{name} hidden_act is {network.hidden_act!r}; expected one of {', '.join(ACTIVATIONS)}"
        )
    if not 0 < network.layer_norm_eps < 1:
        raise UserError(
            f"{name} layer_norm_eps is {network.layer_norm_eps}; expected more than 0 and below 1"
        )


class LayerOptions(NamedTuple):
    """What the layers of both towers depend on."""

    intermediate_size: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float
    dtype: jnp.dtype

    @classmethod
    def of(cls, network: nn.Module) -> LayerOptions:
        """Those of a tower, whose fields have these names."""
        return cls(*(getattr(network, field) for field in cls._fields))

    def norm(self, name: str) -> nn.LayerNorm:
        """A layer norm of this epsilon and dtype."""
        return layer_norm(name=name, dtype=self.dtype, epsilon=self.layer_norm_eps)


class CLIPEncoder(nn.Module):
    """The layers of a tower."""

    num_hidden_layers: int
    options: LayerOptions
    causal: bool  # each position attends to itself and those before it

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [B, L, D] -> what the last layer puts out and what it was given, [B, L, D] each."""
        before = x
        for index in range(self.num_hidden_layers):
            before, x = x, _Layer(self.options, self.causal, name=f"layers_{index}")(x)
        return x, before


class _Layer(nn.Module):
    """Self-attention and a perceptron, each behind a layer norm and added to the stream."""

    options: LayerOptions
    causal: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        attention = _SelfAttention(self.options, self.causal, name="self_attn")
        x = x + attention(self.options.norm("layer_norm1")(x))
        perceptron = _Perceptron(self.options, name="mlp")
        return x + perceptron(self.options.norm("layer_norm2")(x))


class _SelfAttention(nn.Module):
    options: LayerOptions
    causal: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        heads = self.options.num_attention_heads

        def project(x, name):
            return nn.Dense(channels, dtype=self.options.dtype, name=name)(x)

        def split(x):
            return x.reshape(*x.shape[:2], heads, channels // heads)

        q, k, v = (split(project(x, f"{which}_proj")) for which in "qkv")
        return project(attend(q, k, v, causal=self.causal).reshape(x.shape), "out_proj")


class _Perceptron(nn.Module):
    options: LayerOptions

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, dtype = self.options.intermediate_size, self.options.dtype
        hidden = ACTIVATIONS[self.options.hidden_act](nn.Dense(width, dtype=dtype, name="fc1")(x))
        return nn.Dense(x.shape[-1], dtype=dtype, name="fc2")(hidden)
