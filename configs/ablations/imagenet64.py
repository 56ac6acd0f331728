"""Table 2 of the paper (arXiv 2311.18828) on ImageNet 64x64, a row an argument.

    dmd-jax train --config configs/ablations/imagenet64.py:without_matching \
                  --workdir runs/imagenet64/without_matching

What it changes of configs/imagenet64.py, whose teacher, pairs and evaluation it shares, and the FID
that the paper gives (50,000 samples):

    full                                                                            2.62
    without_matching    matching_weight 0: regression only                          9.21
    without_regression  regression_weight 0                                         5.61
    sigma_over_alpha    weighting sigma_t / alpha_t in place of Eq. 8             not given
    sigma3_over_alpha   weighting sigma_t^3 / alpha_t in place of Eq. 8           not given
    l2                  distance l2 in place of LPIPS                             not given

The paper lowers the learning rate of its runs without regression to 1e-5. ImageNet's own, 2e-6, is
below that already and stays.
"""

from dmd_jax.config import load_config, shipped_config
from dmd_jax.distillation.ablations import apply_row


def get_config(row=""):
    return apply_row(load_config(str(shipped_config("imagenet64")), []), row)
