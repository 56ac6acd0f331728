"""The head against the same layers in PyTorch, and its rule for other sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.errors import UserError
from dmd_jax.models import build_denoiser
from dmd_jax.models.heads import Head


def shapes_of(features):
    made = jax.eval_shape(lambda: Head().init(jax.random.key(0), jnp.zeros(features)))["params"]
    return {name: tuple(layer["kernel"].shape) for name, layer in made.items() if "kernel" in layer}


def test_layers_by_the_size_of_the_features():
    assert shapes_of((2, 8, 8, 64)) == {
        "down0_conv": (4, 4, 64, 64),
        "whole_conv": (4, 4, 64, 64),
        "logit": (64, 1),
    }
    # Stable Diffusion XL's 32x32: two more halvings.
    assert list(shapes_of((2, 32, 32, 32))) == [
        *("down0_conv", "down1_conv", "down2_conv", "logit", "whole_conv")
    ]
    # Digits' 4x4 or 2x2, odd sizes, sizes of other widths than heights, and vectors.
    assert shapes_of((2, 4, 4, 24)) == {"whole_conv": (4, 4, 24, 24), "logit": (24, 1)}
    assert shapes_of((2, 7, 7, 8))["whole_conv"] == (3, 3, 8, 8)
    assert shapes_of((2, 8, 12, 8))["whole_conv"] == (2, 3, 8, 8)
    assert shapes_of((2, 1, 8, 8))["whole_conv"] == (1, 8, 8, 8)
    assert shapes_of((2, 16)) == {"hidden": (16, 16), "logit": (16, 1)}
    with pytest.raises(UserError, match=r"features have shape \(2, 3, 4\)"):
        shapes_of((2, 3, 4))


def test_equals_the_layers_in_pytorch():
    torch = pytest.importorskip("torch", reason="needs tests/requirements-torch.txt")
    rng = np.random.default_rng(0)
    features = rng.standard_normal((3, 8, 8, 64)).astype(np.float32)
    params = jax.tree.map(
        lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32),
        jax.eval_shape(lambda: Head().init(jax.random.key(0), jnp.asarray(features)))["params"],
    )

    def block(h, name, **options):
        conv, norm = params[f"{name}_conv"], params[f"{name}_norm"]
        kernel, *rest = map(torch.tensor, (conv["kernel"], conv["bias"], *norm.values()))
        h = torch.nn.functional.conv2d(h, kernel.permute(3, 2, 0, 1), rest[0], **options)
        scale, bias = torch.tensor(norm["scale"]), torch.tensor(norm["bias"])
        return torch.nn.functional.silu(
            torch.nn.functional.group_norm(h, 32, scale, bias, eps=1e-5)
        )

    h = torch.tensor(features).permute(0, 3, 1, 2)
    h = block(block(h, "down0", stride=2, padding=1), "whole", stride=4)[:, :, 0, 0]
    last = params["logit"]
    expected = (h @ torch.tensor(last["kernel"]) + torch.tensor(last["bias"]))[:, 0]
    found = jax.jit(Head().apply)({"params": params}, features)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


NETWORKS = {
    "songunet": (
        dict(
            img_resolution=8,
            in_channels=1,
            out_channels=1,
            model_channels=16,
            channel_mult=(1, 2),
            num_blocks=1,
        ),
        ("enc_8x8_conv", "enc_4x4_block0"),
        (4, 4, 32),
    ),
    "mlp": (dict(dim=2, width=16, depth=3), ("layer0", "layer1"), (16,)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_the_bottleneck_of_the_network(name):
    """Only layers up to the bottleneck change them; those after it are not even asked."""
    options, before, shape = NETWORKS[name]
    denoiser = build_denoiser(dict(name=name, **options))
    params = denoiser.init(jax.random.key(0))
    level = denoiser.schedule.level(jnp.array([100, 900]))
    x_t = jax.random.normal(jax.random.key(1), (2, *denoiser.sample_shape))
    run = jax.jit(lambda params: denoiser.features(params, x_t, level, None))
    features = run(params)
    assert features.shape == (2, *shape) and features.dtype == jnp.float32
    gradient = jax.grad(lambda params: run(params).sum())(params)
    reached = {name for name, part in gradient.items() if any(map(np.any, jax.tree.leaves(part)))}
    assert set(before) <= reached
    assert not any(one.startswith(("dec_", "out", "layer2", "affine2")) for one in reached)


def test_the_mixture_has_no_features():
    network = dict(name="gaussian_mixture", means=((0.0, 0.0),), stds=(1.0,), weights=(1.0,))
    assert build_denoiser(network).features is None


@pytest.mark.parametrize("channels", [4, 16, 24, 40, 64, 96, 320])
def test_logits_depend_on_the_features_at_every_width(channels):
    """A norm over a single value would leave nothing of them."""
    features = jax.random.normal(jax.random.key(1), (2, 4, 4, channels))
    params = Head().init(jax.random.key(0), features)
    logits = jax.jit(Head().apply)(params, features)
    assert abs(logits[0] - logits[1]) > 1e-3
