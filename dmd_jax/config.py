"""How a run is configured: a Python file, overrides on the command line, a copy in the workdir."""

from __future__ import annotations

import difflib
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from dmd_jax.errors import UserError, differing
from dmd_jax.files import local_path
from dmd_jax.seals import read_sealed, write_sealed
from dmd_jax.stand_ins import check_real_file, is_there

# Of config.json's form, for readers to come.
SCHEMA = 1

# What may change when a run goes on; everything else would make it another run.
MAY_CHANGE = (
    "steps",
    "teacher.steps",
    "teacher.weights",
    "pairs.folder",
    "images",
    "text.prompts",
    "text.encode",
    "remat",
    "lpips.weights",
    "start.generator",
    "start.fake_score",
    "log_every",
    "checkpoint_every",
    "picture_every",
    "keep_checkpoints",
    "mesh.data",
    "mesh.fsdp",
)

# Keys of configs of earlier versions, and the one value by which they asked for what there is.
_FORMER = {"mesh.tensor": 1}

# What a stage of a run may set for itself; the state and its optimisers are the same throughout.
STAGED = (
    "batch_size",
    "regression_batch_size",
    "regression_weight",
    "min_index",
    "max_index",
    "pairs.folder",
    "text.decoder",
)


def default_config() -> ConfigDict:
    """Every key that a config has, with the paper's values for class-conditional CIFAR-10."""
    config = ConfigDict()
    config.seed = 0
    # Options of models.build_denoiser: "name" and what that network takes.
    config.network = ConfigDict()
    # The type that networks compute in, LPIPS's VGG16 as well: float32 or bfloat16. Parameters and
    # losses are float32.
    config.compute_dtype = "float32"
    # Of float32 products: highest is float32 on every device; high and default are faster on TPU
    # and GPU, and coarser (see dmd_jax.precision).
    config.matmul_precision = "highest"
    config.remat = "none"  # or full, dots: what a U-Net computes again, for memory (models.remat)
    config.guidance = 1.0  # classifier-free, of the teacher alone, for text; 1 is none
    config.guidance_at_once = True  # in one call of twice the batch; or in two, for memory
    # Real images: digits, a folder or zip of images, an .npz, idx files, or tfds:NAME:SPLIT;
    # "pad2:" before any of them adds two black pixels at each side.
    config.images = ""

    # `dmd-jax teacher` trains one; the others read it from `weights`.
    config.teacher = teacher = ConfigDict()
    teacher.weights = ""  # a weights folder, or the workdir of a run
    teacher.steps = 100_000
    teacher.batch_size = 512
    teacher.learning_rate = 1e-3
    teacher.warmup_steps = 1000
    teacher.weight_decay = 0.0
    teacher.ema_decay = 0.9999
    teacher.p_mean = -1.2  # ln(sigma) ~ N(p_mean, p_std^2)
    teacher.p_std = 1.2

    # `dmd-jax pairs` writes them; `train` reads them from `folder`.
    config.pairs = pairs = ConfigDict()
    pairs.folder = ""
    pairs.count = 100_000
    pairs.sampler = "heun"  # for text: pndm, ddim, dpm++ or unipc
    pairs.num_steps = 18  # Heun makes two evaluations each but the last
    pairs.batch_size = 512
    pairs.compute_dtype = "float32"  # the targets keep what a coarser one rounds
    pairs.matmul_precision = "highest"
    pairs.shard_size = 2048
    pairs.seed = 1

    # `dmd-jax train`: the distillation.
    config.steps = 300_000
    # A weights folder, or the workdir of an earlier run, whose player of the same name is taken;
    # empty starts as the teacher's copy.
    config.start = ConfigDict(dict(generator="", fake_score=""))
    config.batch_size = 392  # matching loss and fake score
    config.match_reference = False  # the pairs' latents are among them, as for Stable Diffusion
    config.regression_batch_size = 392
    config.learning_rate = 5e-5
    config.fake_score_learning_rate = 5e-5
    config.warmup_steps = 500
    # What these 500 are: each network's own updates, or steps, of which a generator with
    # generator_every=n needs only every n-th, as in DMD2's code.
    config.warmup_counts = "updates"
    config.weight_decay = 0.01
    config.beta1 = 0.9
    config.beta2 = 0.999
    config.clip_norm = 10.0
    config.matching_weight = 1.0
    config.regression_weight = 0.25
    config.distance = "lpips"  # of the regression; or l2, the mean squared error
    config.lpips = lpips = ConfigDict()
    lpips.weights = ""  # the file that `dmd-jax convert lpips` writes
    lpips.pooling = "average"  # or max, as the standard LPIPS has
    lpips.resolution = 224  # pixels that images are resized to; 0 leaves them as they are
    lpips.repeat_grey = False  # one-channel images are shown to LPIPS three times
    # Text to image: `dmd-jax prompts` writes the folder.
    config.text = text = ConfigDict()
    text.prompts = ""
    text.encode = "in_step"  # or ahead: a program of its own before each step
    text.decoder = "taesd"  # of the regression and of pictures; or vae
    # Options of models.build_network; empty where they are those of the teacher's folder.
    text.text_encoder = ConfigDict()
    text.taesd = ConfigDict()
    text.vae = ConfigDict()
    config.weighting = "normalized"  # or sigma_over_alpha, sigma3_over_alpha
    config.alpha_factor = False  # Eq. 8's alpha_t, which Algorithm 2 leaves out
    config.min_index = 20  # schedule bins of the matching loss, both included
    config.max_index = 980
    config.generator_every = 1  # the generator updates on each n-th step
    config.accumulation = 1  # micro-batches of a step
    config.ema_decay = 0.0  # of the generator; 0 keeps none
    # Other values for the first steps: dicts of "until", the steps done at its end, and of keys
    # among STAGED; after the last of them the config is as it is.
    config.stages = ()

    # Devices: one size may be -1 and takes what is left.
    config.mesh = ConfigDict(dict(data=-1, fsdp=1))
    config.log_every = 100
    config.picture_every = 5000
    config.checkpoint_every = 5000
    config.keep_checkpoints = 3
    return config


