"""`dmd-jax convert clip`: both towers of a CLIP, its tokenizer and numbers, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clip_folder import (
    CONFIG,
    NETWORKS,
    PREPROCESSOR,
    PROJECTIONS,
    save_clip,
    state_dict,
    write_clip,
)
from commands import fails, succeeds
from diffusers_folder import write_json
from safetensors.numpy import load_file, save_file

from dmd_jax.convert.clip_config import towers_from_config
from dmd_jax.convert.torch_layout import from_torch, torch_key
from dmd_jax.evaluation.clip_folder import Preparation, load_clip
from dmd_jax.models import abstract_params, complete

# What transformers 4 wrote of a tower besides its own keys.
OLDER = {
    "add_cross_attention": False,
    "architectures": None,
    "attention_dropout": 0,
    "bad_words_ids": None,
    "bos_token_id": 0,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0,
    "do_sample": False,
    "dropout": 0,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "initializer_factor": 1,
    "initializer_range": 0.02,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "pad_token_id": 1,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "task_specific_params": None,
    "temperature": 1,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1,
    "torch_dtype": None,
    "torchscript": False,
    "typical_p": 1,
    "use_bfloat16": False,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder, and what it converts to."""
    folder = tmp_path_factory.mktemp("made")
    write_clip(folder / "clip")
    succeeds("convert", "clip", folder / "clip", folder / "out")
    return folder / "clip", folder / "out"


@pytest.fixture
def clip(made, tmp_path):
    """A copy of the folder, to be changed."""
    return Path(shutil.copytree(made[0], tmp_path / "clip"))


def edit(path, part=None, **changes):
    """Sets keys of a JSON file, or of an object in it; None deletes."""
    content = json.loads(path.read_text())
    target = content if part is None else content[part]
    target |= changes
    for key in changes:
        if changes[key] is None:
            del target[key]
    write_json(path, content)


def params(out):
    """The parameters of both towers by our paths."""
    found = load_clip(out)
    towers = {"text": found.text, "vision": found.vision}
    return {
        tower: flax.traverse_util.flatten_dict(weights.params, sep="/")
        for tower, weights in towers.items()
    }


def check_params(out, arrays):
    for tower, flat in params(out).items():
        for path, leaf in flat.items():
            key = torch_key(path)
            key = key if key in PROJECTIONS else f"{tower}_model.{key}"
            np.testing.assert_array_equal(leaf, from_torch(path, arrays[key]))


def test_every_parameter_and_number_is_where_its_name_says(made):
    clip, out = made
    check_params(out, state_dict())
    found = load_clip(out)
    assert found.vision.network == complete(NETWORKS["vision"])
    assert found.text.network == complete(NETWORKS["text"])
    mean, std = PREPROCESSOR["image_mean"], PREPROCESSOR["image_std"]
    assert found.preparation == Preparation(16, 14, mean, std)
    scale = json.loads((out / "clip.json").read_text())["logit_scale"]
    assert scale == pytest.approx(4.6, rel=1e-6)
    assert found.tokenizer.max_length == 77
    for name in ("vocab.json", "merges.txt"):
        assert (out / "tokenizer" / name).read_bytes() == (clip / name).read_bytes()
    count = sum(leaf.size for flat in params(out).values() for leaf in flat.values())
    assert count == sum(array.size for array in state_dict().values()) - 1
    assert [path.name for path in out.parent.iterdir() if path.name[0] == "."] == []


def test_the_same_again_is_nothing_to_do(made, clip, capsys):
    succeeds("convert", "clip", clip, made[1])
    assert f"{made[1]} holds clip already" in capsys.readouterr().out
    edit(clip / "preprocessor_config.json", size=15)
    line = fails(capsys, "convert", "clip", clip, made[1])
    assert "exists and holds something else; expected a new or empty folder" in line


