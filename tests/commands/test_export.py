"""`dmd-jax export diffusers`: what PyTorch loads, and what comes back of it."""

from __future__ import annotations

import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import fails, succeeds
from diffusers_folder import PARTS, UNET_V2, save_pipeline, state_dict, write_json
from safetensors.numpy import load_file

from dmd_jax.convert.torch_layout import from_torch, torch_key
from dmd_jax.method import samplers
from dmd_jax.models import abstract_params, build_denoiser, build_network, complete
from dmd_jax.sampling.maker import generator_sampler_of, steps_of
from dmd_jax.storage.checkpoints import Checkpoints
from dmd_jax.storage.weights import Weights, load_weights, save_weights
from dmd_jax.teachers.family import generator_sampler

V1 = PARTS["unet"][0]
V2 = V1 | UNET_V2 | {"prediction_type": "v_prediction"}
FILE = "unet/diffusion_pytorch_model.safetensors"


def drawn_unet(network):
    """Parameters of ours, which PyTorch has as state_dict(network)."""
    arrays = state_dict(network)
    paths = flax.traverse_util.flatten_dict(abstract_params(network), sep="/")
    flat = {path: from_torch(path, arrays[torch_key(path)]) for path in paths}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


@pytest.fixture(scope="module")
def params():
    return drawn_unet(V1)


@pytest.fixture
def weights(params, tmp_path):
    save_weights(tmp_path / "weights", Weights(V1, params, "a test's"))
    return tmp_path / "weights"


def test_names_layouts_and_configs(weights, tmp_path, capsys):
    out = tmp_path / "out"
    succeeds("export", "diffusers", weights, out)
    arrays, expected = load_file(out / FILE), state_dict(V1)
    assert arrays.keys() == expected.keys()
    for key, array in expected.items():
        assert arrays[key].dtype == np.float32
        np.testing.assert_array_equal(arrays[key], array)
    config = json.loads((out / "unet" / "config.json").read_text())
    assert config["_class_name"] == "UNet2DConditionModel"
    assert config["block_out_channels"] == V1["block_out_channels"]
    assert not {"name", "prediction_type", "beta_start", "num_train_timesteps"} & config.keys()
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "DDIMScheduler"
    assert (scheduler["timestep_spacing"], scheduler["prediction_type"]) == ("trailing", "epsilon")
    assert (scheduler["set_alpha_to_one"], scheduler["clip_sample"]) == (True, False)
    assert (scheduler["beta_start"], scheduler["beta_end"]) == (0.00085, 0.012)
    assert scheduler["steps_offset"] == 1  # or StableDiffusionPipeline warns
    assert {path.name for path in tmp_path.iterdir()} == {"out", "weights"}
    line = fails(capsys, "export", "diffusers", weights, out)
    assert f"{out} exists and holds something else; expected a new or empty folder" in line


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(weights, tmp_path, dtype):
    succeeds("export", "diffusers", weights, tmp_path / "out", "--dtype", dtype)
    arrays = load_file(tmp_path / "out" / FILE)
    for key, array in state_dict(V1).items():
        assert arrays[key].dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(arrays[key], array.astype(jnp.dtype(dtype)))


def test_a_workdir_gives_its_average(params, tmp_path):
    workdir = tmp_path / "run"
    average = jax.tree.map(lambda leaf: leaf + np.float32(1), params)
    state = {"ema": average, "generator": {"params": params}}
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save(3, state, {})
    checkpoints.close()
    write_json(workdir / "config.json", {"config": {"network": V1}})
    succeeds("export", "diffusers", workdir, tmp_path / "out")
    arrays = load_file(tmp_path / "out" / FILE)
    for key, array in state_dict(V1).items():
        np.testing.assert_array_equal(arrays[key], array + np.float32(1))


def test_what_is_refused(weights, params, tmp_path, capsys):
    def line(checkpoint, *arguments):
        found = fails(capsys, "export", "diffusers", checkpoint, tmp_path / "out", *arguments)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
        return found

    mlp = {"name": "mlp", "dim": 2}
    made = jax.device_get(build_denoiser(mlp).init(jax.random.key(0)))
    save_weights(tmp_path / "mlp", Weights(mlp, made, "a test's"))
    message = f"{tmp_path / 'mlp'} holds network mlp; expected unet2d_condition, the only one that"
    assert message in line(tmp_path / "mlp")
    assert "no such folder" in line(tmp_path / "no")
    assert "invalid choice: 'int8'" in line(weights, "--dtype", "int8")
    params = params | {"conv_in": {**params["conv_in"], "bias": np.full(16, 1e5, np.float32)}}
    save_weights(tmp_path / "large", Weights(V1, params, "a test's"))
    message = "conv_in.bias has values that float16 cannot hold; expected finite ones"
    assert message in line(tmp_path / "large", "--dtype", "float16")
    assert "KIND" in fails(capsys, "export")
    assert "unexpected argument '--fast'" in line(weights, "--fast")


