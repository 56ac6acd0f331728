"""Folders, files and arrays that `dmd-jax convert diffusers` refuses."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from commands import fails
from diffusers_folder import (
    PARTS,
    edit,
    rewrite,
    state_dict,
    write_json,
)
from safetensors.numpy import save_file

pytestmark = pytest.mark.usefixtures("traced_once")
NAME = "diffusion_pytorch_model"


def spoil(arrays, **changes):
    return {key: value for key, value in (arrays | changes).items() if value is not None}


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("unet", lambda a: spoil(a, **{"conv_in.bias": None}), "1 missing: conv_in.bias"),
        ("unet", lambda a: spoil(a, conv_x=np.ones(1, np.float32)), "1 extra: conv_x"),
        (
            "unet",
            lambda a: spoil(a, **{"conv_in.weight": np.ones((3, 3, 4, 16), np.float32)}),
            "1 misshapen: conv_in.weight (3, 3, 4, 16), expected (16, 4, 3, 3)",
        ),
        (
            "unet",
            lambda a: spoil(a, **{"conv_in.bias": np.ones(16, np.int32)}),
            "conv_in.bias has type I32; expected one of F32, F16, BF16",
        ),
        (
            "unet",
            lambda a: spoil(a, **{"conv_in.bias": np.full(16, np.nan, np.float32)}),
            "conv_in.bias has values that are not finite",
        ),
        ("unet", lambda a: spoil(a, **{"a\nb": np.ones(1)}), "an array named a\\nb; expected a pl"),
        (
            "vae",
            lambda a: spoil(a, **{"encoder.mid_block.attentions.0.key.bias": np.ones(16)}),
            "0.key.bias and encoder.mid_block.attentions.0.to_k.bias; expected one of the two",
        ),
        (
            "vae",
            lambda a: spoil(a, **{"quant_conv.weight": np.ones((8, 8), np.float32)}),
            "1 misshapen: quant_conv.weight (8, 8), expected (8, 8, 1, 1)",
        ),
        (
            "text_encoder",
            lambda a: spoil(a, **{"final_layer_norm.bias": np.ones(16, np.float32)}),
            "expected one of the two",
        ),
        ("taesd", lambda a: {}, "missing: "),
    ],
)
def test_arrays_that_are_refused(sd, capsys, part, change, message):
    rewrite(sd / part / PARTS[part][2], change)
    arguments = ["--taesd", sd / "taesd"] if part == "taesd" else []
    line = fails(capsys, "convert", "diffusers", sd, sd.parent / "out", *arguments)
    assert message in line and str(sd / part) in line
    assert [path.name for path in sd.parent.iterdir()] == ["sd"]


def test_files_that_are_refused(sd, capsys, tmp_path):
    def line(*arguments):
        found = fails(capsys, "convert", "diffusers", sd, tmp_path / "out", *arguments)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
        return found

    weights = sd / "unet" / f"{NAME}.safetensors"
    content = weights.read_bytes()
    for end in (0, 7, 100, len(content) - 1):
        weights.write_bytes(content[:end])
        assert f"{weights}{' cannot be read' if end else ': is empty'}" in line()
    weights.unlink()
    (sd / "unet" / f"{NAME}.bin").write_bytes(b"\x80\x02.")
    message = f"{sd / 'unet'} holds no safetensors (pickles such as .bin, which can run any code, "
    assert f"{message}are not read); expected {NAME}.safetensors, or shards with" in line()

    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(content)
    index = sd / "unet" / f"{NAME}.safetensors.index.json"
    for name in (
        "../../outside.safetensors",
        str(outside),
        "a/../../../outside.safetensors",
        "..",
        "",
        f"{NAME}.bin",
    ):
        write_json(index, {"weight_map": {"conv_in.bias": name}})
        assert "expected .safetensors files of its own folder" in line()
    write_json(index, {"weight_map": {"conv_in.bias": "a.safetensors"}})
    assert f"{sd / 'unet'} has no file a.safetensors" in line()
    (sd / "unet" / "a.safetensors").symlink_to(outside)
    assert "a.safetensors leads out of the folder" in line()
    for damaged in ("{", "[]", "[" * 100_000, '{"weight_map": {}}', "\udcff"):
        index.write_text(damaged, errors="surrogateescape")
        assert str(index) in line()
    index.unlink()
    weights.symlink_to(outside)
    assert "leads out of the folder" in line()
    weights.unlink()
    weights.symlink_to("../../../blobs/0123\n")
    assert f"{weights.name}: is a link to '../../../blobs/0123\\n', which is not there" in line()
    weights.unlink()
    weights.write_bytes(content)

    os.mkfifo(sd / "unet" / "fifo")
    config = (sd / "unet/config.json").read_bytes()
    (sd / "unet/config.json").unlink()
    (sd / "unet" / "fifo").rename(sd / "unet/config.json")  # reading it would wait for ever
    assert "has no file config.json" in line()
    (sd / "unet/config.json").unlink()
    (sd / "unet/config.json").write_bytes(config)

    edit(sd / "tokenizer" / "tokenizer_config.json", model_max_length=10**30)
    assert f"model_max_length is {10**30}, expected the tokens of a prompt" in line()
    (sd / "tokenizer" / "vocab.json").write_text("{}")
    edit(sd / "tokenizer" / "tokenizer_config.json", model_max_length=None)
    assert f"{sd / 'tokenizer' / 'vocab.json'}: holds no tokens, expected CLIP's" in line()
    (sd / "tokenizer" / "merges.txt").unlink()
    assert f"{sd / 'tokenizer'}: expected vocab.json and merges.txt in it, or token" in line()
    shutil.rmtree(sd / "scheduler")
    assert f"{sd} has no file scheduler/scheduler_config.json" in line()
    (sd / "model_index.json").unlink()
    assert f"{sd} has no file model_index.json; expected one, as diffusers and" in line()


def test_paths_that_cannot_be_tested(sd, capsys, tmp_path):
    line = fails(capsys, "convert", "diffusers", tmp_path / ("x" * 300), tmp_path / "out")
    assert "File name too long" in line and "expected a path that can be read" in line
    (tmp_path / "loop").symlink_to("loop")
    line = fails(capsys, "convert", "diffusers", sd, tmp_path / "loop")
    assert f"{tmp_path / 'loop'} cannot be written: Symlink loop" in line
    assert (tmp_path / "loop").is_symlink()


def test_parts_of_different_models_are_refused(sd, capsys):
    network = PARTS["taesd"][0] | {"latent_channels": 8}
    save_file(state_dict(network), sd / "taesd" / f"{NAME}.safetensors")
    edit(sd / "taesd" / "config.json", latent_channels=8)
    arguments = ("convert", "diffusers", sd, sd.parent / "out", "--taesd", sd / "taesd")
    assert "taesd has latent_channels 8; expected 4, the UNet's in_channels" in fails(
        capsys, *arguments
    )
    network = PARTS["text_encoder"][0] | {"hidden_size": 32}
    save_file(state_dict(network), sd / "text_encoder" / "model.safetensors")
    edit(sd / "text_encoder/config.json", hidden_size=32)
    assert "text_encoder has hidden_size 32; expected 16, the UNet's cross_attention_dim" in fails(
        capsys, *arguments
    )
