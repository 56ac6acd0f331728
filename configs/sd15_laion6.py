"""Stable Diffusion v1.5 on LAION-Aesthetics 6+ prompts, at guidance 8 (arXiv 2311.18828, Table 5).

The commands are those of sd15_laion625.py with this file and its folders. The paper's result: FID
14.93 on 30,000 prompts of COCO after 165,000 iterations. Nobody has run this file at its full size.

The authors changed the run as it went: the regression's weight 0.1, 0.5, 1, 0.75, 0.5 and 0.25, the
batch from 32 and 16 to 16 and 4 for each of 72 GPUs, TAESD and later the full VAE as the decoder,
and at the end matching levels up to 500 in place of 980. `config.stages` has these changes in their
order; the steps at which they happen are this file's own, to be set by Table 5 for a run that
claims its figure. The pairs began as 2.5 million; 12 million are 1.6 TB. A stage may have a
"pairs.folder" of its own, whose batches go on at the position that the run has come to. The full VAE needs about
6 GB for the backward pass of one image, so its stages want config.accumulation such that a device
has one or two images of the regression at a time.
"""

from dmd_jax.config import load_config, shipped_config


def get_config():
    config = load_config(str(shipped_config("sd15_laion625")), [])
    config.text.prompts = "data/laion6"
    config.guidance = 8.0
    config.pairs.folder = "runs/sd15_laion6/pairs"
    config.pairs.count = 12_000_000

    large = {"batch_size": 2304, "regression_batch_size": 1152, "max_index": 980}
    small = {"batch_size": 1152, "regression_batch_size": 288, "max_index": 980}
    config.stages = (
        {"until": 5_000, "regression_weight": 0.1, "text.decoder": "taesd", **large},
        {"until": 9_000, "regression_weight": 0.5, "text.decoder": "taesd", **large},
        {"until": 21_000, "regression_weight": 1.0, "text.decoder": "taesd", **large},
        {"until": 56_000, "regression_weight": 0.75, "text.decoder": "taesd", **large},
        {"until": 60_000, "regression_weight": 0.5, "text.decoder": "taesd", **large},
        {"until": 68_000, "regression_weight": 0.5, "text.decoder": "vae", **large},
        {"until": 150_000, "regression_weight": 0.25, "text.decoder": "vae", **small},
    )
    config.steps = 165_000
    config.batch_size = 1152
    config.regression_batch_size = 288
    config.regression_weight = 0.25
    config.text.decoder = "vae"
    config.max_index = 500
    return config
