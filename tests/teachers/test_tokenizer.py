"""Tokens against byte-pair encoding by hand, and against what PyTorch's pipeline gives its encoder.

The numbers are those of tests/helpers/small_tokenizer.py: a letter inside a word is its byte - 33,
at the end of a word 256 more, and merge number m is 512 + m.
"""

import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from small_tokenizer import END, MERGES, VOCAB_SIZE, small_vocab, write_tokenizer

from dmd_jax.errors import UserError
from dmd_jax.teachers.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
START_ID, END_ID = VOCAB_SIZE - 2, VOCAB_SIZE - 1
WORDS = {word: 512 + MERGES.index(merge) for word, merge in (
    *(("cat", "ca t</w>"), ("dog", "do g</w>"), ("the", "th e</w>"), ("and", "an d</w>")),
    *(("on", "o n</w>"), ("photo", "phot o</w>"), ("of", "o f</w>"), ("at", "a t</w>")),
    *(("red", "re d</w>"), ("'s", "' s</w>"), ("do", "d o"), ("an", "a n")),
)}  # fmt: skip


def inside(letter):
    return ord(letter) - 33


def ending(letter):
    return 256 + inside(letter)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline") / "tokenizer"
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


# What the bytes of the two-byte letter å, C3 A5, and of 😀, F0 9F 98 80, are numbered: printable
# Latin-1 ones after the 94 of ASCII with a gap at AD, the others after all 188 in rising order,
# 33 of them below 7F.
A_RING = [0xC3 - 0xA1 + 94 - 1, 0xA5 - 0xA1 + 94]
SMILE = [
    0xF0 - 0xA1 + 94 - 1,
    188 + 33 + 0x9F - 0x7F,
    188 + 33 + 0x98 - 0x7F,
    188 + 33 + 0x80 - 0x7F,
]

BY_HAND = [
    ("a photo of the cat", [ending("a"), *(WORDS[w] for w in ("photo", "of", "the", "cat"))]),
    # c-a-t is merged by its first merge, "c a", and not by "a t" at the end; m-a-t by "a t".
    ("The CAT's mat", [WORDS["the"], WORDS["cat"], WORDS["'s"], inside("m"), WORDS["at"]]),
    # "d o" comes before "o n" at the end; the apostrophe begins a word of its own.
    ("don't", [WORDS["do"], ending("n"), inside("'"), ending("t")]),
    ("  red\t\n dog  ", [WORDS["red"], WORDS["dog"]]),
    ("dog,cat", [WORDS["dog"], ending(","), WORDS["cat"]]),
    ("12", [ending("1"), ending("2")]),  # each digit is a word
    ("?!", [inside("?"), ending("!")]),
    ("å", [A_RING[0], 256 + A_RING[1]]),
    ("A\u030a", [A_RING[0], 256 + A_RING[1]]),  # composed, then lower case
    ("😀", [*SMILE[:3], 256 + SMILE[3]]),
    ("", []),
    (" \t ", []),
    ("on " * 75, [WORDS["on"]] * 75),
]


@pytest.mark.parametrize(("prompt", "tokens"), BY_HAND)
def test_tokens_by_hand(tokenizer, prompt, tokens):
    expected = [START_ID, *tokens, END_ID]
    expected += [END_ID] * (77 - len(expected))
    found = tokenizer.encode([prompt])
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, [expected])
    assert not tokenizer.truncated([prompt])[0]


def test_what_is_too_long_is_cut_and_counted(tokenizer):
    prompts = ["on " * 75, "on " * 75 + "cat", "cat " * 1000, "", "x" * 80]
    found = tokenizer.encode(prompts)
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], [START_ID, *[WORDS["cat"]] * 75, END_ID])
    np.testing.assert_array_equal(found[4], [START_ID, *[inside("x")] * 75, END_ID])
    assert tokenizer.truncated(prompts).tolist() == [False, True, True, False, True]


def test_no_prompts(tokenizer):
    assert tokenizer.encode([]).shape == (0, 77) and tokenizer.encode([]).dtype == np.int32
    assert tokenizer.truncated([]).shape == (0,)


def test_length_and_size_are_those_of_the_folder(tokenizer, tmp_path):
    assert (tokenizer.max_length, tokenizer.vocab_size) == (77, VOCAB_SIZE)
    write_tokenizer(tmp_path, max_length=5)
    short = load_tokenizer(tmp_path)
    expected = [[START_ID, WORDS["cat"], END_ID, END_ID, END_ID]]
    np.testing.assert_array_equal(short.encode(["cat"]), expected)


