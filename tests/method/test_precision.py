"""The precision of every product in the programs that this package builds, read and not run.

A CPU multiplies in float32 whatever the precision is: no number that it computes would tell.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from commands import ROOT
from diffusers_folder import TAESD, TEXT, UNET, UNET_V2, VAE
from jax import lax
from products import products_of

from dmd_jax.config import load_config
from dmd_jax.distillation.program import abstract_program
from dmd_jax.errors import UserError
from dmd_jax.method import samplers
from dmd_jax.method.precision import both_ways
from dmd_jax.method.schedules import NoiseLevel
from dmd_jax.models import abstract_params, build_denoiser, build_network
from dmd_jax.models.judges.inception import class_logits, inception_template, pool3
from dmd_jax.models.judges.lpips import lpips, lpips_template, vgg16_features
from dmd_jax.models.registry import _NETWORKS
from dmd_jax.objectives import Denoising, denoising
from dmd_jax.objectives.optimizers import AdamW, adamw
from dmd_jax.parallel.sharding import make_mesh
from dmd_jax.teachers.edm import edm_teacher
from dmd_jax.teachers.family import GENERATORS
from dmd_jax.teachers.stable_diffusion import STABLE_DIFFUSION
from dmd_jax.training.train_step import initial_state, make_train_step

TINY = str(ROOT / "tests" / "configs" / "tiny.py")
TEXT_CONFIG = str(ROOT / "configs" / "sd15_tiny.py")
EDM = {
    "img_resolution": 8,
    "in_channels": 3,
    "out_channels": 3,
    "label_dim": 2,
    "augment_dim": 3,
    "model_channels": 64,
    "channel_mult": [1, 1],
    "num_blocks": 1,
    "attn_resolutions": [4],
}
NCSNPP = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "decoder_type": "skip",
    "resample_filter": [1, 3, 3, 1],
}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
VISION |= {"num_hidden_layers": 1, "image_size": 8, "patch_size": 4, "projection_dim": 8}
NETWORKS = {
    "songunet": {"name": "songunet"} | EDM,
    "songunet, NCSN++": {"name": "songunet"} | EDM | NCSNPP,
    "dhariwal": {"name": "dhariwal"} | EDM,
    "mlp": {"name": "mlp", "dim": 2, "label_dim": 3, "embedding_type": "fourier"},
    "unet2d_condition": {"name": "unet2d_condition"} | UNET,
    "unet2d_condition, v2": {"name": "unet2d_condition"} | UNET_V2,
    "autoencoder_kl": {"name": "autoencoder_kl"} | VAE,
    "autoencoder_tiny": {"name": "autoencoder_tiny"} | TAESD,
    "clip_text": {"name": "clip_text", "with_projection": True} | TEXT,
    "clip_vision": {"name": "clip_vision"} | VISION,
}
# What is float32 in networks that compute in bfloat16: embeddings, and the first and the last layer
# of Stable Diffusion's. Its short-cuts are at "high".
FLOAT32 = (
    *("map_label", "map_augment", "map_layer", "affine", "time_embedding", "time_emb_proj"),
    *("conv_in", "conv_out"),
)
SHORTCUT = "conv_shortcut"
RESIZING = "bilinear"  # of images
LOGITS = "BTNH,BSNH->BNTS"  # of attention, as JAX names them


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def applied(network, **options):
    """A network's loss (params, inputs) -> a sum of its outputs, and both."""
    module = build_network(network, **options)
    inputs = jax.eval_shape(module.example_inputs)

    def loss(params, inputs):
        outputs = module.apply({"params": params}, *inputs)
        return sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(outputs))

    return loss, abstract_params(network), inputs


def check(found, precision):
    """Products of float32 at that precision; images are resized at the highest in any case."""
    assert sum(product.precision == (precision, precision) for product in found) > 1
    for product in found:
        assert product.dtypes == ("float32", "float32"), product
        expected = "HIGHEST" if RESIZING in product.name else precision
        assert product.precision == (expected, expected), product


def check_bfloat16(found):
    """Products of bfloat16, but for those of FLOAT32, which are at the highest precision, and
    SHORTCUT.

    The gradient of attention's logits is float32 and multiplied by bfloat16 in one pass.
    """
    assert any(product.dtypes == ("bfloat16", "bfloat16") for product in found)
    for product in found:
        if product.dtypes == ("float32", "float32"):
            expected = "HIGH" if SHORTCUT in product.name else "HIGHEST"
            assert product.precision == (expected, expected), product
            assert any(name in product.name for name in (*FLOAT32, SHORTCUT, RESIZING))
        elif product.dtypes != ("bfloat16", "bfloat16"):
            assert product.dtypes == ("float32", "bfloat16"), product
            assert product.precision == ("BF16_BF16_F32",) * 2, product  # JAX's attention says it
            assert LOGITS in product.name, product


