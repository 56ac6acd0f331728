"""ImageNet 64x64 by DMD2: FID 1.28 in one step, without pairs (arXiv 2405.14867, Table 1).

In two runs, of which the first is without the GAN (FID 2.61) and the second starts from it:

    dmd-jax convert edm edm-imagenet-64x64-cond-adm.pkl weights/imagenet64
    dmd-jax train --config configs/imagenet64_dmd2.py:without_gan \
                  --workdir runs/imagenet64_dmd2/first
    dmd-jax train --config configs/imagenet64_dmd2.py --workdir runs/imagenet64_dmd2/second
    dmd-jax evaluate --weights runs/imagenet64_dmd2/second --reference imagenet-64x64.npz \
                     --protocol dmd2 --inception weights/inception.safetensors \
                     --out runs/imagenet64_dmd2/fid.json

or in one run, with the GAN from the beginning (FID 1.51): configs/imagenet64_dmd2.py:from_scratch.
The paper does not say after how many steps; here it is the sum of both others.

The real images are EDM's imagenet-64x64.zip, with its labels. Batch 280, 7 times 40; the generator
updates on each fifth step.
"""

from dmd_jax.config import load_config, shipped_config, with_objective
from dmd_jax.errors import UserError

STEPS = {"without_gan": 405_500, "with_gan": 140_000, "from_scratch": 545_500}


def get_config(run="with_gan"):
    if run not in STEPS:
        raise UserError(f"{run!r}; expected one of {', '.join(STEPS)}")
    config = with_objective(load_config(str(shipped_config("imagenet64")), []), "dmd2")
    config.data.images = "imagenet-64x64.zip"
    config.data.pairs = ""
    config.steps = STEPS[run]
    config.batch_size = 280

    config.objective.matching_weight = 1.0
    config.objective.gan_weight = 0.0 if run == "without_gan" else 3e-3
    config.objective.gan_fake_weight = 0.0 if run == "without_gan" else 1e-2
    config.objective.weighting = "normalized"
    config.objective.min_index = 20
    config.objective.max_index = 980
    config.objective.gan_max_index = 999
    config.objective.generator_every = 5
    config.objective.num_steps = 1
    config.objective.ema_decay = 0.0
    for player, optimizer in config.optimizer.items():
        optimizer.learning_rate = 5e-7 if run == "with_gan" else 2e-6
        optimizer.warmup_steps = 500
        optimizer.warmup_counts = "steps"
        optimizer.weight_decay = 0.01
        optimizer.beta1 = 0.9
        optimizer.beta2 = 0.999
        optimizer.clip_norm = 10.0
        if run == "with_gan":
            config.start[player] = "runs/imagenet64_dmd2/first"
    return config
