"""CIFAR-10, class-conditional, by score identity distillation (arXiv 2404.04057): no data at all.

    dmd-jax train --config configs/cifar10_sid.py --workdir runs/cifar10_sid/train

The teacher and the network are those of configs/cifar10_cond.py. Adam with betas 0 and 0.999, no
weight decay, no clip, learning rate 1e-5, batch 256. The average's half-life is 500,000 images in
the paper, 1,953 steps. The number of steps is that of configs/cifar10_cond.py, not the paper's.
"""

from dmd_jax.config import load_config, shipped_config, with_objective


def get_config():
    config = with_objective(load_config(str(shipped_config("cifar10_cond")), []), "sid")
    config.data.pairs = ""
    config.batch_size = 256
    config.objective.a = 1.2
    config.objective.sigma_init = 2.5
    config.objective.max_time = 800.0
    config.objective.loss_scale = 100.0
    config.objective.p_mean = -1.2
    config.objective.p_std = 1.2
    config.objective.ema_decay = 0.5 ** (config.batch_size / 500_000)
    for optimizer in config.optimizer.values():
        optimizer.learning_rate = 1e-5
        optimizer.warmup_steps = 0
        optimizer.weight_decay = 0.0
        optimizer.beta1 = 0.0
        optimizer.beta2 = 0.999
        optimizer.clip_norm = 1e12
    return config
