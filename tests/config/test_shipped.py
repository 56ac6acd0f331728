"""The shipped configs of DMD's family: they load, their objectives build, their numbers."""

import pytest
from commands import ROOT

from dmd_jax.config import load_config, stages_of
from dmd_jax.distillation import method_of
from dmd_jax.errors import UserError
from dmd_jax.objectives.kinds import KINDS

CONFIGS = ROOT / "configs"
# FILE:ARGUMENT -> what config.objective.name is.
OBJECTIVES = {
    "cifar10_cd.py": "consistency",
    "cifar10_cd.py:training": "consistency",
    "cifar10_cond.py": "dmd",
    "cifar10_dmd2.py": "dmd2",
    "cifar10_f_distill.py": "f_distill",
    "cifar10_f_distill.py:js": "f_distill",
    "cifar10_sid.py": "sid",
    "cifar10_uncond.py": "dmd",
    "digits.py": "dmd",
    **{f"digits.py:{name}": name for name in KINDS if name != "dmd"},
    "fashion_mnist.py": "dmd",
    "imagenet64.py": "dmd",
    "imagenet64_dmd2.py": "dmd2",
    "imagenet64_dmd2.py:from_scratch": "dmd2",
    "imagenet64_dmd2.py:without_gan": "dmd2",
    "imagenet64_f_distill.py": "f_distill",
    "imagenet64_sid.py": "sid",
    "sd15_laion6.py": "dmd",
    "sd15_laion625.py": "dmd",
}


def test_every_config_is_named_here():
    names = {path.name for path in CONFIGS.glob("*.py")}
    # That of the toy's command, and one whose networks are its weights'.
    names -= {"toy2d.py", "sd15_tiny.py"}
    assert {name.partition(":")[0] for name in OBJECTIVES} == names


@pytest.mark.parametrize("name", OBJECTIVES)
def test_its_objective_builds(name):
    config = load_config(str(CONFIGS / name), [])
    assert config.objective.name == OBJECTIVES[name]
    method = method_of(config)
    for _, stage in stages_of(config):
        assert method.objective(stage).batch_size == stage.batch_size


@pytest.mark.parametrize(
    ("run", "steps", "rate", "weights", "start"),
    [
        ("without_gan", 405_500, 2e-6, (0.0, 0.0), ""),
        ("with_gan", 140_000, 5e-7, (3e-3, 1e-2), "runs/imagenet64_dmd2/first"),
        ("from_scratch", 545_500, 2e-6, (3e-3, 1e-2), ""),
    ],
)
def test_dmd2s_published_settings(run, steps, rate, weights, start):
    """arXiv 2405.14867, appendix: the phases of ImageNet 64x64."""
    config = load_config(str(CONFIGS / f"imagenet64_dmd2.py:{run}"), [])
    objective = config.objective
    assert (config.steps, config.batch_size, objective.generator_every) == (steps, 280, 5)
    assert (objective.gan_weight, objective.gan_fake_weight) == weights
    assert (objective.min_index, objective.max_index, objective.gan_max_index) == (20, 980, 999)
    for player, optimizer in config.optimizer.items():
        assert (optimizer.learning_rate, optimizer.warmup_steps) == (rate, 500)
        assert (optimizer.weight_decay, optimizer.clip_norm) == (0.01, 10.0)
        assert (optimizer.beta1, optimizer.beta2) == (0.9, 0.999)
        assert config.start[player] == start


def test_sids_published_settings():
    """arXiv 2404.04057: alpha, levels, and Adam without what AdamW adds."""
    for name, rate, batch in (("cifar10_sid", 1e-5, 256), ("imagenet64_sid", 4e-6, 8192)):
        config = load_config(str(CONFIGS / f"{name}.py"), [])
        objective = config.objective
        assert (objective.a, objective.sigma_init, objective.max_time) == (1.2, 2.5, 800)
        # Half of an image's weight is left after 500,000 images.
        assert objective.ema_decay ** (500_000 / batch) == pytest.approx(0.5)
        assert config.batch_size == batch
        for optimizer in config.optimizer.values():
            assert (optimizer.learning_rate, optimizer.beta1) == (rate, 0.0)
            assert (optimizer.beta2, optimizer.weight_decay) == (0.999, 0.0)


def test_an_unknown_run_is_refused():
    with pytest.raises(UserError, match="'third'; expected one of without_gan, with_gan, from_sc"):
        load_config(str(CONFIGS / "imagenet64_dmd2.py:third"), [])
