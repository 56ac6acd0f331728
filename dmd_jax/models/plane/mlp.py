"""An MLP for points in a few dimensions (the 2-D toy of the paper's Figure 3)."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.method.precision import at_own_precision
from dmd_jax.models.edm.unet import RawNetwork
from dmd_jax.models.ops.layers import FourierEmbedding, dense, positional_embedding


class MLP(nn.Module, RawNetwork):
    """The raw network F(x; c_noise, labels) on points: `depth` hidden layers of SiLU.

    Every hidden layer gets the embedding of the noise level (and the label) added, so that
    depth does not wash it out.
    """

    dim: int  # D of the points [B, D]
    label_dim: int = 0  # number of classes; 0 is unconditional
    width: int = 128
    depth: int = 3
    embedding_type: str = "positional"  # or "fourier"
    embedding_features: int = 64
    fourier_scale: float = 1.0  # standard deviation of the Fourier frequencies, in cycles
    zero_init: bool = False  # the last layer starts at zero: the denoiser starts as c_skip x_t
    dtype: jnp.dtype = jnp.float32  # of the hidden layers; parameters are float32
    precision: str = "highest"  # of float32 products, see dmd_jax.method.precision

    def __post_init__(self):
        super().__post_init__()
        if self.embedding_type not in ("positional", "fourier"):
            raise UserError(
                f"mlp embedding_type is {self.embedding_type!r}; expected positional or fourier"
            )
        if self.embedding_features < 4 or self.embedding_features % 2:
            raise UserError(
                f"mlp embedding_features is {self.embedding_features}; "
                "expected an even number of at least 4"
            )

    @property
    def sample_shape(self) -> tuple[int]:
        return (self.dim,)

    @nn.compact
    @at_own_precision
    def __call__(
        self,
        x: jax.Array,
        c_noise: jax.Array,
        labels_onehot: jax.Array | None = None,
        *,
        deterministic: bool = True,
        bottleneck: bool = False,
    ) -> jax.Array:
        """x [B, dim], c_noise [B], labels_onehot [B, label_dim] -> [B, dim].

        `bottleneck` ends with the middle hidden layer, [B, width]. There is no dropout;
        `deterministic` makes the networks callable alike.
        """
        if self.embedding_type == "fourier":
            embedding = FourierEmbedding(
                self.embedding_features, scale=self.fourier_scale, name="map_noise"
            )
            emb = embedding(c_noise)
        else:
            emb = positional_embedding(c_noise, self.embedding_features)
        if self.label_dim:
            scaled = labels_onehot * math.sqrt(self.label_dim)
            emb = emb + dense(self.embedding_features, name="map_label")(scaled)
        emb = nn.silu(dense(self.width, name="map_layer0")(emb))

        h = x.astype(self.dtype)
        for index in range(self.depth):
            shift = dense(self.width, name=f"affine{index}")(emb).astype(self.dtype)
            h = nn.silu(nn.Dense(self.width, dtype=self.dtype, name=f"layer{index}")(h) + shift)
            if bottleneck and index == self.depth // 2:
                return h
        init = nn.initializers.zeros if self.zero_init else nn.initializers.lecun_normal()
        return nn.Dense(self.dim, dtype=self.dtype, kernel_init=init, name="out")(h)