def test_a_length_that_is_not_given_is_that_of_clip(tokenizer, tmp_path):
    write_tokenizer(tmp_path, max_length=5)
    changed_json("tokenizer_config.json", model_max_length=...)(tmp_path)
    prompts = [prompt for prompt, _ in BY_HAND]
    np.testing.assert_array_equal(
        load_tokenizer(tmp_path).encode(prompts), tokenizer.encode(prompts)
    )


def test_padding_is_what_special_tokens_map_says(tmp_path):
    write_tokenizer(tmp_path, pad_token="!")  # as in v2.x, where tokenizer_config.json differs
    found = load_tokenizer(tmp_path).encode(["cat", ""])
    np.testing.assert_array_equal(found[0], [START_ID, WORDS["cat"], END_ID, *[0] * 74])
    np.testing.assert_array_equal(found[1], [START_ID, END_ID, *[0] * 75])


def test_threads_and_pickles_give_the_same(tokenizer):
    prompts = [prompt for prompt, _ in BY_HAND] * 20
    expected = tokenizer.encode(prompts)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda prompt: tokenizer.encode([prompt])[0], prompts))
        cut = list(threads.map(lambda prompt: tokenizer.truncated([prompt])[0], prompts))
    np.testing.assert_array_equal(found, expected)
    assert not any(cut)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(tokenizer)).encode(prompts), expected)


def test_half_a_surrogate_pair_is_named(tokenizer):
    for method in (tokenizer.encode, tokenizer.truncated):
        with pytest.raises(UserError, match="prompt 1 is no valid Unicode"):
            method(["cat", "\ud800"])


def save_as_transformers_5(source, target):
    """tokenizer.json in place of vocab.json and merges.txt."""
    from transformers import CLIPTokenizer

    CLIPTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(target)
    assert {path.name for path in target.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


def test_both_forms_of_a_folder_give_the_same(tokenizer, folder, tmp_path):
    save_as_transformers_5(folder, tmp_path)
    prompts = [prompt for prompt, _ in BY_HAND]
    np.testing.assert_array_equal(
        load_tokenizer(tmp_path).encode(prompts), tokenizer.encode(prompts)
    )


def test_nothing_is_printed_downloaded_or_needed_of_pytorch(folder):
    script = (
        "import sys, socket\n"
        "sys.modules['torch'] = None\n"  # an import of it fails
        "def refuse(*args, **kwargs): raise AssertionError('the network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from dmd_jax.teachers.tokenizer import load_tokenizer\n"
        "print(load_tokenizer(sys.argv[1]).encode(['cat'])[0, :3].tolist())\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS"))}
    ran = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == f"[{START_ID}, {WORDS['cat']}, {END_ID}]\n"


def changed_json(name, **changes):
    def change(folder):
        values = json.loads((folder / name).read_text(encoding="utf-8")) | changes
        values = {key: value for key, value in values.items() if value is not ...}
        (folder / name).write_text(json.dumps(values), encoding="utf-8")

    return change


