"""CIFAR-10, unconditional: FID 3.77 in one step (arXiv 2311.18828).

The teacher is edm-cifar10-32x32-uncond-vp.pkl of arXiv 2206.00364 (FID 1.97 in 35 evaluations):

    dmd-jax convert edm edm-cifar10-32x32-uncond-vp.pkl weights/cifar10_uncond
    dmd-jax convert lpips weights/lpips.safetensors
    dmd-jax pairs --config configs/cifar10_uncond.py --workdir runs/cifar10_uncond/pairs
    dmd-jax train --config configs/cifar10_uncond.py --workdir runs/cifar10_uncond/train
    dmd-jax evaluate --weights runs/cifar10_uncond/train --reference cifar10-32x32.npz \
                     --protocol edm --inception weights/inception.safetensors \
                     --out runs/cifar10_uncond/fid.json

It differs from the conditional experiment in its pairs, 500,000 (12.3 GB), and in the regression's
weight, 0.5.
"""

from dmd_jax.config import load_config, shipped_config


def get_config():
    config = load_config(str(shipped_config("cifar10_cond")), [])
    config.network.label_dim = 0
    # Float32's products in full: what coarser ones, "high" or bfloat16, do to the distance has not
    # been measured. dmd_jax/performance/README.md has what they save.
    config.compute_dtype = "float32"
    config.matmul_precision = "highest"

    config.teacher.weights = "weights/cifar10_uncond"
    config.data.pairs = "runs/cifar10_uncond/pairs"
    config.pairs.count = 500_000
    config.objective.regression_weight = 0.5
    return config
