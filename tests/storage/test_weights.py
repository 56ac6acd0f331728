"""Weights folders keep every bit, and refuse what is not of their own architecture."""

import json

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from dmd_jax.errors import UserError
from dmd_jax.models import abstract_params, build_denoiser
from dmd_jax.parallel.sharding import AXES, infer_shardings, make_mesh, place, to_host
from dmd_jax.storage.seals import read_sealed, write_sealed
from dmd_jax.storage.weights import (
    Weights,
    denoiser_of,
    load_weights,
    packaged,
    params_sha256,
    save_class_names,
    save_from_devices,
    save_leaves,
    save_weights,
)

NETWORK = {"name": "mlp", "dim": 2}


@pytest.fixture
def folder(tmp_path):
    params = jax.device_get(build_denoiser(NETWORK).init(jax.random.key(0)))
    save_weights(tmp_path, Weights(NETWORK, params, "a test's"))
    return tmp_path, params


def test_round_trip_to_the_bit(folder):
    path, params = folder
    found = load_weights(path)
    assert found.network == NETWORK and found.description == "a test's"
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    config = json.loads((path / "config.json").read_text())
    assert config["params_sha256"] == params_sha256(found.params) == params_sha256(params)


CONDITIONAL = {"name": "songunet", "img_resolution": 8, "in_channels": 1, "out_channels": 1}
CONDITIONAL |= {
    "label_dim": 3,
    "model_channels": 8,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
}


def test_names_of_classes_are_kept_and_checked(tmp_path):
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_params(CONDITIONAL))
    names = ("ant", None, "dög")
    save_weights(tmp_path, Weights(CONDITIONAL, params, "a test's", class_names=names))
    assert load_weights(tmp_path).class_names == names
    config, _ = read_sealed(tmp_path / "config.json", "a test's")
    for wrong in (["ant"], ["a", "b", 3], "abc", {"a": 1}):
        write_sealed(tmp_path / "config.json", config | {"class_names": wrong})
        with pytest.raises(UserError, match="config.json: .*class_names"):
            load_weights(tmp_path)
    del config["class_names"]
    write_sealed(tmp_path / "config.json", config)
    assert load_weights(tmp_path).class_names is None


def test_a_run_with_other_names_of_classes_is_refused(tmp_path):
    save_class_names(tmp_path, None)
    assert not list(tmp_path.iterdir())
    save_class_names(tmp_path, ("a", "b"))
    save_class_names(tmp_path, ("a", "b"))
    with pytest.raises(UserError, match="classes.json: the run began with other names"):
        save_class_names(tmp_path, ("b", "a"))
    assert read_sealed(tmp_path / "classes.json", "a test's") == ({"class_names": ["a", "b"]}, True)


@pytest.mark.parametrize(
    "network",
    [
        {"name": "clip_text", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8}
        | {"num_hidden_layers": 1, "num_attention_heads": 2},
        {"name": "autoencoder_tiny", "encoder_block_out_channels": [8] * 4}
        | {"decoder_block_out_channels": [8] * 4},
    ],
    ids=lambda network: network["name"],
)
def test_networks_that_denoise_nothing(tmp_path, network):
    """Leaf by leaf, as a conversion writes them."""
    rng = np.random.default_rng(0)
    layout = flax.traverse_util.flatten_dict(abstract_params(network), sep="/")
    leaves = {name: rng.standard_normal(leaf.shape, np.float32) for name, leaf in layout.items()}
    save_leaves(tmp_path / "vae", Weights(network, layout, "a test's"), leaves.__getitem__)
    found = load_weights(tmp_path / "vae")
    assert flax.traverse_util.flatten_dict(found.params, sep="/").keys() == leaves.keys()
    for name, leaf in flax.traverse_util.flatten_dict(found.params, sep="/").items():
        np.testing.assert_array_equal(leaf, leaves[name])
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert config["params_sha256"] == params_sha256(found.params)
    with pytest.raises(UserError, match=f"network {network['name']} denoises nothing"):
        denoiser_of(found)


def test_sha_sees_names_shapes_and_values():
    leaf = np.arange(4, dtype=np.float32)
    trees = [
        {"a": leaf},
        {"b": leaf},
        {"a": leaf.reshape(2, 2)},
        {"a": leaf.astype(np.float16)},
        {"a": leaf[::-1]},
        {"a": {"b": leaf}},
        {"a": leaf[:1]},
        {"a": leaf[0]},
    ]
    assert len({params_sha256(tree) for tree in trees}) == len(trees)


