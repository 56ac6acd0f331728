"""Text to image: what its teacher is made of, in the latent space of its autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from dmd_jax.config import stages_of
from dmd_jax.data.prompt_shards import TokenSource
from dmd_jax.distillation.from_config import check_same_network, prompts_of
from dmd_jax.errors import UserError
from dmd_jax.models import complete
from dmd_jax.storage.weights import Weights, params_sha256
from dmd_jax.teachers.teacher import Teacher
from dmd_jax.teachers.text_parts import load_decoder, load_text_encoder, parts_folder
from dmd_jax.teachers.tokenizer import Tokenizer, load_tokenizer


class Text(NamedTuple):
    """What a text-to-image folder has beside the network."""

    encoder: Weights
    decoders: Mapping[str, Weights]
    tokenizer: Tokenizer
    prompts: TokenSource
    prompts_sha256: str

    @property
    def encoder_sha256(self) -> str:
        return params_sha256(self.encoder.params)

    def identity(self) -> dict[str, str]:
        """What a resumed run must share."""
        identity = {
            "prompts_sha256": self.prompts_sha256,
            "text_encoder_sha256": self.encoder_sha256,
        }
        for name, one in self.decoders.items():
            identity[f"{name}_sha256"] = params_sha256(one.params)
        return identity


def load_text(config: ConfigDict) -> tuple[Text, ConfigDict]:
    """The parts of the teacher's folder, and the config with their networks in it.

    Raises:
      UserError: what the config names is not there or does not fit.
    """
    parts = parts_folder(config.teacher.weights)
    encoder = load_text_encoder(parts)
    decoders = {name: load_decoder(parts, name) for name in decoder_names(config)}
    config = _with_networks(config, decoders | {"text_encoder": encoder}, parts)
    tokenizer = load_tokenizer(parts / "tokenizer")
    vocabulary = complete(encoder.network)["vocab_size"]
    if tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"{parts / 'tokenizer'} has {tokenizer.vocab_size:,} tokens; expected at most the text "
            f"encoder's {vocabulary:,}"
        )
    prompts = prompts_of(config)
    sha256 = prompts.metadata.prompts_sha256
    return Text(encoder, decoders, tokenizer, TokenSource(prompts, tokenizer), sha256), config


def decoder_names(config: ConfigDict) -> list[str]:
    """The decoders that a run needs, by name."""
    return sorted({part.teacher.decoder for part in (config, *dict(stages_of(config)).values())})


def _with_networks(config: ConfigDict, found: Mapping[str, Weights], parts: Path) -> ConfigDict:
    """The config with the networks of the teacher's folder where it leaves them open.

    It is a copy: a run is gone on with by the config that it was given.
    """
    config = ConfigDict(config.to_dict())
    for name, weights in found.items():
        if config.teacher[name]:
            expected = config.teacher[name].to_dict()
            check_same_network(weights.network, expected, parts, key=f"teacher.{name}")
        config.teacher[name] = weights.network
    return config


def null_condition(text: Text, teacher: Teacher) -> Any:
    """The empty prompt's condition [1, L, D], on the host."""
    encode = jax.jit(teacher.encode)
    tokens = {"tokens": text.tokenizer.encode([""])}
    return jax.device_get(encode({"text_encoder": text.encoder.params}, tokens))
