"""EDM preconditioning and the door through which a configuration becomes a denoiser."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.errors import UserError
from dmd_jax.method.schedules import NoiseLevel, NoiseSchedule, edm_level
from dmd_jax.models import build_denoiser, complete, discrete_denoiser, edm_denoiser, guided

SIGMA = np.array([0.002, 0.5, 80.0])
MLP = {"name": "mlp", "dim": 2, "width": 8, "depth": 1}


def test_preconditioning_is_the_equation():
    sigma_data = 0.7

    def apply(params, x, c_noise, labels):
        assert labels is None
        return (params * x + c_noise[:, None]).astype(jnp.bfloat16)

    denoise = edm_denoiser(apply, sigma_data=sigma_data)
    x = np.random.default_rng(0).standard_normal((3, 4)) * SIGMA[:, None]
    actual = denoise(2.0, jnp.asarray(x, jnp.float32), edm_level(SIGMA), None)

    sigma, total = SIGMA[:, None], SIGMA[:, None] ** 2 + sigma_data**2
    raw = 2 * x / np.sqrt(total) + np.log(sigma) / 4
    expected = sigma_data**2 / total * x + sigma * sigma_data / np.sqrt(total) * raw
    assert actual.dtype == jnp.float32
    # Only the network's own output is rounded to bfloat16 (8 bits), never the skip connection.
    bound = 2**-8 * np.abs(sigma * sigma_data / np.sqrt(total) * raw) + 1e-6 * np.abs(x)
    assert np.all(np.abs(actual - expected) <= bound)


def test_labels_are_one_hot_and_none_is_zeros():
    def apply(params, x, c_noise, labels):
        return labels

    denoise = edm_denoiser(apply, label_dim=3)
    x, level = jnp.zeros((2, 3)), edm_level(jnp.array([0.5, 0.5]))
    c_out = 0.5 * 0.5 / 0.5**0.5
    labelled = denoise(None, x, level, jnp.array([2, 0]))
    np.testing.assert_allclose(labelled, [[0, 0, c_out], [c_out, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(denoise(None, x, level, None), np.zeros((2, 3)))


def test_labels_are_ignored_by_an_unconditional_network():
    denoise = edm_denoiser(lambda params, x, c_noise, labels: x if labels is None else x[:1])
    x, level = jnp.ones((2, 3)), edm_level(jnp.array([0.5, 2.0]))
    np.testing.assert_array_equal(
        denoise(None, x, level, jnp.array([1, 2])), denoise(None, x, level, None)
    )


def test_a_network_of_another_output_shape_is_refused():
    denoise = edm_denoiser(lambda params, x, c_noise, labels: x[..., :1])
    with pytest.raises(UserError, match=r"shape \(2, 1\); expected x_t's, \(2, 3\)"):
        denoise(None, jnp.ones((2, 3)), edm_level(jnp.ones(2)), None)


ALPHA, SPREAD = np.array([[0.9, 0.6, 0.07]]).T, np.array([[0.19, 0.64, 0.9951]]).T ** 0.5
LEVEL = NoiseLevel(*(jnp.float32(v[:, 0]) for v in (ALPHA, SPREAD, np.array([[20, 400, 999]]).T)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "prediction_type, raw_of",
    [
        ("epsilon", lambda x0, noise: noise),
        ("v_prediction", lambda x0, noise: ALPHA * noise - SPREAD * x0),
        ("sample", lambda x0, noise: x0),
    ],
)
def test_the_clean_image_is_found_from_what_the_network_predicts(prediction_type, raw_of, dtype):
    x0, noise = np.random.default_rng(0).standard_normal((2, 3, 4))
    # Numbers that bfloat16 holds, so that what is left is the rounding of the equation itself.
    x0, noise = (np.float64(jnp.asarray(v, jnp.bfloat16)) for v in (x0, noise))
    raw = np.float64(jnp.asarray(raw_of(x0, noise), dtype))
    seen = []

    def apply(params, x, time, cond, *, extra):
        seen.append((x.dtype, params, time, cond, extra))
        return jnp.asarray(raw, dtype)

    denoise = discrete_denoiser(apply, prediction_type=prediction_type)
    x_t = jnp.float32(ALPHA * x0 + SPREAD * noise)
    actual = denoise("params", x_t, LEVEL, "cond", extra=5)
    assert actual.dtype == jnp.float32
    # v in bfloat16 has 8 bits; dividing by alpha = 0.07 makes the rounding of x_t 14 times more.
    atol = 2**-8 if prediction_type == "v_prediction" and dtype == jnp.bfloat16 else 5e-6
    np.testing.assert_allclose(actual, x0, atol=atol * np.abs(raw).max())
    ((x_dtype, params, time, cond, extra),) = seen
    assert (x_dtype, params, cond, extra) == (jnp.float32, "params", "cond", 5)
    np.testing.assert_array_equal(time, [20, 400, 999])


def test_a_discrete_network_of_another_kind_or_shape_is_refused():
    with pytest.raises(UserError, match=r"'noise'; expected one of epsilon, v_prediction, sample"):
        discrete_denoiser(lambda *_: None, prediction_type="noise")
    denoise = discrete_denoiser(lambda params, x, time, cond: x[:1])
    with pytest.raises(UserError, match=r"shape \(1, 2\); expected x_t's, \(3, 2\)"):
        denoise(None, jnp.ones((3, 2)), LEVEL, None)


@pytest.mark.torch
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_clean_image_is_that_of_diffusers(prediction_type):
    import diffusers
    import torch

    peer = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=prediction_type,
    )
    peer.set_timesteps(1000)
    x_t, raw = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    denoise = discrete_denoiser(lambda *_: jnp.asarray(raw), prediction_type=prediction_type)
    times = [1, 500, 999]
    level = NoiseSchedule.scaled_linear().level(jnp.array(times))
    actual = denoise(None, jnp.asarray(x_t), level, None)
    for i, t in enumerate(times):
        step = peer.step(torch.tensor(raw[i]), t, torch.tensor(x_t[i]))
        # diffusers' table is accumulated in float32, which leaves 1e-5 at the noisy end.
        expected = step.pred_original_sample.numpy()
        np.testing.assert_allclose(actual[i], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("at_once", [True, False])
def test_guidance_is_the_published_one_on_the_noise(at_once):
    """Predicting the noise, guided, and then x0 from it, for conditions that are a pytree."""
    rng = np.random.default_rng(0)
    x_t, text, pooled, empty = rng.standard_normal((4, 3, 4)).astype(np.float32)
    cond, uncond = {"text": text, "pooled": pooled}, {"text": empty[:1], "pooled": pooled}
    calls = []

    def noise(np_, x, time, cond):
        return np_.tanh(x + cond["text"] * time[:, None] / 500) * cond["pooled"]

    def apply(params, x, time, cond):
        calls.append(x.shape[0])
        return noise(jnp, x, time, cond)

    time = np.array([20, 400, 999])
    for guidance in (0.0, 0.5, 1.0, 7.5):
        denoise = guided(discrete_denoiser(apply), guidance, at_once=at_once)
        actual = denoise(None, jnp.asarray(x_t), LEVEL, jax.tree.map(jnp.asarray, (cond, uncond)))
        without, with_text = noise(np, x_t, time, uncond), noise(np, x_t, time, cond)
        expected = (x_t - SPREAD * (without + guidance * (with_text - without))) / ALPHA
        np.testing.assert_allclose(actual, expected, atol=1e-6 * np.abs(expected).max())
    # Guidance 1 is the network as it is, of which nothing else is asked.
    assert calls == ([6, 6, 3, 6] if at_once else [3, 3, 3, 3])


@pytest.mark.parametrize("at_once", [True, False])
def test_a_guided_batch_stays_on_its_devices(at_once):
    devices = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    batch = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec())
    apply = lambda params, x, time, cond: x * params + cond  # noqa: E731
    denoise = guided(discrete_denoiser(apply), 3.0, at_once=at_once)
    spec = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=batch)
    level = NoiseLevel(*[jax.ShapeDtypeStruct((16,), jnp.float32, sharding=batch)] * 3)
    uncond = jax.ShapeDtypeStruct((1, 4), jnp.float32, sharding=whole)
    compiled = jax.jit(denoise).lower(2.0, spec, level, (spec, uncond)).compile()
    assert compiled.output_shardings.is_equivalent_to(batch, 2)
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in compiled.as_text()


def test_guidance_in_two_calls_takes_the_memory_of_one():
    """Of a network that needs 1024 hidden numbers an example: half the temporaries, within 10 %."""

    def temporaries(at_once):
        weights = jax.ShapeDtypeStruct((4, 1024), jnp.float32)
        x, times = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 4), (64,)))
        apply = lambda params, x, time, cond: jnp.sin((x + cond) @ params) @ params.T  # noqa: E731
        denoise = guided(discrete_denoiser(apply), 3.0, at_once=at_once)
        cond = jax.ShapeDtypeStruct((64, 1), jnp.float32)
        lowered = jax.jit(denoise).lower(weights, x, NoiseLevel(*[times] * 3), (cond, cond))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(True) >= 2 * 64 * 1024 * 4
    assert temporaries(False) <= 0.55 * temporaries(True)


@pytest.mark.parametrize("guidance", [-0.5, float("nan"), float("inf")])
def test_impossible_guidance_is_refused(guidance):
    with pytest.raises(UserError, match=f"guidance is {guidance}; expected a number of at least 0"):
        guided(lambda *_: None, guidance)


def test_a_built_denoiser_says_what_it_denoises():
    network = {"name": "songunet", "img_resolution": 8, "in_channels": 1, "out_channels": 1}
    network |= {"label_dim": 10, "channel_mult": [1, 2]}
    denoiser = build_denoiser(network)
    assert (denoiser.sample_shape, denoiser.num_classes) == ((8, 8, 1), 10)
    mixture = build_denoiser({"name": "gaussian_mixture", "means": [[0.0, 1.0]], "stds": [1.0]})
    assert (mixture.sample_shape, mixture.num_classes) == ((2,), 0)
    for built in (denoiser, mixture):
        assert built.cond_shape is None
        np.testing.assert_array_equal(built.schedule.sigmas, NoiseSchedule.edm().sigmas)


def test_sigma_data_is_an_option():
    denoiser = build_denoiser(MLP | {"sigma_data": 2.0, "zero_init": True})
    x = jnp.ones((3, 2))
    actual = denoiser.denoise(denoiser.init(jax.random.key(0)), x, edm_level(SIGMA), None)
    np.testing.assert_allclose(actual[:, 0], 4 / (4 + SIGMA**2), rtol=1e-6)


def test_complete_makes_mappings_of_one_network_equal():
    full = {"name": "mlp", "dim": 2, "label_dim": 0, "width": 8, "depth": 1}
    full |= {"embedding_type": "positional", "embedding_features": 64, "fourier_scale": 1.0}
    full |= {"zero_init": False, "sigma_data": 0.5}
    assert complete(MLP) == complete(complete(MLP)) == full
    assert complete(MLP | {"sigma_data": 1}) != full
    unet = {"name": "dhariwal", "img_resolution": 64, "in_channels": 3, "out_channels": 3}
    spelled = unet | {"channel_mult": (1, 2, 3, 4), "attn_resolutions": [32, 16, 8]}
    assert complete(unet) == complete(spelled) and complete(unet)["channel_mult"] == [1, 2, 3, 4]
    assert list(complete(unet))[:2] == ["name", "img_resolution"]
    mixture = {"name": "gaussian_mixture", "means": [[0.0]], "stds": [1.0]}
    assert complete(mixture) == mixture | {"weights": None}
    with pytest.raises(UserError, match="no option 'wdith'"):
        complete(MLP | {"wdith": 4})


@pytest.mark.parametrize(
    "network, dtype, message",
    [
        ({"name": "unet"}, "float32", "'unet'; expected one of songunet, dhariwal, mlp"),
        ({}, "float32", "network name is None"),
        ({"name": ["mlp"]}, "float32", r"network name is \['mlp'\]"),
        (MLP | {"wdith": 4}, "float32", r"no option 'wdith'; expected some of dim, .*width"),
        (MLP | {"dtype": "float32"}, "float32", "no option 'dtype'"),
        ({"name": "mlp"}, "float32", "mlp lacks the option dim"),
        (MLP, "float8", "dtype is 'float8'; expected one of float32, bfloat16"),
        (MLP | {"embedding_type": "rope"}, "float32", "embedding_type is 'rope'"),
        (MLP | {"embedding_features": 7}, "float32", "embedding_features is 7"),
    ],
)
def test_bad_networks_are_refused(network, dtype, message):
    with pytest.raises(UserError, match=message):
        build_denoiser(network, dtype=dtype)
