"""ImageNet 64x64 by f-distill: FID 1.16 in one step (arXiv 2502.15681).

DMD2's run with the GAN, configs/imagenet64_dmd2.py, whose other settings, data and first run it
shares; each sample's gradient is weighted for a divergence by the head's ratio of real to fake:

    dmd-jax train --config configs/imagenet64_f_distill.py --workdir runs/imagenet64_f_distill

An argument is the divergence, such as configs/imagenet64_f_distill.py:js; the default is KL.
"""

from dmd_jax.config import load_config, shipped_config, with_objective


def get_config(divergence="kl"):
    dmd2 = load_config(str(shipped_config("imagenet64_dmd2")), [])
    config = with_objective(dmd2, "f_distill")
    config.objective.update(dmd2.objective, name="f_distill")
    config.objective.divergence = divergence
    config.objective.ratio_lower = 0.1
    config.objective.ratio_upper = 20.0
    return config
