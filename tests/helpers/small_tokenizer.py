"""A small tokenizer in CLIP's format: bytes, 18 merges, a start and an end.

Tokens are numbered as CLIP numbers them: 0 to 255 the bytes inside a word, printable ones first, so
that "!" is 0; 256 to 511 the same at the end of a word; one for each merge from 512; then the start
and, largest, the end.
"""

import json
from pathlib import Path

MERGES = (
    *("c a", "ca t</w>", "d o", "do g</w>", "t h", "th e</w>", "a n", "an d</w>", "o n</w>"),
    *("p h", "ph o", "pho t", "phot o</w>", "o f</w>", "a t</w>", "r e", "re d</w>", "' s</w>"),
)
START, END = "<|startoftext|>", "<|endoftext|>"
VOCAB_SIZE = 512 + len(MERGES) + 2


def small_vocab() -> dict[str, int]:
    """The number of every token."""
    # Bytes that print stand for themselves, the others for the characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    inside = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = inside + [token + "</w>" for token in inside]
    tokens += [merge.replace(" ", "") for merge in MERGES] + [START, END]
    return {token: number for number, token in enumerate(tokens)}


def write_tokenizer(folder: Path, *, pad_token: str = END, max_length: int = 77) -> None:
    """The four files of a Stable Diffusion folder's tokenizer/.

    Args:
      pad_token: END as in v1.5, or "!" as in v2.x, where special_tokens_map.json alone says it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start, end = (
        {
            "content": token,
            "lstrip": False,
            "normalized": True,
            "rstrip": False,
            "single_word": False,
        }
        for token in (START, END)
    )
    special = {"bos_token": start, "eos_token": end, "pad_token": pad_token, "unk_token": end}
    added = {"__type": "AddedToken"}
    config = {
        "add_prefix_space": False,
        "bos_token": added | start,
        "do_lower_case": True,
        "eos_token": added | end,
        "errors": "replace",
        "model_max_length": max_length,
        "name_or_path": "openai/clip-vit-large-patch14",
        "pad_token": END,
        "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": added | end,
    }
    contents = {
        "vocab.json": json.dumps(small_vocab(), ensure_ascii=False),
        "merges.txt": "\n".join(("#version: 0.2", *MERGES, "")),
        "special_tokens_map.json": json.dumps(special, indent=2),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")