def test_older_files_give_the_same(made, clip):
    """All that transformers 4 wrote, the buffers, and half precision in two shards."""
    content = json.loads((clip / "config.json").read_text())
    for tower in NETWORKS:
        own = content[f"{tower}_config"]
        content |= {f"{tower}_config": OLDER | own, f"{tower}_config_dict": own}
    content["vision_config"]["eos_token_id"] = None
    write_json(clip / "config.json", content | {"torch_dtype": "float32"})
    arrays = {key: array.astype(jnp.bfloat16) for key, array in state_dict().items()}
    arrays |= {f"{tower}_model.embeddings.position_ids": np.arange(5)[None] for tower in NETWORKS}
    (clip / "model.safetensors").unlink()
    weight_map = {
        key: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, key in enumerate(arrays)
    }
    for shard in set(weight_map.values()):
        save_file({k: v for k, v in arrays.items() if weight_map[k] == shard}, clip / shard)
    write_json(clip / "model.safetensors.index.json", {"weight_map": weight_map})
    out = clip.parent / "out"
    succeeds("convert", "clip", clip, out)
    check_params(out, {key: array.astype(np.float32) for key, array in arrays.items()})
    assert load_clip(out).text.network == load_clip(made[1]).text.network
    assert load_clip(out).vision.network == load_clip(made[1]).vision.network


def test_the_oldest_options_count_first_and_bring_their_defaults(clip):
    """As in transformers, where text_config_dict replaces what text_config says."""
    edit(clip / "config.json", "text_config", hidden_act="gelu", layer_norm_eps=1e-3)
    edit(clip / "config.json", text_config_dict=CONFIG["text_config"] | {"layer_norm_eps": 1e-4})
    succeeds("convert", "clip", clip, clip.parent / "out")
    network = load_clip(clip.parent / "out").text.network
    assert network["hidden_act"] == "quick_gelu" and network["layer_norm_eps"] == 1e-4


def test_both_forms_of_the_processor(clip, made):
    current = PREPROCESSOR | {
        "crop_size": {"height": 14, "width": 14},
        "size": {"shortest_edge": 16},
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 0.00392156862745098,
        "image_processor_type": "CLIPImageProcessor",
    }
    write_json(clip / "preprocessor_config.json", current)
    succeeds("convert", "clip", clip, clip.parent / "first")
    (clip / "preprocessor_config.json").unlink()
    write_json(clip / "processor_config.json", {"image_processor": current})
    succeeds("convert", "clip", clip, clip.parent / "second")
    expected = load_clip(made[1]).preparation
    for name in ("first", "second"):
        assert load_clip(clip.parent / name).preparation == expected


@pytest.mark.parametrize(
    "part, changes, message",
    [
        (None, {"model_type": "siglip"}, "model_type is siglip; expected clip, which has both"),
        (None, {"architectures": ["CLIPVisionModel"]}, "architectures are not CLIPModel alone"),
        (None, {"magic": 3}, "magic is 3; no network of ours knows this option"),
        (None, {"text_config": [1]}, "text_config is no JSON object; expected one"),
        (None, {"projection_dim": "x"}, "option projection_dim is 'x'; expected int"),
        (None, {"projection_dim": 13}, "2 misshapen: text_projection.weight (12, 16), expected ("),
        ("text_config", {"hidden_act": "silu"}, "hidden_act is 'silu'; expected one of"),
        ("text_config", {"is_decoder": True}, "is_decoder is true; expected false"),
        ("text_config", {"pruned_heads": {"0": [1]}}, "pruned_heads is a dict; expected a dict"),
        ("text_config", {"with_projection": False}, "with_projection is false; no network of"),
        ("vision_config", {"attention_dropout": 0.5}, "is 0.5; expected 0.0"),
        ("vision_config", {"image_size": 21}, "crop_size is 14; expected 21, the vision tower's"),
        ("vision_config", {"image_size": [14, 14]}, "image_size is [14, 14]; expected int"),
        ("vision_config", {"num_hidden_layers": 2}, "16 missing: vision_model.encoder.layers.1."),
    ],
)
def test_configs_that_are_refused(clip, capsys, part, changes, message):
    edit(clip / "config.json", part, **changes)
    line = fails(capsys, "convert", "clip", clip, clip.parent / "out")
    assert message in line and str(clip) in line
    assert [path.name for path in clip.parent.iterdir()] == ["clip"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"do_resize": False}, "do_resize is false; expected true"),
        ({"resample": 2}, "resample is 2; expected 3"),
        ({"rescale_factor": 0.5}, "rescale_factor is 0.5; expected 0.0039"),
        ({"do_pad": True}, "do_pad is true; no network of ours knows this option"),
        ({"size": {"height": 16, "width": 16}}, "shortest_edge is {'height': 16, 'width': 16}"),
        ({"size": 10**6}, "shortest_edge is 1000000; expected 1 to 8192 pixels"),
        ({"size": True}, "shortest_edge is True; expected 1 to 8192 pixels"),
        ({"size": 13}, "crop_size is 14; expected at most shortest_edge, 13"),
        ({"crop_size": {"height": 14, "width": 15}}, "crop_size is {'height': 14, 'width': 15}"),
        ({"crop_size": 13}, "crop_size is 13; expected 14, the vision tower's image_size"),
        ({"image_mean": [0.5, 0.5]}, "mean is [0.5, 0.5]; expected three numbers"),
        ({"image_std": [1, 1, 0]}, "std is [1, 1, 0]; expected three numbers above 0"),
        ({"image_std": None}, "has no image_std; expected that of CLIP's image processor"),
    ],
)
def test_preprocessors_that_are_refused(clip, capsys, changes, message):
    edit(clip / "preprocessor_config.json", **changes)
    line = fails(capsys, "convert", "clip", clip, clip.parent / "out")
    assert message in line and "preprocessor_config.json" in line
    assert not (clip.parent / "out").exists()


