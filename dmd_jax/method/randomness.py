"""Random keys: each is a function of (seed, step, role), or of (seed, index, role)."""

from __future__ import annotations

import enum

import jax


class Role(enum.IntEnum):
    """What a random key is for; keys of one seed and step, or index, differ by role.

    A role keeps its number, which is part of what a seed gives; further roles are appended.
    """

    LATENTS = 0
    LABELS = 1
    MATCHING = 2
    FAKE_SCORE = 3
    TEACHER = 4
    INIT = 5
    PREVIEW = 6
    PAIR_LATENTS = 7
    PAIR_LABELS = 8
    SAMPLER_NOISE = 9  # of `evaluate` and `sample`; the samplers of pairs add none
    SAMPLE_LATENTS = 10  # of `evaluate` and `sample`, which are never those of pairs
    SAMPLE_LABELS = 11
    GAN_GENERATOR = 12  # levels and noise at which a head sees samples, as the generator learns
    GAN_FAKE = 13  # and as the head learns
    GAN_REAL = 14
    STEP = 15  # which of its steps a generator of several learns
    STEP_NOISE = 16  # between those steps
    FAKE_LATENTS = 17  # of samples that only the fake score learns from
    FAKE_LABELS = 18
    LEVELS = 19  # levels and noise of real images or pairs that a student learns from


def key_data(seed: int) -> jax.Array:
    """The base key of a state, as data that any checkpoint format can hold."""
    return jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))


def role_key(base: jax.Array, step: jax.Array | int, role: Role) -> jax.Array:
    """The key of (seed, step, role), so that a resumed run draws what the other would have."""
    key = jax.random.wrap_key_data(base, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, step), int(role))
