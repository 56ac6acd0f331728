"""A denoiser small enough that compiling it costs nothing: the tests' own network, no Flax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax.method import samplers
from dmd_jax.method.schedules import NoiseSchedule, expand
from dmd_jax.models import Denoiser
from dmd_jax.objectives import DMD, Networks, dmd
from dmd_jax.objectives.optimizers import AdamW, adamw
from dmd_jax.teachers.edm import edm_teacher

SHAPE = (4, 4, 1)
CLASSES = 3
WIDTH = 64


def init(key):
    """params of a two-layer perceptron with EDM's preconditioning; leaves large and small."""
    size = int(np.prod(SHAPE))
    first, second, third = jax.random.split(key, 3)
    return {
        "first": {"kernel": 0.2 * jax.random.normal(first, (size + 2, WIDTH))},
        "label": 0.2 * jax.random.normal(third, (CLASSES, WIDTH)),
        "second": {
            "kernel": 0.2 * jax.random.normal(second, (WIDTH, size)),
            "bias": jnp.zeros(size),
        },
    }


def features(params, x_t, level, cond):
    """The hidden layer [B, WIDTH]."""
    return _hidden(params, x_t, jnp.sqrt(expand(level.sigma, x_t) ** 2 + 0.25), level, cond)


def _hidden(params, x_t, scale, level, cond):
    flat = (x_t / scale).reshape(len(x_t), -1)
    time = jnp.stack([jnp.sin(level.time), jnp.cos(level.time)], axis=1)
    hidden = jnp.concatenate([flat, time], axis=1) @ params["first"]["kernel"]
    if cond is not None:
        hidden = hidden + params["label"][cond]
    return jax.nn.silu(hidden)


def denoise(params, x_t, level, cond):
    """denoise(params, x_t, level, cond) -> x0 with sigma_data = 0.5."""
    sigma = expand(level.sigma, x_t)
    scale = jnp.sqrt(sigma**2 + 0.25)
    hidden = _hidden(params, x_t, scale, level, cond)
    raw = hidden @ params["second"]["kernel"] + params["second"]["bias"]
    return 0.25 / scale**2 * x_t + 0.5 * sigma / scale * raw.reshape(x_t.shape)


def pairs_batch(seed, size):
    """A batch as the loader gives it."""
    rng = np.random.default_rng(seed)
    return {
        "z_ref": rng.standard_normal((size, *SHAPE)).astype(np.float32),
        "y_ref": np.tanh(rng.standard_normal((size, *SHAPE))).astype(np.float32),
        "label": rng.integers(0, CLASSES, size).astype(np.int32),
    }


def teacher(schedule=None):
    """The small denoiser as a family of teachers."""
    schedule = schedule or NoiseSchedule.edm()
    return edm_teacher(Denoiser(init, denoise, SHAPE, CLASSES, schedule, None, features, 0.5))


def objective(*, optimizer=None, family=None, **settings):
    """DMD of the small denoiser; both players start as the teacher's copy."""
    settings = {"regression_batch_size": settings["batch_size"], "distance": "l2"} | settings
    return build(dmd, DMD(**settings), optimizer=optimizer, family=family)


def build(kind, settings, *, optimizer=None, family=None):
    """An objective of the small denoiser, by its builder and its settings."""
    family = family or teacher()
    optimizer = optimizer or adamw(AdamW(learning_rate=1e-3, warmup_steps=4))
    networks = Networks(
        generate=functools.partial(samplers.one_step, denoise, schedule=family.schedule),
        teacher=lambda frozen, *args: denoise(frozen["network"], *args),
        fake_score=denoise,
    )
    names = ("generator", "fake_score")
    return kind(
        settings,
        family,
        networks,
        init=dict.fromkeys(names, lambda frozen, key: frozen["network"]),
        optimizers=dict.fromkeys(names, optimizer),
        preview_key=jax.random.key(0),
    )
