"""CLIP's text tower (arXiv 2103.00020), Stable Diffusion's text encoder.

Parameters are named after the published state dicts, without their `text_model.`:
`encoder.layers.0.self_attn.q_proj.weight` there is
`params["encoder"]["layers_0"]["self_attn"]["q_proj"]["kernel"]` here.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax.errors import UserError
from dmd_jax.method.precision import at_own_precision
from dmd_jax.models.clip.blocks import CLIPEncoder, LayerOptions, check_clip

_SIZES = {
    "vocab_size": (1, 10_000_000),
    "max_position_embeddings": (1, 1_000_000),
    "eos_token_id": (0, 10_000_000),
}
# Published configurations say 2 where the vocabulary's largest id ends a prompt.
_LARGEST_ENDS = 2


class CLIPTextOutput(NamedTuple):
    """What the text tower makes of tokens, in the compute dtype."""

    last_hidden: jax.Array  # [B, L, hidden_size], after the final norm
    penultimate: jax.Array  # [B, L, hidden_size], after the last layer but one, no norm
    pooled: jax.Array  # [B, hidden_size], last_hidden where the prompt ends
    projected: jax.Array | None  # [B, projection_dim], the text's features; None without projection


class CLIPText(nn.Module):
    """The text tower; the fields have the names and defaults of transformers' config.json.

    Stable Diffusion v1.5: hidden_size 768, intermediate_size 3072, 12 layers, 12 heads,
    quick_gelu, eos_token_id 2. v2.x: 1024, 4096, 23 layers, 16 heads, gelu.

    Raises:
      UserError: an option that is impossible.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"  # or "gelu", the exact one
    layer_norm_eps: float = 1e-5
    # A prompt ends at the first such token, or at its first token if there is none. 2 stands for
    # the largest token of each prompt, whichever that is.
    eos_token_id: int = 49407
    # Whether there is a text_projection, which the CLIP score needs and Stable Diffusion does not.
    # No key of config.json: its projection_dim is there in both cases.
    with_projection: bool = False
    dtype: jnp.dtype = jnp.float32  # of the computation; parameters are float32
    precision: str = "highest"  # of float32 products, see dmd_jax.method.precision

    def __post_init__(self):
        super().__post_init__()
        check_clip(self, _SIZES)

    def example_inputs(self) -> tuple[jax.Array]:
        """Zeros of the shape that `init` needs: tokens [1, max_position_embeddings]."""
        return (jnp.zeros((1, self.max_position_embeddings), jnp.int32),)

    @nn.compact
    @at_own_precision
    def __call__(self, tokens: jax.Array) -> CLIPTextOutput:
        """The text's hidden states and features.

        Args:
          tokens: integers [B, L], each in [0, vocab_size), L at most max_position_embeddings. One
            outside is not noticed here: see `check_tokens`. Padding is read like any token, which
            Stable Diffusion relies on.

        Raises:
          UserError: tokens of another shape or type.
        """
        length = self.max_position_embeddings
        integers = jnp.issubdtype(tokens.dtype, jnp.integer)
        if not integers or tokens.ndim != 2 or not 1 <= tokens.shape[1] <= length:
            raise UserError(
                f"CLIPText tokens are {tokens.dtype} of shape {tokens.shape}; "
                f"expected integers [B, L] with L from 1 to {length}"
            )
        x = _Embeddings(self.vocab_size, length, self.hidden_size, self.dtype, name="embeddings")(
            tokens
        )
        options = LayerOptions.of(self)
        encoder = CLIPEncoder(self.num_hidden_layers, options, causal=True, name="encoder")
        x, penultimate = encoder(x)
        last_hidden = options.norm("final_layer_norm")(x)
        pooled = jnp.take_along_axis(last_hidden, self._end(tokens)[:, None, None], axis=1)[:, 0]
        projected = None
        if self.with_projection:
            projected = nn.Dense(
                self.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection"
            )(pooled)
        return CLIPTextOutput(last_hidden, penultimate, pooled, projected)

    def _end(self, tokens: jax.Array) -> jax.Array:
        """[B, L] -> [B]: where each prompt ends."""
        if self.eos_token_id == _LARGEST_ENDS:
            return tokens.argmax(axis=1)
        return (tokens == self.eos_token_id).argmax(axis=1)


class _Embeddings(nn.Module):
    vocab_size: int
    length: int
    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        def table(size, name):
            return nn.Embed(size, self.features, dtype=self.dtype, name=name)

        positions = table(self.length, "position_embedding")(jnp.arange(tokens.shape[1]))
        return table(self.vocab_size, "token_embedding")(tokens) + positions


def check_tokens(tokens: np.ndarray, vocab_size: int) -> None:
    """Refuses tokens that the text encoder does not know.

    On a device no error can be raised: one that is too large makes NaN, a negative one counts from
    the vocabulary's end.

    Args:
      tokens: integers of any shape, on the host.
      vocab_size: the text encoder's.

    Raises:
      UserError: tokens that are no integers, or one outside [0, vocab_size); the first is named.
    """
    tokens = np.asarray(tokens)
    if not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"tokens are {tokens.dtype}; expected integers")
    outside = np.argwhere((tokens < 0) | (tokens >= vocab_size))
    if len(outside):
        place = tuple(map(int, outside[0]))
        more = f" (and {len(outside) - 1} more)" if len(outside) > 1 else ""
        raise UserError(
            f"token {tokens[place]} at {list(place)}{more} is outside the vocabulary; expected "
            f"0 to {vocab_size - 1}, the text encoder's vocab_size being {vocab_size}"
        )
