"""Text to image: what its distillation works with, in the latent space of its autoencoder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmd_jax import samplers
from dmd_jax.config import stages_of
from dmd_jax.data.loader import together
from dmd_jax.data.pairs import PairSource
from dmd_jax.data.prompts import TokenSource
from dmd_jax.distillation.setting import (
    Arguments,
    Distance,
    Earlier,
    Method,
    Setting,
    identity_of,
    open_pairs,
    own_batches,
)
from dmd_jax.errors import UserError
from dmd_jax.experiment import (
    check_same_network,
    computation_of,
    distance_of,
    lpips_of,
    one_of,
    prompts_of,
)
from dmd_jax.models import Denoiser, abstract_params, complete, guided
from dmd_jax.models.lpips import lpips_template
from dmd_jax.objective import Networks
from dmd_jax.text_parts import DECODERS, load_decoder, load_text_encoder, parts_folder
from dmd_jax.text_to_image import image_decoder, text_encoder
from dmd_jax.tokenizer import load_tokenizer
from dmd_jax.train_step import Batch
from dmd_jax.types import Params
from dmd_jax.weights import Weights, params_sha256


def text_method(config: ConfigDict, denoiser: Denoiser) -> Method:
    """Latents with text embeddings; the teacher alone is guided, by the empty prompt.

    The teacher's parameters are {"network", "uncond" [1, L, D], and "text_encoder" where text is
    encoded in the step}; the perceptual ones {"decoders", and "lpips" where it is used}.

    Raises:
      UserError: an impossible value, or networks that do not fit each other.
    """
    one_of(config, "text.encode", ("in_step", "ahead"))
    in_step = config.text.encode == "in_step"
    encode = text_encoder(config.text.text_encoder.to_dict(), **computation_of(config))
    encoder_params = abstract_params(config.text.text_encoder.to_dict())
    tokens = jax.ShapeDtypeStruct((1, denoiser.cond_shape[0]), jnp.int32)
    uncond = jax.eval_shape(encode, encoder_params, tokens)
    if uncond.shape[1:] != denoiser.cond_shape:
        raise UserError(
            f"config.text.text_encoder gives {uncond.shape[1:]} for a prompt; expected "
            f"{denoiser.cond_shape}, what config.network is conditioned on"
        )
    decoders = {name: config.text[name].to_dict() for name in decoder_names(config)}
    decode = {
        name: image_decoder(network, **computation_of(config)) for name, network in decoders.items()
    }
    decoder_params = {name: abstract_params(network) for name, network in decoders.items()}
    latents = jax.ShapeDtypeStruct((1, *denoiser.sample_shape), jnp.float32)
    shown = config.text.decoder
    image = jax.eval_shape(decode[shown], decoder_params[shown], latents)
    distance = distance_of(config, image.shape[1:])

    def arguments() -> Arguments:
        network = abstract_params(config.network.to_dict())
        lpips = None if distance is None else lpips_template()
        return _arguments(network, uncond, encoder_params, decoder_params, lpips, in_step=in_step)

    return Method(
        networks=_networks(denoiser, config),
        schedule=denoiser.schedule,
        sample_shape=denoiser.sample_shape,
        num_classes=0,
        network_params=lambda params: params["network"],
        condition=functools.partial(_in_step, encode) if in_step else _from_ahead,
        ahead=None if in_step else functools.partial(_ahead, encode),
        distance=functools.partial(_distance, decode, distance),
        show=lambda perceptual, samples: decode[shown](perceptual["decoders"][shown], samples),
        arguments=arguments,
        batch=functools.partial(_batch, denoiser),
    )


def text_setting(config: ConfigDict, teacher: Weights, denoiser: Denoiser) -> Setting:
    """The parts of the teacher's folder, its pairs, and prompts for fresh latents.

    Raises:
      UserError: what the config names is not there or does not fit, or a value is impossible.
    """
    parts = parts_folder(config.teacher.weights)
    encoder = load_text_encoder(parts)
    decoders = {name: load_decoder(parts, name) for name in decoder_names(config)}
    config = _with_networks(config, decoders | {"text_encoder": encoder}, parts)
    method = text_method(config, denoiser)
    tokenizer = load_tokenizer(parts / "tokenizer")
    vocabulary = complete(encoder.network)["vocab_size"]
    if tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"{parts / 'tokenizer'} has {tokenizer.vocab_size:,} tokens; expected at most the text "
            f"encoder's {vocabulary:,}"
        )
    pairs = open_pairs(
        config,
        teacher,
        sample_shape=method.sample_shape,
        num_classes=0,
        token_length=tokenizer.max_length,
    )
    for name, found, expected in (
        ("guidance", pairs.metadata.guidance, config.guidance),
        (
            "text_encoder_sha256",
            pairs.metadata.text_encoder_sha256,
            encoder_sha256 := params_sha256(encoder.params),
        ),
    ):
        if found != expected:
            raise UserError(
                f"pairs {config.pairs.folder} were made with {name} {found}; expected {expected}, "
                "that of the config and its teacher"
            )
    prompts = prompts_of(config)
    encode = jax.jit(text_encoder(encoder.network, **computation_of(config)))
    lpips_params = None if method.distance(config) is None else lpips_of(config)
    identity = identity_of(pairs, lpips_params) | {
        "prompts_sha256": prompts.metadata.prompts_sha256,
        "text_encoder_sha256": encoder_sha256,
    }
    for name, one in decoders.items():
        identity[f"{name}_sha256"] = params_sha256(one.params)
    return Setting(
        method=method,
        arguments=_arguments(
            teacher.params,
            jax.device_get(encode(encoder.params, tokenizer.encode([""]))),
            encoder.params,
            {name: one.params for name, one in decoders.items()},
            lpips_params,
            in_step=method.ahead is None,
        ),
        pairs=pairs,
        show_condition=lambda rows: jax.device_get(encode(encoder.params, rows["tokens"])),
        data=functools.partial(_data, pairs, TokenSource(prompts, tokenizer)),
        identity=identity,
    )


def _arguments(
    network: Params,
    uncond: Any,
    encoder: Params,
    decoders: dict[str, Params],
    lpips: Params | None,
    *,
    in_step: bool,
) -> Arguments:
    """The trees that text_method describes."""
    teacher = {"network": network, "uncond": uncond}
    perceptual: dict[str, Any] = {"decoders": decoders}
    if in_step:
        teacher["text_encoder"] = encoder
    if lpips is not None:
        perceptual["lpips"] = lpips
    return Arguments(teacher, perceptual, None if in_step else encoder)


def decoder_names(config: ConfigDict) -> list[str]:
    """The decoders that a run needs, by name.

    Raises:
      UserError: an unknown one.
    """
    parts = [config, *(stage for _, stage in stages_of(config))]
    for part in parts:
        one_of(part, "text.decoder", DECODERS)
    return sorted({part.text.decoder for part in parts})


def _with_networks(config: ConfigDict, found: Mapping[str, Weights], parts: Path) -> ConfigDict:
    """The config with the networks of the teacher's folder where it leaves them open.

    It is a copy: a run is gone on with by the config that it was given.
    """
    config = ConfigDict(config.to_dict())
    for name, weights in found.items():
        if config.text[name]:
            expected = config.text[name].to_dict()
            check_same_network(weights.network, expected, parts, key=f"text.{name}")
        config.text[name] = weights.network
    return config


def _networks(denoiser: Denoiser, config: ConfigDict) -> Networks:
    guide = guided(denoiser.denoise, config.guidance, at_once=config.guidance_at_once)

    def teacher(params: Any, x_t: jax.Array, level, cond) -> jax.Array:
        return guide(params["network"], x_t, level, (cond, params["uncond"]))

    return Networks(
        generate=functools.partial(samplers.one_step, denoiser.denoise, schedule=denoiser.schedule),
        teacher=teacher,
        fake_score=denoiser.denoise,
    )


def _in_step(encode: Callable, teacher_params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    encoder = teacher_params["text_encoder"]
    return encode(encoder, batch["fresh_tokens"]), encode(encoder, batch["tokens"])


def _from_ahead(teacher_params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    return batch["fresh_context"], batch["context"]


def _ahead(encode: Callable, params: Params, batch: Batch) -> Batch:
    batch = dict(batch)
    fresh, tokens = batch.pop("fresh_tokens"), batch.pop("tokens")
    return batch | {"fresh_context": encode(params, fresh), "context": encode(params, tokens)}


def _fresh(config: ConfigDict) -> int:
    """How many fresh latents, so prompts, a step takes."""
    return config.batch_size - config.match_reference * config.regression_batch_size


def _batch(denoiser: Denoiser, config: ConfigDict) -> Batch:
    count, length = config.regression_batch_size, denoiser.cond_shape[0]
    latents = jax.ShapeDtypeStruct((count, *denoiser.sample_shape), jnp.float32)
    return {
        "z_ref": latents,
        "y_ref": latents,
        "tokens": jax.ShapeDtypeStruct((count, length), jnp.int32),
        "fresh_tokens": jax.ShapeDtypeStruct((_fresh(config), length), jnp.int32),
    }


def _data(
    pairs: PairSource, prompts: TokenSource, mesh: Mesh, config: ConfigDict, earlier: Earlier
) -> Iterator[Batch]:
    return together(
        own_batches(pairs, lambda stage: stage.regression_batch_size, mesh, config, earlier),
        fresh=own_batches(prompts, _fresh, mesh, config, earlier),
    )


def _distance(
    decode: Mapping[str, Callable], distance: Distance | None, config: ConfigDict
) -> Distance | None:
    """The distance of the images of two latents; without LPIPS that of the latents themselves."""
    if distance is None:
        return None
    name = config.text.decoder

    def of_latents(perceptual: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        images = (decode[name](perceptual["decoders"][name], latents) for latents in (x, y))
        return distance(perceptual["lpips"], *images)

    return of_latents