def test_the_reader_sees_products_at_the_default_precision():
    """Under jit, in a scan and a checkpoint, and in gradients: what the other tests would find."""

    def function(x, kernel):
        many = jax.lax.scan(lambda y, _: (jnp.tanh(y @ kernel), None), x, length=2)[0]
        images = many.reshape(1, 2, 2, 1)
        one = kernel[None, None, :1, :1]
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            images, one, (1, 1), "SAME", dimension_numbers=numbers
        ).sum()

    gradient = jax.jit(jax.grad(jax.checkpoint(function), argnums=(0, 1)))
    found = products_of(gradient, array(2, 2), array(2, 2))
    assert len(found) >= 5 and {product.precision for product in found} == {("DEFAULT", "DEFAULT")}
    with jax.default_matmul_precision("high"):
        found = products_of(gradient, array(2, 2), array(2, 2))
    assert {product.precision for product in found} == {("HIGH", "HIGH")}


def test_a_gradient_of_its_own_is_at_the_precision_too():
    """x^T W x by a function whose gradient is written out: (W + W^T) x."""

    @jax.custom_vjp
    def form(w, x):
        return x @ w @ x

    form.defvjp(
        lambda w, x: (form(w, x), (w, x)),
        lambda kept, g: (None, g * (kept[0] + kept[0].T) @ kept[1]),
    )
    w, x = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([5.0, 6.0])
    there = both_ways("high", form)
    with jax.default_matmul_precision("highest"):
        gradient = jax.grad(there, argnums=1)
        found = products_of(gradient, w, x)
        assert len(found) == 3 and {product.precision for product in found} == {("HIGH", "HIGH")}
        assert float(there(w, x)) == 319.0 and gradient(w, x).tolist() == [40.0, 73.0]


def test_every_network_is_here():
    assert {network["name"] for network in NETWORKS.values()} == {*_NETWORKS} - {"gaussian_mixture"}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_and_their_gradients_are_at_their_own_precision(name):
    loss, params, inputs = applied(NETWORKS[name])
    forward = products_of(loss, params, inputs)
    check(forward, "HIGHEST")
    for precision in ("highest", "high"):
        loss, params, inputs = applied(NETWORKS[name], precision=precision)
        with jax.default_matmul_precision("bfloat16"):  # whatever the caller's is
            both = products_of(jax.grad(loss), params, inputs)
        check(both, precision.upper())
        assert len(both) > len(forward)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_in_bfloat16_multiply_bfloat16(name):
    loss, params, inputs = applied(NETWORKS[name], dtype="bfloat16")
    found = products_of(jax.grad(loss), params, inputs)
    check_bfloat16(found)


@pytest.mark.parametrize("remat", ["full", "dots"])
@pytest.mark.parametrize("name", ["songunet", "dhariwal", "unet2d_condition"])
def test_what_is_computed_again_is_at_that_precision(name, remat):
    loss, params, inputs = applied(NETWORKS[name], remat=remat)
    check(products_of(jax.grad(loss), params, inputs), "HIGHEST")


def test_judges_are_float32():
    images, params = array(2, 32, 32, 3), lpips_template()
    distance = lambda p, x, y: lpips(p, x, y, resolution=48).sum()  # noqa: E731
    gradient = jax.grad(distance, argnums=(0, 1))
    check(products_of(gradient, params, images, images), "HIGHEST")
    features = functools.partial(vgg16_features, resolution=40)
    check(products_of(features, params, images), "HIGHEST")
    for preprocessing in ("pytorch_fid", "tensorflow"):
        pooled = functools.partial(pool3, preprocessing=preprocessing)
        check(products_of(pooled, inception_template(), images), "HIGHEST")
    (product,) = products_of(class_logits, inception_template(), array(2, 2048))
    assert product.precision == ("HIGHEST", "HIGHEST")


