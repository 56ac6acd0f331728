"""`dmd-jax convert diffusers`: every form of a Stable Diffusion folder."""

from __future__ import annotations

import json
import shutil

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import pytest
from commands import fails, finish, start, succeeds
from diffusers_folder import (
    PARTS,
    convert,
    edit,
    hashes,
    rewrite,
    state_dict,
    write_json,
)
from peak_memory import peak_of_convert
from safetensors.numpy import load_file, save_file

from dmd_jax.convert.torch_layout import from_torch, torch_key
from dmd_jax.models import complete
from dmd_jax.storage.seals import read_sealed
from dmd_jax.storage.weights import load_weights

pytestmark = pytest.mark.usefixtures("traced_once")
NAME = "diffusion_pytorch_model"


def test_every_parameter_is_where_its_name_says(made):
    sd, out = made
    for part, (network, _, _) in PARTS.items():
        weights = load_weights(out if part == "unet" else out / part)
        assert weights.network == complete(network)
        arrays = state_dict(network)
        flat = flax.traverse_util.flatten_dict(weights.params, sep="/")
        prefix = "text_model." if part == "text_encoder" else ""
        assert {prefix + torch_key(path) for path in flat} == arrays.keys()
        for path, leaf in flat.items():
            expected = from_torch(path, arrays[prefix + torch_key(path)])
            np.testing.assert_array_equal(leaf, expected)
    assert read_sealed(out / "scheduler.json", "a test's")[0] == {
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
    }
    names = {"vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"}
    assert {path.name for path in (out / "tokenizer").iterdir()} == names
    for name in names:
        assert (out / "tokenizer" / name).read_bytes() == (sd / "tokenizer" / name).read_bytes()
    assert [path.name for path in out.parent.iterdir() if path.name[0] == "."] == []


def test_the_same_again_is_nothing_to_do(made, sd, capsys):
    sd.rename(sd.with_name("other"))
    sd = sd.with_name("other")
    out = sd.parent / "out"
    first = convert(sd)
    assert load_weights(out / "vae").source["file"] == "other/vae"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    succeeds("convert", "diffusers", sd, out)
    assert f"{out} holds other already" in capsys.readouterr().out
    # With another part it is another source, and so it is with one changed byte.
    line = fails(capsys, "convert", "diffusers", sd, out, "--taesd", sd / "taesd")
    assert f"{out} exists and holds something else; expected a new or empty folder" in line
    edit(sd / "scheduler" / "scheduler_config.json", steps_offset=0)
    assert "holds something else" in fails(capsys, "convert", "diffusers", sd, out)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert first == {part: sha for part, sha in hashes(made[1]).items() if part != "taesd"}


@pytest.mark.parametrize(
    "name, content",
    [
        ("model.safetensors", None),
        ("vae/model.safetensors", b""),
        ("vae/config.json", None),
        ("text_encoder/config.json", b"["),
        ("scheduler.json", None),
        ("tokenizer/merges.txt", None),
    ],
)
def test_a_folder_that_is_not_whole_is_named(made, tmp_path, capsys, name, content):
    out = shutil.copytree(made[1], tmp_path / "out")
    (out / name).unlink()
    if content is not None:
        (out / name).write_bytes(content)
    line = fails(capsys, "convert", "diffusers", made[0], out, "--taesd", made[0] / "taesd")
    assert f"{out} holds part of this source, but {name} cannot be read" in line


