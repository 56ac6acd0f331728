"""Prompts to CLIP's tokens, as Stable Diffusion's pipeline makes them.

transformers' CLIPTokenizer does the work. It is given checked copies of a folder's files, since by
itself it makes an empty vocabulary of a damaged one, adds a special token that is missing, and
follows the paths that a tokenizer_config.json may name.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmd_jax.errors import UserError, first_line
from dmd_jax.storage.bucket_copies import local_folder
from dmd_jax.storage.files import in_bucket, path_of, write_json
from dmd_jax.storage.given_folder import GivenFolder
from dmd_jax.storage.real_files import answered

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_MORE_TOKENS = ("additional_special_tokens", "extra_special_tokens")
_SETTINGS = (
    *("model_max_length", "padding_side", "truncation_side", "split_special_tokens"),
    *("add_prefix_space", "add_bos_token", "add_eos_token", "added_tokens_decoder"),
)
_CONFIG = "tokenizer_config.json"
# Of the keys of each JSON file, those that are passed on; None: all of them. A folder has
# tokenizer.json, as transformers 5 saves it and which counts where both are there, or the older
# vocab.json and merges.txt.
_PASSED_ON = {
    "tokenizer.json": None,
    "vocab.json": None,
    "added_tokens.json": None,
    "special_tokens_map.json": (*_SPECIAL_TOKENS, *_MORE_TOKENS),
    _CONFIG: (*_SPECIAL_TOKENS, *_MORE_TOKENS, *_SETTINGS),
}
_CLASSES = (None, "CLIPTokenizer", "CLIPTokenizerFast")
_CLIP_LENGTH = 77
_MAX_LENGTH = 1 << 16


class Tokenizer:
    """A tokenizer as `load_tokenizer` gives it. May be used from several threads.

    max_length: tokens of a prompt, 77 for CLIP. vocab_size: one more than the largest token.
    """

    def __init__(self, clip):
        self._clip = clip
        self.max_length: int = clip.model_max_length
        self.vocab_size: int = max(clip.get_vocab().values()) + 1
        # The first call sets padding and truncation, which other threads must not see half done.
        self.encode([""])

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """The tokens of prompts: int32 [N, max_length].

        As the pipeline of Stable Diffusion: start, text, end, then padding; a text that is too long
        is cut and still ends in end; the empty prompt, which guidance takes for no prompt, is start
        and end.

        Raises:
          UserError: a prompt that is no valid Unicode, such as half of a surrogate pair.
        """
        prompts = _checked(prompts)
        if not prompts:
            return np.zeros((0, self.max_length), np.int32)
        return np.array(self._call(prompts)["input_ids"], np.int32)

    def truncated(self, prompts: Sequence[str]) -> np.ndarray:
        """Which prompts are too long, so that `encode` leaves out their last words: bool [N].

        Raises:
          UserError: as `encode`.
        """
        prompts = _checked(prompts)
        if not prompts:
            return np.zeros(0, bool)
        # A prompt takes one row, and another one for each max_length that is cut off.
        rows = self._call(prompts, return_overflowing_tokens=True)["overflow_to_sample_mapping"]
        return np.bincount(rows) > 1

    def _call(self, prompts: list[str], **options):
        length = self.max_length
        return self._clip(
            prompts, padding="max_length", max_length=length, truncation=True, **options
        )


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """Reads the tokenizer/ folder of a Stable Diffusion pipeline; nothing is downloaded.

    Needs the package transformers (the extra [text]), not PyTorch.

    Raises:
      UserError: as read_files; transformers is not installed, or cannot read the files; a special
        token that has no number.
    """
    path = path_of(folder)
    if not answered(path.is_dir):
        raise UserError(f"{path}: no such folder, expected a pipeline's tokenizer folder")
    if in_bucket(path):
        path = local_folder(
            path, [name for name in path.files() if name in (*_PASSED_ON, "merges.txt")]
        )
    given = GivenFolder(path, path.name)
    values, known = read_files(given)
    with _without_warnings(), tempfile.TemporaryDirectory() as folder_of_copies:
        copies = Path(folder_of_copies)
        for name, value in values.items():
            kept = _PASSED_ON[name] or value.keys()
            write_json(copies / name, {key: value[key] for key in value if key in kept})
        if given.has("merges.txt"):
            shutil.copyfile(given.file("merges.txt"), copies / "merges.txt")
        clip = _clip_tokenizer(path, copies)
    for name in ("bos_token", "eos_token", "pad_token"):
        if (token := getattr(clip, name)) not in known:
            raise UserError(f"{path}: the {name} {token!r} has no number in the vocabulary")
    return Tokenizer(clip)


def read_files(folder: GivenFolder) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """The JSON of a tokenizer's files by their names, and the tokens that they number.

    A model_max_length that is not given is CLIP's, 77. Does not need transformers.

    Raises:
      UserError: no vocab.json with merges.txt, and no tokenizer.json; a file that is damaged, no
        regular file, or a link out of the folder; another tokenizer than CLIP's; an impossible
        length; no tokens.
    """
    path = folder.path
    if not folder.has("tokenizer.json") and not (
        folder.has("vocab.json") and folder.has("merges.txt")
    ):
        raise UserError(f"{path}: expected vocab.json and merges.txt in it, or tokenizer.json")
    values = {name: folder.json(name) for name in _PASSED_ON if folder.has(name)}
    values[_CONFIG] = {"model_max_length": _CLIP_LENGTH} | values.get(_CONFIG, {})
    _check_config(path / _CONFIG, values[_CONFIG])
    return values, _known_tokens(path, values)


def _checked(prompts: Sequence[str]) -> list[str]:
    prompts = list(prompts)
    for index, prompt in enumerate(prompts):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"prompt {index} is no valid Unicode ({first_line(error)})") from error
    return prompts


def _known_tokens(folder: Path, values: dict[str, dict]) -> set[str]:
    """The tokens that the files number."""
    known, name = set(), "vocab.json"
    vocab = values.get(name)
    if "tokenizer.json" in values:
        name = "tokenizer.json"
        model, added = values[name].get("model"), values[name].get("added_tokens")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(vocab, dict) or model.get("end_of_word_suffix") != "</w>":
            raise UserError(f"{folder / name}: no byte-pair tokenizer with '</w>' such as CLIP's")
        if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
            raise UserError(f"{folder / name}: added_tokens is no list of JSON objects")
        known |= {token["content"] for token in added if isinstance(token.get("content"), str)}
    if not vocab:
        raise UserError(f"{folder / name}: holds no tokens, expected CLIP's")
    for where, numbers in ((name, vocab), ("added_tokens.json", values.get("added_tokens.json"))):
        for token, number in (numbers or {}).items():
            if type(number) is not int or not 0 <= number < 2**31:
                raise UserError(
                    f"{folder / where}: {token!r:.100} has the number {number!r:.100}, expected a "
                    "whole one of at least 0"
                )
            known.add(token)
    return known


def _check_config(path: Path, config: dict[str, Any]) -> None:
    name = config.get("tokenizer_class")
    if name not in _CLASSES:
        raise UserError(f"{path}: tokenizer_class is {name!r:.100}, expected 'CLIPTokenizer'")
    length = config.get("model_max_length")
    if type(length) is not int or not 2 <= length <= _MAX_LENGTH:
        raise UserError(
            f"{path}: model_max_length is {length!r:.100}, expected the tokens of a prompt, "
            f"{_CLIP_LENGTH} for CLIP"
        )


def _clip_tokenizer(folder: Path, copies: Path):
    try:
        from transformers import CLIPTokenizer
    except ImportError as error:
        raise UserError(
            "tokens need the package transformers; install it with pip install 'dmd_jax[text]'"
        ) from error
    try:
        return CLIPTokenizer.from_pretrained(copies, local_files_only=True)
    except Exception as error:  # the Rust below raises plain Exception
        raise UserError(
            f"{folder}: cannot be read as CLIP's tokenizer ({first_line(error)})"
        ) from error


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    # transformers warns that there is no PyTorch, on whose absence nothing here depends.
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)