def shipped_config(name: str) -> Path:
    """The file of configs/ in the checkout, or where an installation puts it.

    Raises:
      UserError: there is none of that name.
    """
    folders = (Path(__file__).parents[1] / "configs", Path(sys.prefix) / "share/dmd_jax/configs")
    for folder in folders:
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
    raise UserError(f"no {name}.py in {' or '.join(map(str, folders))}; expected a whole install")


def load_config(path: str, overrides: Sequence[str]) -> ConfigDict:
    """Runs the file's get_config() and applies `--config.KEY=VALUE` overrides.

    Raises:
      UserError: the file is missing or fails, a key is unknown, or a value has the wrong type.
    """
    file, colon, argument = path.partition(":")
    file = local_path(file)
    try:
        check_real_file(file, "a Python file with get_config()")
        config = _parse(config_flags.DEFINE_config_file, f"--config={file}{colon}{argument}")
    except UserError as error:
        raise UserError(f"--config {error}") from error
    except Exception as error:  # The file is code and may raise anything.
        raise UserError(f"--config {path}: {_one_line(error)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config {path}: get_config() gave {type(config)}; expected a ConfigDict")
    _drop_former(config, f"--config {path}")
    return apply_overrides(config, overrides)


def apply_overrides(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """A copy of `config` with the values of `--config.KEY=VALUE` arguments.

    Raises:
      UserError: an argument of another form, an unknown key, or a value of the wrong type.
    """
    for override in overrides:
        key, equals, _ = override.removeprefix("--config.").partition("=")
        if not override.startswith("--config.") or not equals:
            raise UserError(f"unexpected argument {override!r}; overrides are --config.KEY=VALUE")
        known = _keys(config)
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{override}: the config has no key {key}{hint}")
    define = functools.partial(config_flags.DEFINE_config_dict, config=ConfigDict(config.to_dict()))
    try:
        return _parse(define, *overrides)
    except flags.Error as error:
        raise UserError(_one_line(error).removeprefix("IllegalFlagValueError: flag ")) from error


def resolve_config(
    path: str | None, overrides: Sequence[str], workdir: Path, *, command: str
) -> ConfigDict:
    """The config of a run that writes to `workdir`, which keeps it in config.json.

    A workdir that has one is gone on with: without `path` its config is taken as it is, with
    overrides of what may change. A file without a digest, as earlier versions wrote it, is compared
    with that of `path`, and not gone on with alone.

    Args:
      command: that the workdir belongs to.

    Raises:
      UserError: no config anywhere, or one that would make another run of what is in the workdir.
    """
    saved, trusted = _read_saved(workdir / "config.json", command)
    if path:
        config = load_config(path, overrides)
    elif saved is None:
        raise UserError(f"{workdir} holds no run to go on with; expected --config FILE")
    elif not trusted:
        raise UserError(
            f"{workdir / 'config.json'} has no sha256 that tells whether it is as it was written; "
            "expected --config FILE as well, with the run's config"
        )
    else:
        config = apply_overrides(saved, overrides)
    if saved is not None:
        check_same_run(lasting(saved), lasting(config), workdir)
    return config


def lasting(config: ConfigDict) -> dict[str, Any]:
    """The values, by their dotted names, that make a run what it is: all but MAY_CHANGE."""
    return {key: value for key, value in flatten(config.to_dict()).items() if key not in MAY_CHANGE}


def check_same_run(before: dict[str, Any], after: dict[str, Any], workdir: Path) -> None:
    """Raises a UserError that names the values in which two runs, as `lasting`, differ."""
    if changed := differing(before, after, "{} is {!r} there, {!r} here"):
        raise UserError(
            f"{workdir} holds a run with another config: {changed}; "
            "expected the same values, or another --workdir"
        )


def stages_of(config: ConfigDict) -> list[tuple[int, ConfigDict]]:
    """The run's parts: the steps done at the end of each, and the config that it has.

    Raises:
      UserError: config.stages is no sequence of such dicts, or their ends do not ascend.
    """
    stages, last = [], 0
    for number, stage in enumerate(config.stages):
        where = f"config.stages[{number}]"
        values = dict(stage) if isinstance(stage, (dict, ConfigDict)) else {}
        until = values.pop("until", None)
        if type(until) is not int or until <= last:
            raise UserError(
                f"{where} is {stage!r}; expected a dict whose until is more than {last} steps"
            )
        unknown = [key for key in values if key not in STAGED]
        if unknown:
            raise UserError(
                f"{where} sets {', '.join(unknown)}; expected some of {', '.join(STAGED)}"
            )
        part = ConfigDict(config.to_dict())
        try:
            part.update_from_flattened_dict(values)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: {_one_line(error)}") from error
        stages.append((until, part))
        last = until
    ended = [stage for stage in stages if stage[0] < config.steps]
    return [*ended, (config.steps, stages[len(ended)][1] if len(ended) < len(stages) else config)]


def named_stages(config: ConfigDict) -> list[tuple[str, ConfigDict]]:
    """Each part of the run by the name that errors give it, such as "config.stages[0]"."""
    return [
        (f"config.stages[{number}]" if number < len(config.stages) else "config", stage)
        for number, (_, stage) in enumerate(stages_of(config))
    ]


def save_config(config: ConfigDict, workdir: Path, *, command: str) -> None:
    """Writes WORKDIR/config.json; to be called once nothing in the config can be refused any more.

    Raises:
      UserError: the folder cannot be written.
    """
    try:
        write_sealed(
            workdir / "config.json",
            {"schema": SCHEMA, "command": command, "config": config.to_dict()},
        )
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error}") from error


