"""Teachers of latents with text: Stable Diffusion's UNet, text encoder and decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.models import Denoiser, abstract_params
from dmd_jax.teachers.teacher import Frozen, Teacher, Tokens
from dmd_jax.text_to_image import image_decoder, text_encoder


def stable_diffusion_teacher(
    denoiser: Denoiser,
    text_encoder_network: Mapping[str, Any],
    decoder_network: Mapping[str, Any],
    *,
    decoder: str,
    dtype: str = "float32",
    precision: str = "highest",
) -> Teacher:
    """The teacher around a UNet that is conditioned on a text encoder's last hidden state.

    Frozen arrays: "network"; "text_encoder"; "null" [1, L, D], the empty prompt's condition; and
    "decoders", one tree for each name. Tokens: "tokens" int32 [B, L].

    Args:
      text_encoder_network, decoder_network: as for models.build_network.
      decoder: the decoder's name among "decoders".
      dtype, precision: that the text encoder and the decoder compute in.

    Raises:
      UserError: the text encoder's condition is not what the UNet takes.
    """
    encode_tokens = text_encoder(text_encoder_network, dtype=dtype, precision=precision)
    decode_latents = image_decoder(decoder_network, dtype=dtype, precision=precision)
    tokens = {"tokens": jax.ShapeDtypeStruct(denoiser.cond_shape[:1], jnp.int32)}
    one = jax.ShapeDtypeStruct((1, denoiser.cond_shape[0]), jnp.int32)
    cond = jax.eval_shape(encode_tokens, abstract_params(text_encoder_network), one)
    if cond.shape[1:] != denoiser.cond_shape:
        raise UserError(
            f"the text encoder gives {cond.shape[1:]} for a prompt; expected "
            f"{denoiser.cond_shape}, what the network is conditioned on"
        )

    def encode(frozen: Frozen, rows: Tokens) -> jax.Array:
        return encode_tokens(frozen["text_encoder"], rows["tokens"])

    def decode(frozen: Frozen, x0: jax.Array) -> jax.Array:
        return decode_latents(frozen["decoders"][decoder], x0)

    return Teacher(
        denoise=denoiser.denoise,
        schedule=denoiser.schedule,
        sample_shape=denoiser.sample_shape,
        tokens=tokens,
        encode=encode,
        null=lambda frozen: frozen["null"],
        decode=decode,
        draw_tokens=None,
    )
