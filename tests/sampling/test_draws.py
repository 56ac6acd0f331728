"""Which random numbers images and pairs are made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import succeeds

from dmd_jax.data.pair_shards import PairSource
from dmd_jax.method.randomness import Role
from dmd_jax.sampling.draws import draw_labels, draw_latents

SHAPE, CLASSES = (4, 3, 2), 10


def key(seed, index, role):
    """The key of (seed, index, role) by JAX's public functions, roles as numbers."""
    base = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(base, index), role)


PAIRS = ({"role": Role.PAIR_LATENTS}, {"role": Role.PAIR_LABELS})


@pytest.mark.parametrize(
    "latents, labels, given", [(7, 8, PAIRS), (10, 11, ({}, {}))], ids=["pairs", "samples"]
)
def test_draws_are_functions_of_seed_index_and_role(latents, labels, given):
    for seed, start, stop in ((0, 0, 3), (1, 5, 8), (2**31 - 1, 100, 101)):
        z = draw_latents(seed, start, stop, SHAPE, **given[0])
        y = draw_labels(seed, start, stop, CLASSES, **given[1])
        assert (z.dtype, y.dtype) == (np.float32, np.int32)
        for row, index in enumerate(range(start, stop)):
            expected = jax.random.normal(key(seed, index, latents), SHAPE, jnp.float32)
            np.testing.assert_array_equal(z[row], expected)
            label = jax.random.randint(key(seed, index, labels), (), 0, CLASSES, jnp.int32)
            assert y[row] == label


def test_no_role_changes_its_number():
    """The numbers are part of what a seed gives: of pairs and of weights that were trained."""
    assert {role.name: role.value for role in Role} == {
        "LATENTS": 0,
        "LABELS": 1,
        "MATCHING": 2,
        "FAKE_SCORE": 3,
        "TEACHER": 4,
        "INIT": 5,
        "PREVIEW": 6,
        "PAIR_LATENTS": 7,
        "PAIR_LABELS": 8,
        "SAMPLER_NOISE": 9,
        "SAMPLE_LATENTS": 10,
        "SAMPLE_LABELS": 11,
        "GAN_GENERATOR": 12,
        "GAN_FAKE": 13,
        "GAN_REAL": 14,
        "STEP": 15,
        "STEP_NOISE": 16,
        "FAKE_LATENTS": 17,
        "FAKE_LABELS": 18,
        "LEVELS": 19,
    }


def test_samples_never_have_the_latents_of_pairs_or_of_training():
    samples, seen = set(), set()
    for seed in range(4):
        samples |= {z.tobytes() for z in draw_latents(seed, 0, 50, SHAPE)}
        seen |= {z.tobytes() for z in draw_latents(seed, 0, 50, SHAPE, role=Role.PAIR_LATENTS)}
        # The training step draws a whole batch at once.
        draw = lambda step: jax.random.normal(key(seed, step, 0), (4, *SHAPE), jnp.float32)  # noqa: B023, E731
        batches = np.asarray(jax.vmap(draw)(jnp.arange(50)))
        seen |= {z.tobytes() for batch in batches for z in batch}
        labels = draw_labels(seed, 0, 50, 1000)
        of_pairs = draw_labels(seed, 0, 50, 1000, role=Role.PAIR_LABELS)
        assert (labels == of_pairs).sum() <= 2  # by chance: 1,000 classes
    assert len(samples) == 200 and len(seen) == 200 + 4 * 4 * 50
    assert not samples & seen


def test_evaluate_and_sample_make_one_set_of_images_which_is_not_the_pairs(tiny, tmp_path):
    """With the seed of the pairs, and the teacher's own sampler."""
    paths = dict(argument.removeprefix("--config.").split("=") for argument in tiny[2:])
    pairs = PairSource(paths["data.pairs"], sample_shape=(8, 8, 1), num_classes=10)
    records = [pairs[index] for index in range(16)]
    assert pairs.metadata.seed == 1 and pairs.metadata.num_steps == 2
    common = ("--weights", paths["teacher.weights"], "--sampler", "heun", "--steps", 2)
    common += ("--batch-size", 16, "--num", 16, "--seed", 1)
    kept = tmp_path / "samples.npz"
    options = ("--reference", "digits", "--samples", kept, "--out", tmp_path / "results.json")
    succeeds("evaluate", *common, *options)
    with np.load(kept) as judged:
        images, labels = judged["images"], judged["labels"]
    y_ref = np.stack([record["y_ref"] for record in records])
    assert np.abs(images - y_ref).max(axis=(1, 2, 3)).min() > 0.1
    assert any(labels != [record["label"] for record in records])
    given = ",".join(map(str, labels))
    succeeds("sample", *common, "--labels", given, "--out", tmp_path / "x.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), images)
