"""Fashion-MNIST at 32x32, ten classes: real images from teacher to one step on a single GPU.

The images are the four idx files of the data set (Debian packages them as dataset-fashion-mnist) in
data/fashion-mnist, or `--config.data.images=pad2:tfds:fashion_mnist:train`. pad2 brings 28x28 to
32x32.

    dmd-jax convert lpips weights/lpips.safetensors
    dmd-jax teacher --config configs/fashion_mnist.py --workdir runs/fashion_mnist/teacher
    dmd-jax ablate --config configs/fashion_mnist.py --workdir runs/fashion_mnist/ablation \
                   --rows full,without_matching --seeds 0 \
                   --evaluate "--features vgg16 --lpips weights/lpips.safetensors --repeat-grey"

`ablate` makes the pairs, trains the full objective and the regression alone, and measures both, the
teacher and the one-step teacher in VGG16 features.

`configs/fashion_mnist.py:cpu` is the same with a network, steps and an LPIPS resolution for two
CPU cores. With that name, `--num 640` and, in --evaluate, also `--vgg-resolution 64
--num-reference 2000 --precision-recall 640`, seed 0 gave these Fréchet distances there:

    teacher, 18 Heun steps    11.19
    teacher, one step         44.77
    full objective            13.90
    regression only           14.44

Sized for one H100 in 20 minutes by counting operations (3.3 GFLOP for each evaluation of the
network, 7.7 for VGG16 at 112 pixels), which is an estimate: no GPU has run it.
"""

from dmd_jax.config import default_config


def get_config(size="gpu"):
    if size not in ("gpu", "cpu"):
        raise ValueError(f"size is {size!r}; expected gpu or cpu")
    config = default_config()
    config.data.images = "pad2:data/fashion-mnist"
    config.network = dict(
        name="songunet",
        img_resolution=32,
        in_channels=1,
        out_channels=1,
        label_dim=10,
        model_channels=64,
        channel_mult=(1, 2, 2),
        num_blocks=2,
        attn_resolutions=(16,),
    )
    config.compute_dtype = "bfloat16"

    config.teacher.weights = "runs/fashion_mnist/teacher"
    config.teaching.steps = 6000
    config.teaching.batch_size = 256
    config.teaching.optimizer.learning_rate = 1e-3
    config.teaching.optimizer.warmup_steps = 200
    config.teaching.ema_decay = 0.999

    config.pairs.count = 20_000
    config.pairs.num_steps = 18
    config.pairs.batch_size = 1000
    config.pairs.shard_size = 2000

    config.steps = 2000
    config.batch_size = 128
    config.objective.regression_batch_size = 128
    for optimizer in config.optimizer.values():
        optimizer.learning_rate = 2e-4
        optimizer.warmup_steps = 100
    config.lpips.weights = "weights/lpips.safetensors"
    config.lpips.resolution = 112
    config.lpips.repeat_grey = True
    # At the paper's 0.25 the matching loss carries a run this short away before the regression can
    # hold it: on CPU, with a learning rate of 5e-4, the distance after 150 steps was 47.
    config.objective.regression_weight = 4.0
    config.objective.ema_decay = 0.99
    config.log_every = 50
    config.picture_every = 500
    config.checkpoint_every = 500

    if size == "cpu":
        config.network.model_channels = 24
        config.network.num_blocks = 1
        config.network.attn_resolutions = (8,)
        config.compute_dtype = "float32"
        config.teacher.weights = "runs/fashion_mnist_cpu/teacher"
        config.teaching.steps = 900
        config.teaching.batch_size = 64
        config.teaching.optimizer.learning_rate = 2e-3
        config.teaching.ema_decay = 0.99
        config.pairs.count = 1000
        config.pairs.batch_size = 100
        config.pairs.shard_size = 100
        config.steps = 400
        config.batch_size = 16
        config.objective.regression_batch_size = 16
        config.optimizer.generator.update(learning_rate=2e-4, warmup_steps=20)
        config.optimizer.fake_score.update(learning_rate=5e-4, warmup_steps=20)
        config.lpips.resolution = 32
        config.objective.ema_decay = 0.97
        config.log_every = 10
        config.picture_every = 100
        config.checkpoint_every = 100
    return config
