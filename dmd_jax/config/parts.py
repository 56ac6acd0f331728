"""The parts of a config: what each value is, what it may be, and when it may change."""

from __future__ import annotations

import dataclasses
from typing import Any

from dmd_jax.method.precision import PRECISIONS
from dmd_jax.models import DTYPES
from dmd_jax.models.ops.remat import REMATS
from dmd_jax.objectives import Denoising
from dmd_jax.objectives.kinds import KINDS
from dmd_jax.objectives.optimizers import AdamW
from dmd_jax.options import defaults_of, option
from dmd_jax.teachers.text_parts import DECODERS

OBJECTIVE = "dmd"  # of a config that names none
# Dicts of any keys: the options of a network. All other parts have keys of their own.
FREE = ("network", "teacher.text_encoder", "teacher.taesd", "teacher.vae")
MOST_SEED = 2**31 - 1  # JAX takes 32 bits of a seed, so that larger ones would repeat smaller ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """config.teacher: the frozen model, and how it is asked."""

    # A weights folder, or the workdir of `dmd-jax teacher`.
    weights: str = option("", may_change=True)
    guidance: float = option(1.0)  # classifier-free, of the teacher alone, for text; 1 is none
    guidance_at_once: bool = option(True)  # in one call of twice the batch; or in two, for memory
    # When a batch's text is encoded: in the step, or ahead of it in a program of its own.
    encode: str = option("in_step", choices=("in_step", "ahead"), may_change=True)
    # Of latents to images, for the regression and the pictures.
    decoder: str = option("taesd", choices=DECODERS, staged=True)
    # Options of models.build_network; empty where they are those of the teacher's folder.
    text_encoder: dict = option(factory=dict)
    taesd: dict = option(factory=dict)
    vae: dict = option(factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teaching(Denoising):
    """config.teaching: how `dmd-jax teacher` trains a teacher on config.data.images."""

    steps: int = option(100_000, least=0, may_change=True)
    optimizer: AdamW = option(
        factory=lambda: AdamW(learning_rate=1e-3, warmup_steps=1000, weight_decay=0.0)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """config.data: where the rows of a batch come from."""

    # Real images: digits, a folder or zip of images, an .npz, idx files, or tfds:NAME:SPLIT;
    # "pad2:" before any of them adds two black pixels at each side.
    images: str = option("", may_change=True)
    pairs: str = option("", may_change=True, staged=True)  # the workdir of `dmd-jax pairs`
    prompts: str = option("", may_change=True)  # the folder of `dmd-jax prompts`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """config.pairs: how `dmd-jax pairs` makes the noise-image pairs."""

    count: int = option(100_000, least=1)
    sampler: str = option("heun")  # for text: pndm, ddim, dpm++ or unipc
    num_steps: int = option(18, least=1)  # Heun makes two evaluations each but the last
    batch_size: int = option(512, least=1)
    # The targets keep what a coarser computation rounds.
    compute_dtype: str = option("float32", choices=tuple(DTYPES))
    matmul_precision: str = option("highest", choices=PRECISIONS)
    shard_size: int = option(2048, least=1)
    seed: int = option(1, least=0, most=MOST_SEED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lpips:
    """config.lpips: the distance of the regression where config.objective.distance is lpips."""

    weights: str = option("", may_change=True)  # the file that `dmd-jax convert lpips` writes
    pooling: str = option("average", choices=("average", "max"))  # max is that of standard LPIPS
    # Pixels that images are resized to; 0 leaves them as they are.
    resolution: int = option(224, least=0)
    repeat_grey: bool = option(False)  # one-channel images are shown to LPIPS three times


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """config.mesh: the devices along each axis; one size may be -1 and takes what is left."""

    data: int = option(-1, may_change=True)
    fsdp: int = option(1, may_change=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy:
    """config.toy: the two Gaussians of `dmd-jax toy`, and the generator in their plane."""

    mode1: tuple[float, float] = option()
    mode2: tuple[float, float] = option()
    mode_std: float = option(above=0)
    center: tuple[float, float] = option()  # of the fakes before training
    spread: float = option(above=0)  # their standard deviation
    sigma_min: float = option(above=0)  # of the noise schedule
    sigma_max: float = option(above=0)
    generator_width: int = option(least=1)
    generator_depth: int = option(least=1)
    num_samples: int = option(least=1)  # that each panel is measured on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The whole config, with the paper's values for class-conditional CIFAR-10."""

    seed: int = option(0, least=0, most=MOST_SEED)
    # Options of models.build_denoiser: "name", and those of that network. The teacher, the
    # generator and the fake score are all of it.
    network: dict = option(factory=dict)
    # The type that networks compute in, LPIPS's VGG16 as well. Parameters and losses are float32.
    compute_dtype: str = option("float32", choices=tuple(DTYPES))
    # Of float32 products: highest is float32 on every device; high and default are faster on TPU
    # and GPU, and coarser (see dmd_jax.method.precision).
    matmul_precision: str = option("highest", choices=PRECISIONS)
    # What a U-Net computes again, for memory (see models.ops.remat).
    remat: str = option("none", choices=REMATS, may_change=True)

    teacher: Teacher = option(factory=Teacher)
    teaching: Teaching = option(factory=Teaching)
    data: Data = option(factory=Data)
    pairs: Pairs = option(factory=Pairs)

    # "name", one of objectives.kinds.KINDS, and the options of that objective's settings.
    objective: dict = option(factory=lambda: objective_defaults(OBJECTIVE))
    batch_size: int = option(392, least=1, staged=True)
    optimizer: dict[str, AdamW] = option(factory=dict)  # of each player
    # What a player starts from: a weights folder, or the workdir of an earlier run, whose player
    # of the same name is taken; "" is the teacher's copy.
    start: dict[str, str] = option(factory=dict, may_change=True)
    lpips: Lpips = option(factory=Lpips)

    steps: int = option(300_000, least=0, may_change=True)
    accumulation: int = option(1, least=1)  # micro-batches of a step
    # Other values for the first steps: dicts of "until", the steps done at its end, and of keys
    # that are `staged`; after the last of them the config is as it is.
    stages: tuple[Any, ...] = option(())
    mesh: Mesh = option(factory=Mesh)
    log_every: int = option(100, least=1, may_change=True)
    picture_every: int = option(5000, least=1, may_change=True)
    checkpoint_every: int = option(5000, least=1, may_change=True)
    keep_checkpoints: int = option(3, least=1, may_change=True)

    toy: Toy | None = option(None)


def objective_defaults(name: str) -> dict[str, Any]:
    """config.objective of an objective, with its defaults."""
    return {"name": name} | defaults_of(KINDS[name].settings)


def run_defaults(objective: str = OBJECTIVE) -> dict[str, Any]:
    """Every key that a config with this objective has, with its default."""
    players = KINDS[objective].players
    return defaults_of(Run) | {
        "objective": objective_defaults(objective),
        "optimizer": {player: defaults_of(AdamW) for player in players},
        "start": dict.fromkeys(players, ""),
    }