@pytest.mark.torch
@pytest.mark.parametrize("network", [V1, V2], ids=["v1", "v2"])
def test_pytorch_loads_it_and_makes_the_same(tmp_path, network):
    """To 5e-5 of the largest magnitude: the raw network, and the latents of its one step."""
    import torch
    from diffusers import DDIMScheduler, UNet2DConditionModel

    params = drawn_unet(network)
    save_weights(tmp_path / "weights", Weights(network, params, "a test's"))
    succeeds("export", "diffusers", tmp_path / "weights", tmp_path / "out")
    unet, info = UNet2DConditionModel.from_pretrained(
        tmp_path / "out", subfolder="unet", output_loading_info=True
    )
    assert not any(info.values()), info
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999]

    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, 8, 8, 4), np.float32)
    text = rng.standard_normal((2, 77, 16), np.float32)
    with torch.no_grad():
        theirs = torch.from_numpy(z.transpose(0, 3, 1, 2))
        raw = unet(theirs, 999, torch.from_numpy(text)).sample
        x0 = scheduler.step(raw, 999, theirs).prev_sample
    raw, x0 = (array.numpy().transpose(0, 2, 3, 1) for array in (raw, x0))

    denoiser = build_denoiser(network)
    level = denoiser.schedule.level(jnp.full(2, 999))
    apply = build_network(network).apply
    for ours, expected in (
        (jax.jit(apply)({"params": params}, z, level.time, text), raw),
        (jax.jit(denoiser.denoise)(params, z, level, text), x0),
    ):
        assert np.abs(ours - expected).max() < 5e-5 * np.abs(expected).max()


@pytest.mark.torch
def test_pytorch_makes_the_four_steps_of_a_generator_that_has_them(params, tmp_path):
    """From the same latents and noise: to 1e-5 of the largest magnitude."""
    import torch
    from diffusers import LCMScheduler, UNet2DConditionModel

    weights = Weights(V1, params, "a test's", generator={"num_steps": 4})
    save_weights(tmp_path / "weights", weights)
    succeeds("export", "diffusers", tmp_path / "weights", tmp_path / "out")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out", subfolder="unet")
    scheduler = LCMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]

    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, 8, 8, 4), np.float32)
    text = rng.standard_normal((2, 77, 16), np.float32)
    key = jax.random.key(5)
    noise = [samplers.few_step_noise(key, z.shape, step) for step in range(1, 4)]
    latents, generator = torch.from_numpy(z.transpose(0, 3, 1, 2)), torch.Generator()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        drawn = iter(noise)
        patch.setattr(
            "diffusers.schedulers.scheduling_lcm.randn_tensor",
            lambda *args, **kwargs: torch.tensor(np.asarray(next(drawn)).transpose(0, 3, 1, 2)),
        )
        for t in scheduler.timesteps:
            raw = unet(latents, t, torch.from_numpy(text)).sample
            latents = scheduler.step(raw, t, latents, generator=generator).prev_sample
    expected = latents.numpy().transpose(0, 2, 3, 1)

    pipeline = stable_diffusion_sampler(load_weights(tmp_path / "weights"))
    found = pipeline({"network": params}, z, text, key)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def stable_diffusion_sampler(weights):
    """What `sample` runs with these weights: the generator's own sampler."""
    asked = weights.generator
    name = generator_sampler_of(asked)
    assert name == "few-step"
    denoiser = build_denoiser(weights.network)
    return jax.jit(generator_sampler(denoiser, steps_of(name, asked, 50)))


@pytest.mark.torch
@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
def test_a_folder_of_diffusers_comes_back_to_the_bit(tmp_path, v2):
    from torch_weights import params_of

    options = {"variant": "fp16", "max_shard_size": "300KB"} if v2 else {}
    pipeline = save_pipeline(tmp_path / "sd", v2=v2, **options)
    sd, taesd = tmp_path / "sd", tmp_path / "sd" / "taesd"
    shards = {".fp16-00003-of-" in path.name for path in (sd / "unet").iterdir()}
    assert (True in shards) == v2
    succeeds("convert", "diffusers", sd, tmp_path / "in", "--taesd", taesd)
    modules = {"": pipeline.unet, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    for part, module in modules.items():
        weights = load_weights(tmp_path / "in" / part)
        expected = params_of(module, build_network(weights.network), without="text_model.")
        jax.tree.map(np.testing.assert_array_equal, weights.params, expected)
    network = load_weights(tmp_path / "in").network
    assert network == complete(V2 if v2 else V1)
    assert load_weights(tmp_path / "in" / "taesd").network == complete(PARTS["taesd"][0])

    # convert(export(x)) = x: its UNet and scheduler in place of the folder's own.
    succeeds("export", "diffusers", tmp_path / "in", tmp_path / "out")
    for part in ("unet", "scheduler"):
        (sd / part).rename(tmp_path / part)
        (tmp_path / "out" / part).rename(sd / part)
    index = json.loads((sd / "model_index.json").read_text())
    write_json(sd / "model_index.json", index | {"scheduler": ["diffusers", "DDIMScheduler"]})
    succeeds("convert", "diffusers", sd, tmp_path / "back", "--taesd", taesd)
    for part in ("", "vae", "text_encoder", "taesd"):
        before, after = (load_weights(tmp_path / name / part) for name in ("in", "back"))
        assert before.network == after.network
        jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
