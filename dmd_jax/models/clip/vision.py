"""CLIP's vision tower (arXiv 2103.00020, 2010.11929), for the CLIP score.

Parameters are named after the published state dicts, without their `vision_model.`, and with
their spelling: `pre_layrnorm.weight` there is `params["pre_layrnorm"]["scale"]` here.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.method.precision import at_own_precision
from dmd_jax.models.clip.blocks import CLIPEncoder, LayerOptions, check_clip

_SIZES = {"num_channels": (1, 1024), "image_size": (1, 8192), "patch_size": (1, 8192)}


class CLIPVisionOutput(NamedTuple):
    """What the vision tower makes of images, in the compute dtype."""

    last_hidden: jax.Array  # [B, 1 + patches, hidden_size], no norm; the class token comes first
    pooled: jax.Array  # [B, hidden_size], the class token after the last norm
    projected: jax.Array  # [B, projection_dim], the image's features


class CLIPVision(nn.Module):
    """The vision tower; the fields have the names and defaults of transformers' config.json.

    ViT-L/14: hidden_size 1024, intermediate_size 4096, projection_dim 768, 24 layers, 16 heads,
    patch_size 14, quick_gelu. ViT-H/14: 1280, 5120, 1024, 32, 16, 14, gelu. ViT-g/14: 1408, 6144,
    1024, 40, 16, 14, gelu. ViT-bigG/14: 1664, 8192, 1280, 48, 16, 14, gelu.

    Raises:
      UserError: an option that is impossible.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224  # height = width
    patch_size: int = 32
    hidden_act: str = "quick_gelu"  # or "gelu", the exact one
    layer_norm_eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32  # of the computation; parameters are float32
    precision: str = "highest"  # of float32 products, see dmd_jax.method.precision

    def __post_init__(self):
        super().__post_init__()
        check_clip(self, _SIZES)
        if self.patch_size > self.image_size:
            raise UserError(
                f"CLIPVision patch_size is {self.patch_size}; expected at most image_size, "
                f"{self.image_size}"
            )

    def example_inputs(self) -> tuple[jax.Array]:
        """Zeros of the shape that `init` needs: one image."""
        return (jnp.zeros((1, self.image_size, self.image_size, self.num_channels)),)

    @nn.compact
    @at_own_precision
    def __call__(self, images: jax.Array) -> CLIPVisionOutput:
        """The images' hidden states and features.

        Args:
          images: [B, image_size, image_size, num_channels], with CLIP's mean subtracted and
            divided by its standard deviation.

        Raises:
          UserError: images of another shape.
        """
        shape = (self.image_size, self.image_size, self.num_channels)
        if images.shape[1:] != shape:
            raise UserError(
                f"CLIPVision images have shape {images.shape}; expected [B, "
                f"{', '.join(map(str, shape))}]"
            )
        x = _Embeddings(self.patch_size, self.hidden_size, self.dtype, name="embeddings")(images)
        options = LayerOptions.of(self)
        x = options.norm("pre_layrnorm")(x)
        encoder = CLIPEncoder(self.num_hidden_layers, options, causal=False, name="encoder")
        last_hidden, _ = encoder(x)
        pooled = options.norm("post_layernorm")(last_hidden[:, 0])
        projected = nn.Dense(
            self.projection_dim, use_bias=False, dtype=self.dtype, name="visual_projection"
        )(pooled)
        return CLIPVisionOutput(last_hidden, pooled, projected)


class _Embeddings(nn.Module):
    patch_size: int
    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        side = (self.patch_size, self.patch_size)
        patches = nn.Conv(
            self.features,
            side,
            strides=side,
            padding="VALID",
            use_bias=False,
            dtype=self.dtype,
            name="patch_embedding",
        )(images)
        patches = patches.reshape(len(images), -1, self.features)
        init = nn.initializers.normal(self.features**-0.5)
        token = self.param("class_embedding", init, (self.features,), jnp.float32).astype(
            self.dtype
        )
        token = jnp.broadcast_to(token, (len(images), 1, self.features))
        x = jnp.concatenate([token, patches], axis=1)
        positions = nn.Embed(x.shape[1], self.features, dtype=self.dtype, name="position_embedding")
        return x + positions(jnp.arange(x.shape[1]))
