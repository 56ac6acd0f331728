"""ImageNet 64x64, class-conditional: FID 2.62 in one step (arXiv 2311.18828, Table 1).

The teacher is edm-imagenet-64x64-cond-adm.pkl of arXiv 2206.00364, whose FID the paper
gives as 2.32 in 512 evaluations:

    dmd-jax convert edm edm-imagenet-64x64-cond-adm.pkl weights/imagenet64
    dmd-jax convert lpips weights/lpips.safetensors
    dmd-jax pairs --config configs/imagenet64.py --workdir runs/imagenet64/pairs
    dmd-jax train --config configs/imagenet64.py --workdir runs/imagenet64/train
    dmd-jax evaluate --weights runs/imagenet64/train --reference imagenet-64x64.npz \
                     --protocol edm --inception weights/inception.safetensors \
                     --out runs/imagenet64/fid.json

Pairs: 25,000 from the deterministic Heun sampler in 256 steps, 2.5 GB. Training: batch 336 for each
loss, 350,000 steps in mixed precision, which is bfloat16 here; the paper did it on 7 GPUs.
configs/README.md says what to download.
"""

from dmd_jax.config import default_config


def get_config():
    config = default_config()
    config.network = dict(
        name="dhariwal",
        img_resolution=64,
        in_channels=3,
        out_channels=3,
        label_dim=1000,
        model_channels=192,
        channel_mult=(1, 2, 3, 4),
        channel_mult_emb=4,
        num_blocks=3,
        attn_resolutions=(32, 16, 8),
        dropout=0.1,  # the teacher's own; off here
    )
    config.compute_dtype = "bfloat16"
    config.teacher.weights = "weights/imagenet64"
    config.lpips.weights = "weights/lpips.safetensors"

    config.data.pairs = "runs/imagenet64/pairs"
    config.pairs.count = 25_000
    config.pairs.num_steps = 256
    config.pairs.shard_size = 500

    config.steps = 350_000
    config.batch_size = 336
    config.objective.regression_batch_size = 336
    config.objective.matching_weight = 1.0
    config.objective.regression_weight = 0.25
    config.objective.distance = "lpips"
    config.objective.weighting = "normalized"
    config.objective.min_index = 20
    config.objective.max_index = 980
    config.objective.ema_decay = 0.0
    config.lpips.pooling = "average"
    for optimizer in config.optimizer.values():
        optimizer.learning_rate = 2e-6
        optimizer.warmup_steps = 500
        optimizer.weight_decay = 0.01
        optimizer.beta1 = 0.9
        optimizer.beta2 = 0.999
        optimizer.clip_norm = 10.0
    return config