def test_shards_and_both_spellings_give_the_same_bits(made, sd):
    def old_attention(arrays):
        """As the first Stable Diffusion's VAE: other names, one half kept as 1x1 convolutions."""
        old = {}
        for key, array in arrays.items():
            name = key
            for to, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
                name = name.replace(f".{to}.", f".{before}.")
            name = name.replace(".to_out.0.", ".proj_attn.")
            if name != key and name.endswith("weight") and key.startswith("encoder"):
                array = array[:, :, None, None]
            old[name] = array
        assert sum(".proj_attn." in key for key in old) == 4
        return old

    def without_prefix(arrays):
        arrays = {key.removeprefix("text_model."): array for key, array in arrays.items()}
        return arrays | {"embeddings.position_ids": np.arange(77)[None]}

    rewrite(sd / "vae" / f"{NAME}.safetensors", old_attention)
    rewrite(sd / "text_encoder" / "model.safetensors", without_prefix)
    arrays = load_file(sd / "unet" / f"{NAME}.safetensors")
    (sd / "unet" / f"{NAME}.safetensors").unlink()
    weight_map = {}
    for number, key in enumerate(arrays):
        weight_map[key] = f"{NAME}-{number % 3 + 1:05}-of-00003.safetensors"
    for shard in set(weight_map.values()):
        save_file(
            {k: arrays[k] for k, at in weight_map.items() if at == shard}, sd / "unet" / shard
        )
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    write_json(sd / "unet" / f"{NAME}.safetensors.index.json", index)
    write_json(sd / "unet" / "config.json", json.loads((sd / "unet/config.json").read_text()))
    assert convert(sd, "--taesd", sd / "taesd") == hashes(made[1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_becomes_float32(sd, dtype):
    """In a file called fp16, which is read only where there is no other."""
    dtype = jnp.dtype(dtype)
    for part, (_, _, file) in PARTS.items():
        path = sd / part / file
        halves = {key: array.astype(dtype) for key, array in load_file(path).items()}
        save_file(halves, path.with_suffix(".fp16.safetensors"))
        if part != "vae":
            path.unlink()
    found = convert(sd)
    for part in found:
        out = sd.parent / "out" / (part if part != "unet" else "")
        arrays = state_dict(PARTS[part][0])
        prefix = "text_model." if part == "text_encoder" else ""
        flat = flax.traverse_util.flatten_dict(load_weights(out).params, sep="/")
        for path, leaf in flat.items():
            array = arrays[prefix + torch_key(path)]
            array = array if part == "vae" else array.astype(dtype).astype(np.float32)
            np.testing.assert_array_equal(leaf, from_torch(path, array))


def test_what_the_config_and_the_scheduler_say_reaches_the_network(sd):
    edit(
        sd / "scheduler" / "scheduler_config.json",
        _class_name="DDIMScheduler",
        prediction_type="v_prediction",
        beta_start=0.001,
        beta_end=0.02,
        clip_sample=True,
        timestep_spacing="trailing",
        set_alpha_to_one=None,
        steps_offset=0,
    )
    edit(sd / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    edit(sd / "unet" / "config.json", upcast_attention=True, norm_eps=1e-4, freq_shift=1)
    edit(sd / "vae" / "config.json", scaling_factor=0.5)
    convert(sd)
    out = sd.parent / "out"
    network = load_weights(out).network
    assert (network["prediction_type"], network["upcast_attention"]) == ("v_prediction", True)
    assert (network["beta_start"], network["beta_end"]) == (0.001, 0.02)
    assert (network["norm_eps"], network["freq_shift"]) == (1e-4, 1)
    assert load_weights(out / "vae").network["scaling_factor"] == 0.5
    scheduler = json.loads((out / "scheduler.json").read_text())
    # DDIMScheduler's own default, and not that of PNDMScheduler.
    assert (scheduler["timestep_spacing"], scheduler["set_alpha_to_one"]) == ("trailing", True)
    assert scheduler["steps_offset"] == 1  # to the pipeline, whatever the file says


def test_an_autoencoder_tiny_may_be_the_vae(sd):
    shutil.rmtree(sd / "vae")
    (sd / "taesd").rename(sd / "vae")
    edit(sd / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    convert(sd)
    assert load_weights(sd.parent / "out" / "vae").network["name"] == "autoencoder_tiny"


def test_a_full_disk_leaves_nothing(sd):
    out = sd.parent / "new" / "out"
    output = finish(start("convert", "diffusers", sd, out, largest_file=300_000), code=2)
    assert f"dmd-jax: error: weights could not be written to {out.with_name('.out.tmp')}" in output
    assert "Traceback" not in output and list(out.parent.iterdir()) == []


def test_memory_is_less_than_the_largest_file(sd, tmp_path):
    """Leaf by leaf: the whole file is never in memory, the largest of its arrays a few times."""
    wide = {"block_out_channels": [64, 512]}
    edit(sd / "unet/config.json", **wide)
    network = PARTS["unet"][0] | wide
    path = sd / "unet" / f"{NAME}.safetensors"
    save_file(state_dict(network), path)
    size = path.stat().st_size
    assert size > 90e6
    assert peak_of_convert("diffusers", sd, tmp_path / "out") < size