def test_files_that_are_refused(clip, capsys):
    def line():
        return fails(capsys, "convert", "clip", clip, clip.parent / "out")

    def spoil(**changes):
        arrays = {k: v for k, v in (state_dict() | changes).items() if v is not None}
        save_file(arrays, clip / "model.safetensors")

    spoil(logit_scale=None)
    assert "does not fit" in line() and "1 missing: logit_scale" in line()
    spoil(logit_scale=np.ones(2, np.float32))
    assert "1 misshapen: logit_scale (2,), expected ()" in line()
    spoil(logit_scale=np.array(np.nan, np.float32))
    assert "logit_scale is nan; expected a finite number" in line()
    spoil(**{"vision_model.head.weight": np.ones(2, np.float32)})
    assert "1 extra: vision_model.head.weight" in line()
    arrays = load_file(clip / "model.safetensors")
    arrays = {key.removeprefix("text_model."): array for key, array in arrays.items()}
    save_file(arrays, clip / "model.safetensors")
    assert "missing: text_model.embeddings" in line()
    spoil(**{"text_projection.weight": np.full((12, 16), np.inf, np.float32)})
    assert "text_projection.weight has values that are not finite" in line()
    (clip / "model.safetensors").unlink()
    assert "holds no safetensors (pickles such as .bin" in line()
    (clip / "merges.txt").unlink()
    assert "expected vocab.json and merges.txt in it, or tokenizer.json" in line()
    (clip / "preprocessor_config.json").unlink()
    assert "has no preprocessor_config.json; expected CLIP's image processor" in line()
    write_json(clip / "processor_config.json", {"image_processor": 3})
    assert "processor_config.json has no image_processor; expected" in line()
    (clip / "config.json").unlink()
    assert "has no config.json; expected the folder of a CLIPModel" in line()


@pytest.mark.torch
def test_what_transformers_writes_is_the_same(made, tmp_path):
    save_clip(tmp_path / "clip")
    succeeds("convert", "clip", tmp_path / "clip", tmp_path / "out")
    ours, theirs = load_clip(made[1]), load_clip(tmp_path / "out")
    assert theirs.preparation == ours.preparation
    for which in ("text", "vision"):
        assert getattr(theirs, which).network == getattr(ours, which).network
    check_params(tmp_path / "out", state_dict())


@pytest.mark.parametrize(
    ("text", "vision", "width", "millions"),
    [
        # OpenCLIP's own counts of ViT-g-14 and ViT-bigG-14, in millions: text and vision.
        ((1024, 24, 16, 4096), (1408, 40, 16, 6144), 1024, (354.03, 1012.65)),
        ((1280, 32, 20, 5120), (1664, 48, 16, 8192), 1280, (694.66, 1844.91)),
    ],
    ids=["ViT-g-14", "ViT-bigG-14"],
)
def test_published_shapes_have_as_many_parameters_as_openclip_counts(text, vision, width, millions):
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    gelu = {"hidden_act": "gelu"}
    config = CONFIG | {
        "projection_dim": width,
        "text_config": dict(zip(names, text)) | gelu | {"eos_token_id": 2},
        "vision_config": dict(zip(names, vision)) | gelu | {"patch_size": 14},
    }
    networks = towers_from_config(config, "config.json")
    for tower, count in zip(("text", "vision"), millions):
        leaves = jax.tree.leaves(abstract_params(networks[tower]))
        assert round(sum(leaf.size for leaf in leaves) / 1e6, 2) == count
