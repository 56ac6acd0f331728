"""ImageNet 64x64 by score identity distillation (arXiv 2404.04057): no data at all.

    dmd-jax train --config configs/imagenet64_sid.py --workdir runs/imagenet64_sid/train

The teacher and the network are those of configs/imagenet64.py; what differs from
configs/cifar10_sid.py is the learning rate, 4e-6, and the batch, 8192. The number of steps is that
of configs/imagenet64.py, not the paper's.
"""

from dmd_jax.config import load_config, shipped_config, with_objective


def get_config():
    config = with_objective(load_config(str(shipped_config("imagenet64")), []), "sid")
    cifar10 = load_config(str(shipped_config("cifar10_sid")), [])
    config.data.pairs = ""
    config.batch_size = 8192
    config.objective = cifar10.objective
    config.objective.ema_decay = 0.5 ** (config.batch_size / 500_000)
    config.optimizer = cifar10.optimizer
    for optimizer in config.optimizer.values():
        optimizer.learning_rate = 4e-6
    return config
