"""Teachers of latents with text: Stable Diffusion's UNet, text encoder and decoder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax.errors import UserError
from dmd_jax.method import discrete_samplers
from dmd_jax.method.types import Denoise, Params
from dmd_jax.models import (
    Denoiser,
    abstract_params,
    build_denoiser,
    build_network,
    complete,
    guided,
)
from dmd_jax.models.clip.text import check_tokens
from dmd_jax.storage.weights import Weights, params_sha256
from dmd_jax.teachers.family import (
    GENERATORS,
    Family,
    Networks,
    Pipeline,
    generator_sampler,
)
from dmd_jax.teachers.teacher import Frozen, Sample, Teacher, Tokens
from dmd_jax.teachers.text_parts import (
    DECODERS,
    load_decoder,
    load_sampling,
    load_text_encoder,
    parts_folder,
)
from dmd_jax.teachers.tokenizer import load_tokenizer

_NETWORK = "unet2d_condition"
_MULTI_STEP = {
    "pndm": discrete_samplers.pndm,
    "ddim": discrete_samplers.ddim,
    "dpm++": discrete_samplers.dpm_solver_pp,
    "unipc": discrete_samplers.unipc,
}
_SAMPLERS = (*GENERATORS, *_MULTI_STEP)
# As Stable Diffusion's folders have it in their scheduler.json.
_SAMPLING = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}


def stable_diffusion_teacher(
    denoiser: Denoiser,
    text_encoder_network: Mapping[str, Any],
    decoder_network: Mapping[str, Any] | None,
    *,
    decoder: str | None,
    dtype: str = "float32",
    precision: str = "highest",
    sampling: Mapping[str, Any] | None = None,
) -> Teacher:
    """The teacher around a UNet that is conditioned on a text encoder's last hidden state.

    Frozen arrays: "network"; "text_encoder"; "null" [1, L, D], the empty prompt's condition; and
    "decoders", one tree for each name. Tokens: "tokens" int32 [B, L]. Samplers: one-step and
    few-step, without guidance, as a generator has its teacher's in it; pndm, ddim, dpm++ and unipc.

    Args:
      text_encoder_network, decoder_network: as for models.build_network.
      decoder: the decoder's name among "decoders". It and its network are None where nothing is
        decoded, as in `compile` of a sampler.
      dtype, precision: that the text encoder and the decoder compute in.
      sampling: what scheduler.json says of timesteps; None for Stable Diffusion's own.

    Raises:
      UserError: the text encoder's condition is not what the UNet takes.
    """
    encode_tokens = text_encoder(text_encoder_network, dtype=dtype, precision=precision)
    tokens = {"tokens": jax.ShapeDtypeStruct(denoiser.cond_shape[:1], jnp.int32)}
    one = jax.ShapeDtypeStruct((1, denoiser.cond_shape[0]), jnp.int32)
    cond = jax.eval_shape(encode_tokens, abstract_params(text_encoder_network), one)
    if cond.shape[1:] != denoiser.cond_shape:
        raise UserError(
            f"the text encoder gives {cond.shape[1:]} for a prompt; expected "
            f"{denoiser.cond_shape}, what the network is conditioned on"
        )
    text = complete(text_encoder_network)

    def encode(frozen: Frozen, rows: Tokens) -> jax.Array:
        return encode_tokens(frozen["text_encoder"], rows["tokens"])

    def decode(frozen: Frozen, x0: jax.Array) -> jax.Array:
        decode_latents = image_decoder(decoder_network or {}, dtype=dtype, precision=precision)
        return decode_latents(frozen["decoders"][decoder], x0)

    return Teacher(
        denoise=denoiser.denoise,
        schedule=denoiser.schedule,
        features=denoiser.features,
        sample_shape=denoiser.sample_shape,
        tokens=tokens,
        encode=encode,
        null=lambda frozen: frozen["null"],
        decode=decode,
        draw_tokens=None,
        takes="text",
        samplers={
            name: functools.partial(_sampler, denoiser, sampling or _SAMPLING, name)
            for name in _SAMPLERS
        },
        limits={"tokens": text["vocab_size"]},
        check=functools.partial(_checked, text["vocab_size"], text["max_position_embeddings"]),
    )


def text_encoder(
    network: Mapping[str, Any], *, dtype: str = "float32", precision: str = "highest"
) -> Callable[[Params, jax.Array], jax.Array]:
    """(params, tokens [B, L] int32) -> [B, L, D] float32: the last hidden state, after the norm.

    That is what Stable Diffusion's UNet is conditioned on.
    """
    module = build_network(network, dtype=dtype, precision=precision)

    def encode(params: Params, tokens: jax.Array) -> jax.Array:
        return module.apply({"params": params}, tokens).last_hidden.astype(jnp.float32)

    return encode


def image_decoder(
    network: Mapping[str, Any], *, dtype: str = "float32", precision: str = "highest"
) -> Callable[[Params, jax.Array], jax.Array]:
    """(params, latents [B, h, w, C]) -> images [B, 8h, 8w, 3] float32, in [-1, 1] but not clipped.

    The latents are the UNet's: the autoencoder's scale and shift are undone here.
    """
    module = build_network(network, dtype=dtype, precision=precision)
    shift = module.shift_factor or 0.0

    def decode(params: Params, latents: jax.Array) -> jax.Array:
        z = latents.astype(jnp.float32) / module.scaling_factor + shift
        return module.apply({"params": params}, z, method="decode")

    return decode


def _sampler(
    denoiser: Denoiser,
    sampling: Mapping[str, Any],
    name: str,
    *,
    num_steps: int,
    guidance: float = 1.0,
    **options: Any,
) -> Sample:
    """(frozen, z, cond, key) -> x0, by one of _SAMPLERS, none of which has options."""
    if options:
        raise UserError(f"the {name} sampler takes no {', '.join(options)}")
    denoise = guided(denoiser.denoise, guidance)
    if name in GENERATORS:
        if guidance != 1:
            raise UserError(
                f"guidance {guidance:g} with the sampler {name}; expected 1: a generator has "
                "its teacher's guidance in it"
            )
        return generator_sampler(denoiser, 1 if name == "one-step" else num_steps)
    given = {
        "schedule": denoiser.schedule,
        "num_steps": num_steps,
        "timestep_spacing": sampling["timestep_spacing"],
        "steps_offset": sampling["steps_offset"],
    }
    if name in ("pndm", "ddim"):  # the others end at the clean latents, as by diffusers' default
        given["final_alpha_one"] = sampling["set_alpha_to_one"]
    function = functools.partial(_MULTI_STEP[name], **given)
    _check_steps(function)

    def sample(frozen: Frozen, z: jax.Array, cond: jax.Array, key: jax.Array) -> jax.Array:
        null = None if guidance == 1 else frozen["null"]
        return function(denoise, frozen["network"], z, (cond, null))

    return sample


def _check_steps(function: Callable) -> None:
    """Refuses impossible timesteps before anything is compiled or written."""
    denoise: Denoise = lambda params, x_t, level, cond: x_t  # noqa: E731
    jax.eval_shape(
        lambda z: function(denoise, None, z, None), jax.ShapeDtypeStruct((1, 1), jnp.float32)
    )


def _checked(vocab_size: int, longest: int, rows: Mapping[str, Any], count: int) -> Tokens:
    """The tokens [count, L] as an array."""
    if rows.keys() != {"tokens"}:
        raise UserError(f"tokens {', '.join(sorted(rows)) or 'are none'}; expected tokens alone")
    tokens = np.asarray(rows["tokens"])
    if tokens.ndim != 2 or len(tokens) != count or tokens.shape[1] > longest:
        raise UserError(
            f"tokens are of shape {tokens.shape}; expected [{count}, L], a row for each "
            f"latent, L at most {longest}"
        )
    check_tokens(tokens, vocab_size)
    return {"tokens": tokens}


def _build(networks: Networks, *, remat: str = "none", **computation: str) -> Teacher:
    ((decoder, decoder_network),) = networks.get("decoders", {None: None}).items()
    denoiser = build_denoiser(networks["network"], remat=remat, **computation)
    encoder = networks.get("text_encoder", {})
    return stable_diffusion_teacher(
        denoiser, encoder, decoder_network, decoder=decoder, **computation
    )


def _load(
    weights: Weights,
    folder: Path,
    *,
    parts: str | Path | None = None,
    decoder: str | None = None,
    dtype: str,
    precision: str,
) -> Pipeline:
    place, decoder = parts_folder(folder, parts), decoder or DECODERS[0]
    encoder, autoencoder = load_text_encoder(place), load_decoder(place, decoder)
    tokenizer, sampling = load_tokenizer(place / "tokenizer"), load_sampling(place)
    network = complete(weights.network)
    text, image = complete(encoder.network), complete(autoencoder.network)
    length, longest = tokenizer.max_length, text["max_position_embeddings"]
    if length > longest:
        raise UserError(
            f"{place}: the tokenizer makes {length} tokens; expected at most {longest}, the text "
            "encoder's max_position_embeddings"
        )
    for what, found, ours in (
        ("text encoder has hidden_size", text["hidden_size"], "cross_attention_dim"),
        ("decoder has latent_channels", image["latent_channels"], "in_channels"),
    ):
        if found != network[ours]:
            raise UserError(
                f"{place}: the {what} {found}; expected {network[ours]}, the {ours} of {folder}"
            )
    teacher = stable_diffusion_teacher(
        build_denoiser(weights.network, dtype=dtype, precision=precision),
        encoder.network,
        autoencoder.network,
        decoder=decoder,
        dtype=dtype,
        precision=precision,
        sampling=sampling,
    )
    return Pipeline(
        family=STABLE_DIFFUSION,
        teacher=teacher,
        weights=weights,
        frozen={
            "network": weights.params,
            "text_encoder": encoder.params,
            "decoders": {decoder: autoencoder.params},
        },
        identity=lambda: {
            "unet_sha256": params_sha256(weights.params),
            "text_encoder_sha256": params_sha256(encoder.params),
            "decoder_sha256": params_sha256(autoencoder.params),
        },
        tokenizer=tokenizer,
        tokens=lambda prompts: {"tokens": tokenizer.encode(prompts)},
        sampling=sampling,
    )


STABLE_DIFFUSION = Family(
    networks=(_NETWORK,),
    takes="text",
    weights_are="text-to-image weights",
    network_is="a text-to-image network",
    samplers=_SAMPLERS,
    pair_samplers=tuple(_MULTI_STEP),
    arguments=("parts", "guidance", "decoder", "height", "width"),
    defaults={"steps": 50, "batch_size": 8, "guidance": 7.5, "decoder": DECODERS[0]},
    build=_build,
    load=_load,
)
