"""CIFAR-10, class-conditional, by DMD2 (arXiv 2405.14867), which has no figure for it.

The settings are those of ImageNet 64x64 from scratch at CIFAR-10's batch and learning rate in DMD,
configs/cifar10_cond.py, whose teacher and network it shares:

    dmd-jax train --config configs/cifar10_dmd2.py --workdir runs/cifar10_dmd2/train
    dmd-jax evaluate --weights runs/cifar10_dmd2/train --reference cifar10-32x32.npz \
                     --protocol edm --inception weights/inception.safetensors \
                     --out runs/cifar10_dmd2/fid.json

The real images are EDM's cifar10-32x32.zip, with its labels.
"""

from dmd_jax.config import load_config, shipped_config, with_objective


def get_config():
    config = with_objective(load_config(str(shipped_config("cifar10_cond")), []), "dmd2")
    config.data.images = "cifar10-32x32.zip"
    config.data.pairs = ""
    config.objective.gan_weight = 3e-3
    config.objective.gan_fake_weight = 1e-2
    config.objective.generator_every = 5
    return config
