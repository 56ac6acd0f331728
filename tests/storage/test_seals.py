"""JSON files with a digest of themselves."""

import json

import pytest

from dmd_jax.errors import UserError
from dmd_jax.storage.seals import read_sealed, write_sealed

CONTENT = {"b": [1, 2.5, None], "a": {"text": "é", "flag": True}}


def test_it_comes_back_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    write_sealed(path, CONTENT)
    assert read_sealed(path, "a test's") == (CONTENT, True)
    # The order of keys and the white space mean nothing.
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert read_sealed(path, "a test's") == (CONTENT, True)
    path.write_text(json.dumps(CONTENT))
    assert read_sealed(path, "a test's") == (CONTENT, False)


def test_no_flipped_bit_gives_other_content(tmp_path):
    path = tmp_path / "a.json"
    write_sealed(path, CONTENT)
    whole = path.read_bytes()
    refused = 0
    for place in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            content, trusted = read_sealed(path, "a test's")
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            # The key "sha256" itself under another name; the rest is whole.
            assert content == CONTENT if trusted else CONTENT.items() <= content.items()
    assert refused > 0.9 * 8 * len(whole)


@pytest.mark.parametrize("text", ["[1]", "null", "12", "{", "[" * 100_000, "\ud800", ""])
def test_what_is_no_object_is_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"a.json(:| cannot be read)"):
        read_sealed(path, "a test's")
