"""scikit-learn's digits, 8x8, ten classes: the whole method in minutes on two CPU cores.

    dmd-jax quickstart --workdir runs/quickstart

samples 10,000 pairs from the teacher that ships with the package, distils it, and evaluates. The
claim: the one-step generator's Fréchet distance to the real digits (64 pixels, 10,000 samples) is
at most 2.5 times the 18-step teacher's and a tenth of the one-step teacher's, its class agreement
is within 3 points of the teacher's, and it is at least 20 times faster an image.
runs/quickstart/results.json has what a run measured.

The teacher is the result of

    dmd-jax teacher --config configs/digits.py --workdir runs/digits/teacher

What differs from the paper's settings, because 1,000 steps have to do:

- learning rate 1e-3, with an average of decay 0.99 that takes the swings out of it;
- regression weight 8, for a mean squared error on small images is far below LPIPS in scale: at 1
  the distance after 600 steps was four times that at 8;
- more pairs than fresh latents a step, since a pair costs less than half of the latter.

An argument is another objective on the same teacher, as in configs/digits.py:dmd2, for
`dmd-jax compare`. All have 64 samples a step and the same average. The fake score of those without
pairs, but for SiD's, has several updates for one of the generator, which at one for one runs away
from it.
"""

from dmd_jax.config import default_config, with_objective
from dmd_jax.storage.weights import packaged

# Of other objectives than DMD: what is not their default.
SETTINGS = {
    "dmd2": dict(generator_every=5, gan_weight=0.03, gan_fake_weight=0.1),
    "f_distill": dict(generator_every=5, gan_weight=0.03, gan_fake_weight=0.1, divergence="js"),
    "sid": dict(a=1.0),
    "consistency": dict(distance="l2", level_weight="karras"),
    "progressive": dict(halve_every=250),
    "reflow": dict(),
}


def get_config(objective="dmd"):
    config = default_config()
    config.data.images = "digits"
    config.network = dict(
        name="songunet",
        img_resolution=8,
        in_channels=1,
        out_channels=1,
        label_dim=10,
        model_channels=24,
        channel_mult=(1, 1),
        num_blocks=1,
        attn_resolutions=(4,),
    )

    config.teacher.weights = str(packaged("digits_teacher"))
    config.teaching.steps = 3000
    config.teaching.batch_size = 128
    config.teaching.optimizer.learning_rate = 2e-3
    config.teaching.optimizer.warmup_steps = 100
    config.teaching.ema_decay = 0.999

    config.pairs.count = 10_000
    config.pairs.num_steps = 18
    config.pairs.batch_size = 500
    config.pairs.shard_size = 1000

    config.steps = 1000
    config.batch_size = 32
    config.objective.regression_batch_size = 64
    config.objective.regression_weight = 8.0
    config.objective.distance = "l2"  # LPIPS sees nothing in 8x8 pixels
    config.objective.ema_decay = 0.99
    for optimizer in config.optimizer.values():
        optimizer.learning_rate = 1e-3
        optimizer.warmup_steps = 50
    config.log_every = 50
    config.picture_every = 500
    config.checkpoint_every = 250
    return config if objective == "dmd" else _with(config, objective)


def _with(config, objective):
    config = with_objective(config, objective)
    config.batch_size = 64
    config.objective.update(SETTINGS[objective], ema_decay=0.99)
    if objective == "sid":
        for optimizer in config.optimizer.values():
            optimizer.beta1 = 0.0
        config.optimizer.generator.learning_rate = 1e-4
    return config