def removed(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def linked_out(folder):
    outside = folder.with_name("outside.json")
    (folder / "vocab.json").rename(outside)
    (folder / "vocab.json").symlink_to(outside)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (removed("vocab.json"), "expected vocab.json and merges.txt in it, or tokenizer.json"),
        (removed("merges.txt"), "expected vocab.json and merges.txt in it, or tokenizer.json"),
        (written("vocab.json", b'{"a": 0'), "vocab.json.*Expecting ',' delimiter"),
        (written("vocab.json", b"[]"), "vocab.json.*object"),
        (written("vocab.json", b"[" * 100_000), "vocab.json.*nested too deeply"),
        (written("vocab.json", b"\xff"), "vocab.json.*utf-8"),
        (written("vocab.json", b"{}"), "vocab.json: holds no tokens, expected CLIP's"),
        (changed_json("vocab.json", cat="7"), "vocab.json: 'cat' has the number '7', expected"),
        (changed_json("vocab.json", cat=-1), "vocab.json: 'cat' has the number -1, expected"),
        (changed_json("vocab.json", **{END: ...}), "endoftext.*no number in the vocabulary"),
        (written("merges.txt", b"#version: 0.2\nc a\nca\n"), "cannot be read as CLIP's tokenizer"),
        (written("merges.txt", b"#version: 0.2\nq q\n"), "cannot be read as CLIP's tokenizer"),
        (written("merges.txt", b"\xff\xfe"), "cannot be read as CLIP's tokenizer"),
        (written("added_tokens.json", b'{"x": 1.5}'), "added_tokens.json: 'x' has the number 1.5"),
        (written("tokenizer_config.json", b"null"), "tokenizer_config.json.*object"),
        (
            changed_json("tokenizer_config.json", model_max_length=None),
            "model_max_length is None, expected .* 77",
        ),
        (changed_json("tokenizer_config.json", model_max_length=1e30), "model_max_length is 1e"),
        (changed_json("tokenizer_config.json", model_max_length=True), "model_max_length is True"),
        (changed_json("tokenizer_config.json", model_max_length=1), "model_max_length is 1,"),
        (
            changed_json("tokenizer_config.json", tokenizer_class="T5Tokenizer"),
            "tokenizer_class is 'T5Tokenizer', expected 'CLIPTokenizer'",
        ),
        (changed_json("tokenizer_config.json", tokenizer_class=[1]), r"tokenizer_class is \[1\]"),
        (changed_json("special_tokens_map.json", pad_token="<pad>"), "pad_token '<pad>' has no"),
        (changed_json("special_tokens_map.json", pad_token=None), "pad_token None has no number"),
        (changed_json("special_tokens_map.json", bos_token=5), "cannot be read as CLIP's"),
        (written("tokenizer.json", b'{"model": {"vocab": [["a", -1.0]]}}'), "no byte-pair tokeni"),
        (written("tokenizer.json", b'{"model": 3}'), "tokenizer.json: no byte-pair tokenizer"),
        (linked_out, "vocab.json.*leads out of the folder"),
    ],
)  # fmt: skip
def test_folders_that_are_refused(tmp_path, change, message):
    folder = tmp_path / "tokenizer"
    write_tokenizer(folder)
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="none: no such folder, expected a pipeline's tokenizer"):
        load_tokenizer(tmp_path / "none")


def test_paths_in_a_config_are_not_followed(folder, tokenizer, tmp_path):
    outside = tmp_path / "outside.json"
    outside.write_text(json.dumps(dict.fromkeys(small_vocab(), 0)))
    inner = tmp_path / "tokenizer"
    write_tokenizer(inner)
    paths = dict.fromkeys(("vocab_file", "merges_file", "tokenizer_file"), str(outside))
    paths["fast_tokenizer_files"] = ["../tokenizer.4.0.json"]
    (tmp_path / "tokenizer.4.0.json").write_text("{}")
    changed_json("tokenizer_config.json", **paths)(inner)
    changed_json("special_tokens_map.json", **paths)(inner)
    found = load_tokenizer(inner).encode(["the cat"])
    np.testing.assert_array_equal(found, tokenizer.encode(["the cat"]))


@pytest.mark.torch
@pytest.mark.parametrize("pad_token", [END, "!"])
@pytest.mark.parametrize("form", ["vocab.json", "tokenizer.json"])
def test_tokens_are_what_the_pipeline_gives_its_text_encoder(tmp_path, pad_token, form):
    import torch
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    folder = tmp_path / "first"
    write_tokenizer(folder, pad_token=pad_token)
    if form == "tokenizer.json":
        save_as_transformers_5(folder, folder := tmp_path / "second")
    seen = []

    class TextEncoder(torch.nn.Module):
        dtype = torch.float32

        def forward(self, tokens, **options):
            seen.append(tokens.numpy())
            return (torch.zeros(*tokens.shape, 1),)

        class config:
            pass

    pipeline = StableDiffusionPipeline.__new__(StableDiffusionPipeline)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    object.__setattr__(pipeline, "tokenizer", tokenizer)
    object.__setattr__(pipeline, "text_encoder", TextEncoder())
    object.__setattr__(pipeline, "unet", None)
    rng = np.random.default_rng(0)
    alphabet = [*"catdogrphonfe'sm!?,.7 \t\nÉßİﬁ漢😀\u200d", END]
    prompts = [prompt for prompt, _ in BY_HAND]
    prompts += ["".join(rng.choice(alphabet, rng.integers(0, 120))) for _ in range(80)]
    pipeline.encode_prompt(prompts, "cpu", 1, True)
    prompt_tokens, negative_tokens = seen
    ours = load_tokenizer(folder)
    np.testing.assert_array_equal(ours.encode(prompts), prompt_tokens)
    np.testing.assert_array_equal(ours.encode([""] * len(prompts)), negative_tokens)
    longest = [len(ids) for ids in tokenizer(prompts).input_ids]
    np.testing.assert_array_equal(ours.truncated(prompts), np.array(longest) > 77)
    assert 10 < sum(ours.truncated(prompts)) < len(prompts) - 10
