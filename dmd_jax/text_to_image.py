"""From prompts to images: the parts of a text-to-image folder, and what they make together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax import discrete_samplers, samplers
from dmd_jax.errors import UserError
from dmd_jax.files import path_of
from dmd_jax.generation import LocalDevices, checked_latents
from dmd_jax.models import Denoiser, build_network, complete, guided
from dmd_jax.models.clip_text import check_tokens
from dmd_jax.text_parts import load_decoder, load_sampling, load_text_encoder, parts_folder
from dmd_jax.tokenizer import Tokenizer, load_tokenizer
from dmd_jax.types import Denoise, Params
from dmd_jax.weights import Weights, denoiser_of, load_weights, network_of

_DISCRETE = {
    "pndm": discrete_samplers.pndm,
    "ddim": discrete_samplers.ddim,
    "dpm++": discrete_samplers.dpm_solver_pp,
    "unipc": discrete_samplers.unipc,
}
_NETWORK = "unet2d_condition"
TEXT_SAMPLERS = ("one-step", *_DISCRETE)


class Pipeline(NamedTuple):
    """What makes images of prompts; parameters are on the host."""

    unet: Weights
    text_encoder: Weights
    decoder: Weights  # an autoencoder's
    tokenizer: Tokenizer
    sampling: dict[str, Any]  # of scheduler.json: timestep_spacing, steps_offset, set_alpha_to_one


def is_text_to_image(folder: str | Path) -> bool:
    """Whether a weights folder or a workdir holds a network that makes images of text.

    Raises:
      UserError: the folder is neither, or its config cannot be read.
    """
    return network_of(folder).get("name") == _NETWORK


def load_pipeline(
    folder: str | Path,
    *,
    parts: str | Path | None = None,
    decoder: str = "vae",
    unet: Weights | None = None,
) -> Pipeline:
    """Reads a text-to-image folder, or a generator that was distilled from one.

    Args:
      folder: a weights folder or a run's workdir; the UNet is load_weights(folder).
      parts, decoder: as for `parts_folder` and `load_decoder`.
      unet: load_weights(folder), if it was read before.

    Raises:
      UserError: a part is missing, damaged or of another kind, or does not fit the UNet.
    """
    folder = path_of(folder)
    place = parts_folder(folder, parts)
    unet = unet or load_weights(folder)
    network = complete(unet.network)
    if network["name"] != _NETWORK:
        raise UserError(
            f"weights {folder} are of network {network['name']}; expected {_NETWORK}, which makes "
            "images of text"
        )
    pipeline = Pipeline(
        unet,
        load_text_encoder(place),
        load_decoder(place, decoder),
        load_tokenizer(place / "tokenizer"),
        load_sampling(place),
    )
    text, image = complete(pipeline.text_encoder.network), complete(pipeline.decoder.network)
    length, longest = pipeline.tokenizer.max_length, text["max_position_embeddings"]
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
    return pipeline


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


class LatentMaker:
    """Makes latents of noise and tokens on this process's devices, one compiled program for all.

    Args:
      sampler: one of TEXT_SAMPLERS. num_steps: of all but one-step.
      guidance: classifier-free, by the empty prompt; 1 is none, and all that one-step takes.
      batch_size: latents at a time; rounded up to a multiple of the devices.
      dtype, precision: that the networks compute in, as for models.build_network.
      latent_shape: of one example, (h, w, C); by default that of the UNet's training.
      devices: all of this process's by default.

    Raises:
      UserError: an unknown sampler, or an impossible number of steps, guidance or shape.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        sampler: str,
        num_steps: int = 50,
        guidance: float = 1.0,
        batch_size: int = 8,
        dtype: str = "float32",
        precision: str = "highest",
        latent_shape: tuple[int, ...] | None = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        computation = {"dtype": dtype, "precision": precision}
        denoiser = denoiser_of(pipeline.unet, **computation)
        sample = latent_sampler(sampler, denoiser, num_steps, guidance, pipeline.sampling)
        self.latent_shape = tuple(latent_shape or denoiser.sample_shape)
        text = complete(pipeline.text_encoder.network)
        self._vocab_size, self._longest = text["vocab_size"], text["max_position_embeddings"]
        self._devices = LocalDevices(batch_size, devices)
        self.batch_size = self._devices.batch_size
        self._decoder, self._computation = pipeline.decoder, computation
        encode = text_encoder(pipeline.text_encoder.network, **computation)
        self._params = self._devices.replicate(
            {"unet": pipeline.unet.params, "text": pipeline.text_encoder.params}
        )
        self._uncond = None
        if guidance != 1:
            empty = pipeline.tokenizer.encode([""])
            check_tokens(empty, self._vocab_size)
            self._uncond = jax.jit(encode)(self._params["text"], self._devices.replicate(empty))

        def make(params: Params, uncond, z: jax.Array, tokens: jax.Array) -> jax.Array:
            return sample(params["unet"], z, encode(params["text"], tokens), uncond)

        self._make = self._devices.compile(make)

    def __call__(self, z: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Latents float32 [N, h, w, C] from standard normal z of that shape and tokens [N, L].

        Raises:
          UserError: latents or tokens of another shape or type, or a token outside of the text
            encoder's vocabulary.
        """
        return np.concatenate(list(self.batches(z, tokens)))

    def batches(self, z: np.ndarray, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """The same, batch by batch."""
        z, tokens = checked_latents(z, self.latent_shape), np.asarray(tokens)
        if tokens.ndim != 2 or len(tokens) != len(z) or tokens.shape[1] > self._longest:
            raise UserError(
                f"tokens are of shape {tokens.shape}; expected [{len(z)}, L], a row for each "
                f"latent, L at most {self._longest}"
            )
        check_tokens(tokens, self._vocab_size)
        for _, count, rows in self._devices.batches(z, tokens):
            yield np.asarray(self._make(self._params, self._uncond, *rows))[:count]

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Images float32 [N, H, W, 3] of latents [N, h, w, C]; about in [-1, 1], not clipped."""
        decode, params = self._decode
        parts = [
            np.asarray(decode(params, *rows))[:count]
            for _, count, rows in self._devices.batches(latents)
        ]
        return np.concatenate(parts)

    @functools.cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """Of one image, (H, W, 3)."""
        decode = image_decoder(self._decoder.network)
        latents = jax.ShapeDtypeStruct((1, *self.latent_shape), jnp.float32)
        return jax.eval_shape(decode, self._decoder.params, latents).shape[1:]

    @functools.cached_property
    def _decode(self):
        decode = image_decoder(self._decoder.network, **self._computation)
        return self._devices.compile(decode), self._devices.replicate(self._decoder.params)


def pixels_a_latent(decoder: Weights) -> int:
    """How many pixels a side of a latent stands for: 8 in Stable Diffusion."""
    channels = complete(decoder.network)["latent_channels"]
    latent = jax.ShapeDtypeStruct((1, 1, 1, channels), jnp.float32)
    return jax.eval_shape(image_decoder(decoder.network), decoder.params, latent).shape[1]


def latent_sampler(
    name: str,
    denoiser: Denoiser,
    num_steps: int,
    guidance: float,
    sampling: dict[str, Any],
) -> Callable[[Params, jax.Array, jax.Array, jax.Array | None], jax.Array]:
    """(params, z, cond, uncond) -> latents; uncond is not used where guidance is 1.

    Args:
      name: one of TEXT_SAMPLERS. sampling: as of Pipeline.

    Raises:
      UserError: an unknown sampler, or an impossible number of steps or guidance.
    """
    schedule = denoiser.schedule
    if name not in TEXT_SAMPLERS:
        raise UserError(
            f"unknown sampler {name!r} of text; expected one of {', '.join(TEXT_SAMPLERS)}"
        )
    denoise = guided(denoiser.denoise, guidance)
    if name == "one-step":
        if guidance != 1:
            raise UserError(
                f"guidance {guidance:g} with the sampler one-step; expected 1: a generator has "
                "its teacher's guidance in it"
            )
        return lambda params, z, cond, uncond: samplers.one_step(
            denoiser.denoise, params, z, cond, schedule=schedule
        )
    options = {
        "schedule": schedule,
        "num_steps": num_steps,
        "timestep_spacing": sampling["timestep_spacing"],
        "steps_offset": sampling["steps_offset"],
    }
    if name in ("pndm", "ddim"):  # the others end at the clean latents, as by diffusers' default
        options["final_alpha_one"] = sampling["set_alpha_to_one"]
    function = functools.partial(_DISCRETE[name], **options)
    _check_steps(function)
    return lambda params, z, cond, uncond: function(denoise, params, z, (cond, uncond))


def _check_steps(function: Callable) -> None:
    """Refuses impossible timesteps before anything is compiled or written."""
    denoise: Denoise = lambda params, x_t, level, cond: x_t  # noqa: E731
    jax.eval_shape(
        lambda z: function(denoise, None, z, None), jax.ShapeDtypeStruct((1, 1), jnp.float32)
    )
