"""Table 2 of the paper (arXiv 2311.18828) on class-conditional CIFAR-10, a row an argument.

    dmd-jax train --config configs/ablations/cifar10.py:without_matching \
                  --workdir runs/cifar10_cond/without_matching

What it changes of configs/cifar10_cond.py, whose teacher, pairs and evaluation it shares, and the
FID that the paper gives (50,000 samples):

    full                                                                            2.66
    without_matching    matching_weight 0: regression only                          3.82
    without_regression  regression_weight 0; both learning rates 1e-5               5.58
    sigma_over_alpha    weighting sigma_t / alpha_t in place of Eq. 8               3.60
    sigma3_over_alpha   weighting sigma_t^3 / alpha_t in place of Eq. 8             3.71
    l2                  distance l2 in place of LPIPS                               2.78

The paper does not say whether the regression weight was another for l2; it stays 0.25 here.
"""

from dmd_jax.config import load_config, shipped_config
from dmd_jax.distillation.ablations import apply_row


def get_config(row=""):
    return apply_row(load_config(str(shipped_config("cifar10_cond")), []), row)
