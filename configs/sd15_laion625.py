"""Stable Diffusion v1.5 on LAION-Aesthetics 6.25+ prompts, in one step (arXiv 2311.18828).

    dmd-jax convert diffusers stable-diffusion-v1-5/stable-diffusion-v1-5 weights/sd15 \
                    --taesd madebyollin/taesd
    dmd-jax convert lpips weights/lpips.safetensors
    dmd-jax prompts laion_625.parquet data/laion625 --key TEXT
    dmd-jax pairs    --config configs/sd15_laion625.py --workdir runs/sd15_laion625/pairs
    dmd-jax train    --config configs/sd15_laion625.py --workdir runs/sd15_laion625/train
    dmd-jax sample   --weights runs/sd15_laion625/train --prompt "a photo of an astronaut" \
                     --out samples.png
    dmd-jax export diffusers runs/sd15_laion625/train exported

The paper's result: FID 11.49 on 30,000 prompts of COCO after 20,000 iterations on 72 GPUs. Nobody
has run this file at its full size.

The 2,304 samples of the matching loss are 1,152 of fresh prompts and the 1,152 of the pairs, which
Algorithm 1 concatenates for Stable Diffusion: 32 and 16 for each of the paper's GPUs. On fewer
devices `--config.accumulation=N` makes a step of N parts, and `--config.pairs.batch_size` is what
fits. A pair is 131,380 bytes, so 500,000 are 66 GB.
"""

from dmd_jax.config import default_config


def get_config():
    config = default_config()
    config.network = dict(
        name="unet2d_condition",
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        attention_head_dim=8,
        cross_attention_dim=768,
    )
    config.teacher.text_encoder = dict(
        name="clip_text",
        hidden_size=768,
        intermediate_size=3072,
        num_attention_heads=12,
        num_hidden_layers=12,
        projection_dim=768,
        eos_token_id=2,
    )
    config.teacher.taesd = dict(name="autoencoder_tiny")
    config.teacher.vae = dict(
        name="autoencoder_kl",
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    config.teacher.weights = "weights/sd15"
    config.teacher.guidance = 3.0
    config.teacher.decoder = "taesd"
    config.compute_dtype = "bfloat16"
    config.remat = "full"

    config.data.prompts = "data/laion625"
    config.data.pairs = "runs/sd15_laion625/pairs"
    config.pairs.count = 500_000
    config.pairs.sampler = "pndm"
    config.pairs.num_steps = 50
    config.pairs.batch_size = 256
    config.pairs.shard_size = 2048

    config.steps = 20_000
    config.batch_size = 2304
    config.objective.match_reference = True
    config.objective.regression_batch_size = 1152
    config.objective.regression_weight = 0.25
    config.optimizer.generator.learning_rate = 1e-5
    config.optimizer.fake_score.learning_rate = 1e-5
    config.lpips.weights = "weights/lpips.safetensors"
    config.lpips.resolution = 0  # 224 is what smaller images are enlarged to
    config.picture_every = 500
    config.checkpoint_every = 500
    return config
