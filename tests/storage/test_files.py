"""Files appear whole or not at all."""

import json
from pathlib import Path

import pytest

from dmd_jax.errors import UserError
from dmd_jax.storage.files import local_path, path_of, replacing, write_json, write_whole


def test_a_failure_keeps_what_was_there(tmp_path):
    path = tmp_path / "folder" / "file"
    write_whole(path, b"first")

    def fail_half_way():
        with replacing(path) as temporary:
            temporary.write_bytes(b"sec")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]


def test_json_reads_back(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1, 2.5, None]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, 2.5, None]}


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of("~/x.npy") == local_path("~/x.npy") == tmp_path / "x.npy"
    assert path_of("a~/~") == Path("a~/~")
    with pytest.raises(UserError, match="expected a user with a home folder after ~"):
        path_of("~nobody-of-this-name/x")
