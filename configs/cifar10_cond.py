"""CIFAR-10, class-conditional: FID 2.66 in one step (arXiv 2311.18828).

The teacher is edm-cifar10-32x32-cond-vp.pkl of arXiv 2206.00364, whose FID the paper
gives as 1.84 in 35 evaluations:

    dmd-jax convert edm edm-cifar10-32x32-cond-vp.pkl weights/cifar10_cond
    dmd-jax convert lpips weights/lpips.safetensors
    dmd-jax pairs --config configs/cifar10_cond.py --workdir runs/cifar10_cond/pairs
    dmd-jax train --config configs/cifar10_cond.py --workdir runs/cifar10_cond/train
    dmd-jax evaluate --weights runs/cifar10_cond/train --reference cifar10-32x32.npz \
                     --protocol edm --inception weights/inception.safetensors \
                     --out runs/cifar10_cond/fid.json

Pairs: 100,000 from the deterministic Heun sampler in 18 steps, 2.5 GB. Training: batch 392 for each
loss, 300,000 steps, which the paper did on 7 GPUs. configs/README.md says what to download.
"""

from dmd_jax.config import default_config


def get_config():
    config = default_config()
    config.network = dict(
        name="songunet",
        img_resolution=32,
        in_channels=3,
        out_channels=3,
        label_dim=10,
        augment_dim=9,  # of the teacher's own training
        model_channels=128,
        channel_mult=(2, 2, 2),
        channel_mult_emb=4,
        num_blocks=4,
        attn_resolutions=(16,),
        dropout=0.13,  # likewise; off here
    )
    # Float32's products in full: what coarser ones, "high" or bfloat16, do to the distance has not
    # been measured. dmd_jax/performance/README.md has what they save.
    config.compute_dtype = "float32"
    config.matmul_precision = "highest"

    config.teacher.weights = "weights/cifar10_cond"
    config.lpips.weights = "weights/lpips.safetensors"

    config.data.pairs = "runs/cifar10_cond/pairs"
    config.pairs.count = 100_000
    config.pairs.num_steps = 18

    config.steps = 300_000
    config.batch_size = 392
    config.objective.regression_batch_size = 392
    config.objective.matching_weight = 1.0
    config.objective.regression_weight = 0.25
    config.objective.distance = "lpips"
    config.objective.weighting = "normalized"
    config.objective.min_index = 20
    config.objective.max_index = 980
    config.objective.ema_decay = 0.0
    config.lpips.pooling = "average"
    for optimizer in config.optimizer.values():
        optimizer.learning_rate = 5e-5
        optimizer.warmup_steps = 500
        optimizer.weight_decay = 0.01
        optimizer.beta1 = 0.9
        optimizer.beta2 = 0.999
        optimizer.clip_norm = 10.0
    return config
