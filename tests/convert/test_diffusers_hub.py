"""Where `dmd-jax convert diffusers` looks for a folder: on disk, in the hub's cache, on the hub."""

from __future__ import annotations

import os
import shutil
import sys

import pytest
from commands import fails, succeeds
from diffusers_folder import (
    hashes,
)

from dmd_jax.storage.weights import load_weights

pytestmark = pytest.mark.usefixtures("traced_once")
NAME = "diffusion_pytorch_model"


def hub_cache(made, folder):
    """The folder as huggingface_hub keeps it: blobs, and links to them."""
    model = folder / "models--somebody--small"
    commit = "0123456789abcdef0123456789abcdef01234567"
    files = [path for path in made[0].rglob("*") if path.is_file()]
    for number, path in enumerate(files):
        link = model / "snapshots" / commit / path.relative_to(made[0])
        blob = model / "blobs" / str(number)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    return model / "snapshots" / commit


def test_a_hub_id_is_found_in_the_cache_without_a_network(made, tmp_path, monkeypatch, capsys):
    snapshot = hub_cache(made, tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    succeeds("convert", "diffusers", "somebody/small", tmp_path / "out")
    found = hashes(tmp_path / "out")
    assert found == {part: sha for part, sha in hashes(made[1]).items() if part != "taesd"}
    assert load_weights(tmp_path / "out").source["file"] == "somebody/small"
    # The same folder by its path, whose links lead out of it, but not out of the model's cache.
    succeeds("convert", "diffusers", snapshot, tmp_path / "out2")
    assert hashes(tmp_path / "out2") == found
    secret = tmp_path / "secret.json"
    shutil.copy(snapshot / "model_index.json", secret)
    (snapshot / "model_index.json").unlink()
    (snapshot / "model_index.json").symlink_to(secret)
    line = fails(capsys, "convert", "diffusers", "somebody/small", tmp_path / "out3")
    assert "model_index.json leads out of the folder" in line

    line = fails(capsys, "convert", "diffusers", "somebody/else", tmp_path / "out3")
    assert line.startswith("dmd-jax: error: somebody/else: no such folder, and the hub did not")
    assert "or a hub id with a network or in the local cache" in line
    line = fails(
        capsys, "convert", "diffusers", "somebody/small", tmp_path / "o", "--revision", "no"
    )
    assert "the hub did not give it" in line


def test_of_a_model_on_the_hub_only_what_is_needed_is_downloaded(made, sd, monkeypatch):
    """Weights in half precision only of the parts that have no other."""
    from huggingface_hub.utils import filter_repo_objects

    wanted = [str(path.relative_to(sd)) for path in sd.rglob("*") if path.is_file()]
    wanted = [name for name in wanted if not name.startswith("taesd/")]
    full = f"vae/{NAME}.safetensors"
    half = f"vae/{NAME}.fp16.safetensors"
    (sd / full).rename(sd / half)
    others = [
        *(f"unet/{NAME}.{end}" for end in ("bin", "fp16.safetensors", "non_ema.safetensors")),
        *("v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "safety_checker/model.safetensors"),
        *("text_encoder/pytorch_model.bin", "text_encoder/model.fp16.safetensors", "README.md"),
        f"unet/{NAME}-00001-of-00002.fp16.safetensors",
    ]
    downloads = []

    def snapshot_download(hub_id, *, revision, allow_patterns):
        assert (hub_id, revision) == ("somebody/small", "v1")
        names = [*wanted, half, *others]
        downloads.append(set(filter_repo_objects(names, allow_patterns=allow_patterns)))
        return str(sd)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(sd.parent)
    succeeds("convert", "diffusers", "somebody/small", "out", "--revision", "v1")
    assert downloads == [set(wanted), {*wanted, half}]


def test_sources_that_are_none(sd, tmp_path, capsys, monkeypatch):
    line = fails(capsys, "convert", "diffusers", tmp_path / "no" / "such" / "x", tmp_path / "out")
    assert "no such folder; expected one, or a hub id (owner/name)" in line
    line = fails(capsys, "convert", "diffusers", sd / "model_index.json", tmp_path / "out")
    assert "no such folder" in line
    line = fails(capsys, "convert", "diffusers", sd, tmp_path / "out", "--revision", "main")
    assert f"--revision main: {sd} is a folder; expected a hub id" in line
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    line = fails(capsys, "convert", "diffusers", "somebody/small", tmp_path / "out")
    assert (
        'a hub id needs the package huggingface_hub; expected a folder, or pip install "dm' in line
    )
