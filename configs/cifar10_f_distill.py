"""CIFAR-10, class-conditional, by f-distill with KL: FID 1.92 in one step (arXiv 2502.15681).

    dmd-jax train --config configs/cifar10_f_distill.py --workdir runs/cifar10_f_distill/train

DMD2's run, configs/cifar10_dmd2.py, whose other settings and data it shares, so that they may
differ from the paper's. An argument is another divergence, such as cifar10_f_distill.py:js.
"""

from dmd_jax.config import load_config, shipped_config, with_objective


def get_config(divergence="kl"):
    dmd2 = load_config(str(shipped_config("cifar10_dmd2")), [])
    config = with_objective(dmd2, "f_distill")
    config.objective.update(dmd2.objective, name="f_distill")
    config.objective.divergence = divergence
    config.objective.ratio_lower = 0.1
    config.objective.ratio_upper = 20.0
    return config
