"""The paper's Figure 3 (arXiv 2311.18828): what each part of the objective is for.

    dmd-jax toy --config configs/toy2d.py --workdir runs/toy2d

takes 45 s on two CPU cores and writes runs/toy2d/figure3.png and results.json. The real
distribution is two Gaussians, whose score is exact; the fakes start as one cluster near the first.
The claim, and what seeds 0, 1, 2 gave (spread: standard deviation over the mode's):

  (a) real score only: all fakes collapse onto the nearest mode's peak.
      100% at mode 1, spread 0.02 to 0.03, mean within 0.004 of the centre; none at mode 2.
  (b) real minus fake score: they spread over the nearest mode and miss the other.
      100% at mode 1, spread 0.97 to 1.00; none at mode 2.
  (c) with regression to 512 noise-sample pairs: both modes.
      47% to 51% at each mode, spread 0.95 to 1.00; 1.2% to 1.7% on the way between, since the
      generator is continuous.

No set-up is published. This one is as the method's but for (measured at seed 0, 2,000 steps)

- the noise levels, which stay well below the distance of the modes, 2.4. With EDM's sigma_max = 80
  most levels see the two modes as one: (a) left no fake at either and (b) reached both.
- sigma_min, 0.05: in two dimensions Eq. 8's normaliser is near zero more often than in an image,
  and the more so the less noise there is. With EDM's 0.002 (a) kept a spread of 0.06.
- the fake score's start, which is not the teacher's copy (the teacher is a formula): it learns from
  the first step, while the generator's learning rate still rises.
- one generator update for four of the fake score. One to one, (a) and (b) came out alike, but in
  (c) the fake score lagged behind and spread fell to 0.77 and 0.91.
"""

from dmd_jax.config import default_config


def get_config():
    config = default_config()
    # The fake score. It cannot start as a copy of the teacher, which is a formula.
    config.network = dict(name="mlp", dim=2, width=64, depth=3)
    config.steps = 4000  # of each of the three objectives
    config.batch_size = 256
    config.optimizer.generator.update(learning_rate=1e-3, warmup_steps=100)
    config.optimizer.fake_score.update(learning_rate=4e-3, warmup_steps=50)
    config.objective.distance = "l2"
    config.objective.generator_every = 4
    config.objective.ema_decay = 0.99
    config.log_every = 200  # steps that one dispatch makes
    config.pairs.count = 512  # each step regresses on all of them
    config.pairs.num_steps = 64

    config.toy = dict(
        mode1=(-1.2, 0.0),
        mode2=(1.2, 0.0),
        mode_std=0.2,
        center=(-0.75, 0.45),  # of the fakes before training
        spread=0.1,  # their standard deviation
        sigma_min=0.05,  # of the noise schedule
        sigma_max=0.25,
        generator_width=64,
        generator_depth=4,
        num_samples=4096,  # that each panel is measured on
    )
    return config
