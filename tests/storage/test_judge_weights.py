"""Files of the frozen networks: what is written is read, and nothing else is."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dmd_jax.errors import UserError
from dmd_jax.storage import judge_weights
from dmd_jax.storage.judge_weights import (
    INCEPTION,
    LPIPS,
    describe_auxiliary,
    load_auxiliary,
    save_auxiliary,
)


@pytest.fixture
def params(monkeypatch):
    """A network of two leaves, which stands for LPIPS's in this test."""
    found = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "b": np.ones(2)}
    template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32), found)
    monkeypatch.setitem(judge_weights._TEMPLATES, LPIPS, lambda: template)
    monkeypatch.setattr(judge_weights, "check_published", lambda params, where: None)
    return found


@pytest.fixture
def path(params, tmp_path):
    path = tmp_path / "lpips.safetensors"
    save_auxiliary(path, LPIPS, params, source="vgg16.ckpt", source_sha256="ab12")
    return path


def metadata_of(path):
    return describe_auxiliary(path, LPIPS)


def test_what_is_saved_is_loaded(params, path):
    loaded = load_auxiliary(path, LPIPS)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    described = metadata_of(path)
    assert described["kind"] == "lpips_vgg16"
    assert (described["source"], described["source_sha256"]) == ("vgg16.ckpt", "ab12")
    assert described["recognised"] == "yes" and len(described["params_sha256"]) == 64


def test_weights_that_nobody_published_are_marked(params, tmp_path):
    options = dict(source="x", source_sha256="0", recognised=False)
    save_auxiliary(tmp_path / "other", LPIPS, params, **options)
    assert metadata_of(tmp_path / "other")["recognised"] == "no"


def test_nothing_is_overwritten(params, path):
    before = path.read_bytes()
    with pytest.raises(UserError, match="exists already; expected a name that is free"):
        save_auxiliary(path, LPIPS, params, source="x", source_sha256="0")
    assert path.read_bytes() == before


def test_other_parameters_are_not_saved(params, tmp_path):
    with pytest.raises(UserError, match="not a lpips_vgg16 network: 1 missing: b"):
        save_auxiliary(tmp_path / "x", LPIPS, {"a": params["a"]}, source="x", source_sha256="0")
    assert not (tmp_path / "x").exists()


def test_a_folder_that_cannot_be_written_is_named(params, path):
    with pytest.raises(UserError, match="could not be written"):
        save_auxiliary(path / "x", LPIPS, params, source="x", source_sha256="0")


@pytest.mark.parametrize(
    "kind, hint",
    [
        (LPIPS, r'pip install "dmd_jax\[lpips\]" && dmd-jax convert lpips lpips.safetensors'),
        (INCEPTION, "dmd-jax convert inception pt_inception-2015-12-05-6726825d.pth"),
    ],
)
def test_a_missing_file_says_how_to_make_it(tmp_path, kind, hint):
    with pytest.raises(UserError, match=f"no such file; expected .*; make one .*{hint}"):
        load_auxiliary(tmp_path / "absent", kind)


def test_a_file_of_another_kind_is_refused(path):
    with pytest.raises(UserError, match="of kind 'lpips_vgg16'; expected 'fid_inception'"):
        load_auxiliary(path, INCEPTION)


def test_files_of_others_are_refused(path, tmp_path):
    stranger = tmp_path / "stranger.safetensors"
    save_file(load_file(path), stranger)
    with pytest.raises(UserError, match="of kind None; expected 'lpips_vgg16'; make one"):
        load_auxiliary(stranger, LPIPS)
    save_file(load_file(path), stranger, {"kind": LPIPS, "source": "x"})
    with pytest.raises(UserError, match="does not record params_sha256, recognised, source_sha256"):
        load_auxiliary(stranger, LPIPS)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda flat: flat.pop("b"), "not a lpips_vgg16 network: 1 missing: b"),
        (lambda flat: flat.update(c=np.ones(1)), "1 extra: c"),
        (lambda flat: flat.update(b=np.ones((2, 1))), r"misshapen: b \(2, 1\), expected \(2,\)"),
        (lambda flat: flat.update(b=np.ones(2)), "holds F32, F64; expected F32 alone"),
        (lambda flat: flat.update(b=flat["b"] + 1), "damaged: .* recorded SHA-256"),
    ],
)
def test_changed_parameters_are_refused(path, change, message):
    metadata, flat = metadata_of(path), load_file(path)
    change(flat)
    save_file(flat, path, metadata)
    with pytest.raises(UserError, match=message):
        load_auxiliary(path, LPIPS)


def test_an_lpips_that_was_never_published_is_refused(lpips_file, tmp_path):
    """Its file is whole, and says what it likes."""
    params = load_auxiliary(lpips_file, LPIPS)
    params["heads"]["block3"] = 1.01 * params["heads"]["block3"]
    own = tmp_path / "own.safetensors"
    save_auxiliary(own, LPIPS, params, source="vgg16.ckpt", source_sha256="ab12")
    with pytest.raises(UserError, match="own.safetensors: not the published .* expected 0.43587"):
        load_auxiliary(own, LPIPS)


def test_every_truncated_file_is_refused(path, tmp_path):
    whole = path.read_bytes()
    part = tmp_path / "part"
    for length in range(len(whole)):
        part.write_bytes(whole[:length])
        with pytest.raises(UserError, match="part(: is empty| cannot be read: ).*; make one"):
            load_auxiliary(part, LPIPS)