def test_lpips_takes_a_precision_and_a_dtype():
    images, params = array(2, 32, 32, 3), lpips_template()

    def found(**options):
        distance = lambda p, x, y: lpips(p, x, y, resolution=None, **options).sum()  # noqa: E731
        return products_of(jax.grad(distance, argnums=1), params, images, images)

    check(found(precision="high"), "HIGH")
    assert {product.dtypes for product in found(dtype="bfloat16")} == {("bfloat16", "bfloat16")}


@pytest.mark.parametrize("sampler", ["one_step", "few_step", "heun", "euler"])
def test_samplers_of_images(sampler):
    denoiser = build_denoiser(NETWORKS["songunet"])
    options = {"num_steps": 2, "key": jax.random.key(0)}
    if sampler == "one_step":
        options = {"schedule": denoiser.schedule}
    elif sampler == "few_step":
        options["schedule"] = denoiser.schedule
    sample = functools.partial(getattr(samplers, sampler), denoiser.denoise, **options)
    params, z = abstract_params(NETWORKS["songunet"]), array(2, *denoiser.sample_shape)
    check(products_of(sample, params, z, array(2, dtype=jnp.int32)), "HIGHEST")


@pytest.mark.parametrize("sampler", STABLE_DIFFUSION.samplers)
def test_samplers_of_latents(sampler):
    network, guidance = NETWORKS["unet2d_condition"], 1.0 if sampler in GENERATORS else 3.0
    encoder = {"name": "clip_text", "max_position_embeddings": 77} | TEXT
    networks = {"network": network, "text_encoder": encoder}
    teacher = STABLE_DIFFUSION.build(networks, dtype="float32", precision="highest")
    sample = teacher.samplers[sampler](num_steps=4, guidance=guidance)
    cond = array(2, *build_denoiser(network).cond_shape)
    frozen = {"network": abstract_params(network), "null": cond}
    arguments = frozen, array(2, *teacher.sample_shape), cond, jax.random.key(0)
    check(products_of(sample, *arguments), "HIGHEST")


def text_config():
    config = load_config(TEXT_CONFIG, [])
    config.teacher.text_encoder = {"name": "clip_text", "max_position_embeddings": 77} | TEXT
    config.teacher.taesd = {"name": "autoencoder_tiny"} | TAESD
    config.lpips.resolution = 32
    return config


def grey_config():
    return load_config(
        TINY, ["--config.objective.distance=lpips", "--config.lpips.repeat_grey=True"]
    )


@pytest.mark.parametrize("make", [grey_config, text_config])
def test_training_steps(make):
    """Generator, matching loss, regression by LPIPS, fake score, and in text all of its parts."""

    def found(**values):
        config = make()
        config.update(values)
        program = abstract_program(config, make_mesh(devices=jax.devices()[:1]))
        return products_of(program.step(config), *program.arguments(config))

    check(found(matmul_precision="high"), "HIGH")
    check_bfloat16(found(compute_dtype="bfloat16"))
    if make is grey_config:  # the text's takes long
        check(found(), "HIGHEST")


def test_teachers_steps():
    for precision in ("highest", "high"):
        denoiser = build_denoiser(NETWORKS["songunet"], precision=precision)
        objective = denoising(
            Denoising(batch_size=2),
            edm_teacher(denoiser),
            denoiser.init,
            adamw(AdamW(learning_rate=1e-3, warmup_steps=1)),
            preview_key=jax.random.key(0),
        )
        begun = jax.eval_shape(lambda: initial_state(objective, {}, seed=0))  # noqa: B023
        batch = {name: dict(need.arrays) for name, need in objective.needs.items()}
        check(products_of(make_train_step(objective), begun, {}, batch), precision.upper())


def test_denoisers_take_the_precision():
    level = NoiseLevel(*[array(2)] * 3)
    for name in ("songunet", "dhariwal", "unet2d_condition"):
        denoiser = build_denoiser(NETWORKS[name], precision="high")
        cond = None if denoiser.cond_shape is None else array(2, *denoiser.cond_shape)
        arguments = abstract_params(NETWORKS[name]), array(2, *denoiser.sample_shape), level, cond
        check(products_of(denoiser.denoise, *arguments), "HIGH")


def test_unknown_precisions_are_refused():
    with pytest.raises(UserError, match="precision is 'tf32'; expected one of highest, high, defa"):
        build_network(NETWORKS["mlp"], precision="tf32")
    for key in ("matmul_precision", "pairs.matmul_precision"):
        with pytest.raises(UserError, match=f"config.{key} is 'bf16'; expected one of highest"):
            load_config(TINY, [f"--config.{key}=bf16"])