def _read_saved(path: Path, command: str) -> tuple[ConfigDict | None, bool]:
    """The config of a workdir, None where there is none, and whether a digest vouches for it."""
    if not is_there(path):
        return None, True
    content, trusted = read_sealed(path, "a run's config")
    schema, saved, written_by = (content.get(key) for key in ("schema", "config", "command"))
    if schema not in (SCHEMA, None) or not isinstance(saved, dict):  # None: of earlier versions
        raise UserError(f"{path} is of schema {schema!r:.50}; expected {SCHEMA}, with a config")
    if written_by != command:
        raise UserError(
            f"{path.parent} is the workdir of `dmd-jax {written_by}`; expected one of {command}"
        )
    config = ConfigDict(_completed(saved, default_config().to_dict()))
    _drop_former(config, path)
    return config, trusted


def _drop_former(config: ConfigDict, where: Any) -> None:
    """Removes keys of earlier versions; raises a UserError where one asks for something."""
    for key, value in _FORMER.items():
        parent, _, name = key.rpartition(".")
        inner = config.get(parent)
        if not isinstance(inner, ConfigDict) or name not in inner:
            continue
        if inner[name] != value:
            raise UserError(
                f"{where}: config.{key} is {inner[name]!r}; expected none, or {value}: nothing is "
                "split over such an axis"
            )
        with inner.unlocked():
            del inner[name]


def _completed(saved: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A saved config with the default of every key that it does not have."""
    return defaults | {
        key: _completed(value, defaults[key])
        if isinstance(value, dict) and isinstance(defaults.get(key), dict)
        else value
        for key, value in saved.items()
    }


def _parse(define, *arguments: str) -> ConfigDict:
    argv = ["dmd-jax", *arguments]
    values = flags.FlagValues()
    define("config", flag_values=values, sys_argv=argv)
    values(argv)
    return values.config


def _keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """The dotted names of a config's entries, those of inner configs included."""
    keys = []
    for key, value in config.items():
        keys.append(prefix + key)
        if isinstance(value, ConfigDict):
            keys += _keys(value, f"{prefix}{key}.")
    return keys


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's values by their dotted names, JSON-able: lists stand for tuples."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            # JSON knows no tuples, at any depth.
            flat[prefix + key] = json.loads(json.dumps(value))
    return flat


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
