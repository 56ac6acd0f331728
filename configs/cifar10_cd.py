"""CIFAR-10 by consistency distillation: FID 3.55 in one step (arXiv 2303.01469, unconditional).

    dmd-jax convert edm edm-cifar10-32x32-uncond-vp.pkl weights/cifar10_uncond
    dmd-jax convert lpips weights/lpips.safetensors
    dmd-jax train --config configs/cifar10_cd.py --workdir runs/cifar10_cd/train

18 levels, one Heun step of the teacher, LPIPS, an average of decay 0.95 for the targets. The real
images are EDM's cifar10-32x32.zip. With the argument "training" the teacher only starts the
network, and the next level is reached by the images themselves.
"""

from dmd_jax.config import load_config, shipped_config, with_objective


def get_config(source="distillation"):
    config = with_objective(load_config(str(shipped_config("cifar10_uncond")), []), "consistency")
    config.data.images = "cifar10-32x32.zip"
    config.data.pairs = ""
    config.batch_size = 512
    config.steps = 800_000
    config.objective.source = source
    config.objective.num_levels = 18
    config.objective.distance = "lpips"
    config.objective.level_weight = "uniform"
    config.objective.target_decay = 0.95
    config.objective.ema_decay = 0.9999
    config.optimizer.generator.learning_rate = 4e-4
    config.optimizer.generator.warmup_steps = 0
    config.optimizer.generator.weight_decay = 0.0
    config.optimizer.generator.clip_norm = 1e12
    return config