def test_another_architecture_is_refused(folder):
    path, _ = folder
    config, _ = read_sealed(path / "config.json", "a test's")
    config["network"]["dim"] = 3
    write_sealed(path / "config.json", config)
    with pytest.raises(UserError, match=r"another architecture.*expected \("):
        load_weights(path)
    config["network"]["name"] = "unknown"
    write_sealed(path / "config.json", config)
    with pytest.raises(UserError, match="network name is 'unknown'"):
        load_weights(path)


def test_names_that_make_no_tree_are_refused(tmp_path):
    leaf = np.zeros(2, np.float32)
    save_leaves(tmp_path, Weights(NETWORK, {"a": leaf, "a/b": leaf}, "a test's"), lambda _: leaf)
    with pytest.raises(UserError, match="another architecture.* is missing"):
        load_weights(tmp_path)


def test_configs_and_paths_that_cannot_be_read(folder):
    path, _ = folder
    (path / "config.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="config.json cannot be read as JSON .nested too deeply"):
        load_weights(path)
    (path / "config.json").write_text(json.dumps({"network": ["x"] * 999}))
    with pytest.raises(UserError, match="expected options") as caught:
        load_weights(path)
    assert len(str(caught.value)) < len(str(path)) + 200
    with pytest.raises(UserError, match="File name too long.*expected a path that can be read"):
        load_weights(path / ("x" * 300))


def test_the_digits_teacher_ships_whole():
    folder = packaged("digits_teacher")
    config = json.loads((folder / "config.json").read_text())
    assert params_sha256(load_weights(folder).params) == config["params_sha256"]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2e6


@pytest.mark.parametrize("dtype", [np.int32, np.float64, np.uint8, bool])
def test_arrays_of_other_types_are_refused_by_name(folder, dtype):
    path, params = folder
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    first = sorted(flat)[0]
    save_file(flat | {first: flat[first].astype(dtype)}, path / "model.safetensors")
    with pytest.raises(UserError, match=f"{first} is [A-Z0-9]+; expected F32 or BF16 or F16"):
        load_weights(path)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_halves_are_read_as_they_are(tmp_path, folder, dtype):
    _, params = folder
    halves = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    save_weights(tmp_path / "halves", Weights(NETWORK, halves, "a test's"))
    found = load_weights(tmp_path / "halves").params
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(halves), strict=True):
        assert a.dtype == dtype
        np.testing.assert_array_equal(a, b)


def bytes_on_devices():
    """What JAX's arrays take of each device; several may be of one buffer."""
    buffers = {}
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            buffers[shard.device, shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    found = dict.fromkeys(jax.devices(), 0)
    for (device, _), nbytes in buffers.items():
        found[device] += nbytes
    return found


@pytest.mark.parametrize("mesh", [(1, 8), (2, 4), (8, 1)], ids=str)
def test_sharded_parameters_are_written_leaf_by_leaf(tmp_path, monkeypatch, mesh):
    """The files of whole host arrays, and no device holds more than its shards and one leaf."""
    network = {"name": "mlp", "dim": 2, "width": 256, "depth": 6}
    params = jax.device_get(build_denoiser(network).init(jax.random.key(0)))
    weights = Weights(network, params, "a test's")
    save_weights(tmp_path / "host", weights)
    shardings = infer_shardings(params, make_mesh(*mesh))
    placed = place(params, shardings)
    before, grown, asked = bytes_on_devices(), [], []

    def watched(leaf):
        whole = to_host(leaf)
        during = bytes_on_devices()
        grown.append(max(during[device] - before[device] for device in before))
        asked.append(whole.nbytes)
        return whole

    monkeypatch.setattr("dmd_jax.storage.weights.to_host", watched)
    save_from_devices(tmp_path / "devices", weights._replace(params=placed))
    for name in ("model.safetensors", "config.json"):
        expected = (tmp_path / "host" / name).read_bytes()
        assert (tmp_path / "devices" / name).read_bytes() == expected
    leaves = jax.tree.leaves(params)
    assert sorted(asked) == sorted(leaf.nbytes for leaf in leaves) and len(leaves) > 10
    assert max(grown) < max(asked) < sum(asked) / 4


def test_a_leaf_on_the_host_is_whole_whatever_its_sharding():
    mesh = make_mesh(2, 4)
    for shape, spec in (((), ()), ((8,), ("data",)), ((4, 8), (None, "fsdp")), ((8, 3), (AXES,))):
        array = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
        for dtype in ("float32", "bfloat16", "int32"):
            leaf = jax.device_put(array.astype(dtype), NamedSharding(mesh, PartitionSpec(*spec)))
            found = to_host(leaf)
            assert found.dtype == leaf.dtype
            np.testing.assert_array_equal(found, array.astype(dtype))
