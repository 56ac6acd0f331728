"""Stable Diffusion v1.5 on LAION-Aesthetics 6+ prompts, at guidance 8 (arXiv 2311.18828, Table 5).

The commands are those of sd15_laion625.py with this file and its folders. The paper's result: FID
14.93 on 30,000 prompts of COCO after 165,000 iterations. Nobody has run this file at its full size.

The authors changed the run as it went: the regression's weight 0.1, 0.5, 1, 0.75, 0.5 and 0.25, the
batch from 32 and 16 to 16 and 4 for each of 72 GPUs, TAESD and later the full VAE as the decoder,
and at the end matching levels up to 500 in place of 980. `config.stages` has these changes in their
order; the steps at which they happen are this file's own, to be set by Table 5 for a run that
claims its figure. The pairs began as 2.5 million; 12 million are 1.6 TB. A stage may have a
"data.pairs" of its own, whose batches go on at the position that the run has come to. The full VAE
needs about 6 GB for the backward pass of one image, so its stages want config.accumulation such
that a device has one or two images of the regression at a time.
"""

from dmd_jax.config import load_config, shipped_config


def get_config():
    config = load_config(str(shipped_config("sd15_laion625")), [])
    config.teacher.guidance = 8.0
    config.teacher.decoder = "vae"
    config.data.prompts = "data/laion6"
    config.data.pairs = "runs/sd15_laion6/pairs"
    config.pairs.count = 12_000_000

    batches = ("batch_size", "objective.regression_batch_size")
    large, small = dict(zip(batches, (2304, 1152))), dict(zip(batches, (1152, 288)))
    changes = (  # until this step: the regression's weight, the decoder, the batches
        (5_000, 0.1, "taesd", large),
        (9_000, 0.5, "taesd", large),
        (21_000, 1.0, "taesd", large),
        (56_000, 0.75, "taesd", large),
        (60_000, 0.5, "taesd", large),
        (68_000, 0.5, "vae", large),
        (150_000, 0.25, "vae", small),
    )
    config.stages = tuple(
        {
            "until": until,
            "objective.regression_weight": weight,
            "objective.max_index": 980,
            "teacher.decoder": decoder,
            **sizes,
        }
        for until, weight, decoder, sizes in changes
    )
    config.steps = 165_000
    config.batch_size = 1152
    config.objective.regression_batch_size = 288
    config.objective.regression_weight = 0.25
    config.objective.max_index = 500
    return config
