"""A study: what is trained and evaluated where, from one teacher, and what is finished."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dmd_jax.commands.cli import run_step
from dmd_jax.data.pairs_metadata import read_metadata
from dmd_jax.distillation.ablations import decisive
from dmd_jax.errors import UserError
from dmd_jax.reporting.metrics import read_metrics
from dmd_jax.sampling.draws import DRAWS, draw_latents
from dmd_jax.sampling.maker import ImageMaker
from dmd_jax.storage.files import path_of
from dmd_jax.storage.judge_weights import LPIPS, describe_auxiliary
from dmd_jax.storage.seals import read_sealed, write_sealed
from dmd_jax.storage.weights import sampling_of
from dmd_jax.teachers.families import load_pipeline

BASELINES = ("teacher", "teacher_one_step")
COLUMNS = 20  # images of a row in the picture
SAMPLES_SEED = 0  # of the latents that everything is judged by


class Variant(NamedTuple):
    """One thing that a study trains."""

    summary: str
    config: ConfigDict
    arguments: Sequence[str]  # of `dmd-jax train`, which give that config
    facts: Mapping[str, Any] = {}  # JSON-able, what the results say of it besides
    reads_pairs: bool = True
    images: Sequence[Any] | None = None  # JSON-able, which real images it reads, if any


class Study(NamedTuple):
    """What all variants share; each method is one part, done where it is not finished."""

    name: str  # of the command
    config: ConfigDict
    arguments: list[str]  # --config and its overrides, which gave `config`
    variants: Mapping[str, Variant]
    evaluate: list[str]  # arguments of `dmd-jax evaluate` for every variant
    judges: dict[str, Any]  # what they lead to, as evaluate.origins says
    teacher_sha256: str
    workdir: Path

    def baselines(self) -> dict[str, dict[str, Any]]:
        """{name: evaluate's results} of the teacher in many steps and in one."""
        teacher = path_of(self.config.teacher.weights)
        steps = str(self.config.pairs.num_steps)
        return {
            name: self._evaluated(self.workdir / name, teacher, sampler)
            for name, sampler in zip(
                BASELINES,
                (["--sampler", "heun", "--steps", steps], ["--sampler", "one-step"]),
                strict=True,
            )
        }

    def make_pairs(self) -> Path | None:
        """The folder of the pairs, made where the config names none; None where none reads any."""
        if not any(variant.reads_pairs for variant in self.variants.values()):
            return None
        if self.config.data.pairs:
            return path_of(self.config.data.pairs)
        folder = self.workdir / "pairs"
        run_step("pairs", *self.arguments, "--workdir", folder)
        return folder

    def run_variant(self, name: str, seed: int, pairs: Path | None) -> dict[str, Any]:
        """evaluate's results of a variant trained from one seed, and what that took: "training"."""
        folder, variant = self.folder(name, seed), self.variants[name]
        config = ConfigDict(variant.config.to_dict())
        config.seed = seed
        overrides = [f"--config.seed={seed}"]
        if pairs is not None:
            overrides.append(f"--config.data.pairs={pairs}")
        sampler = [] if sampling_of(config.objective) else ["--sampler", "one-step"]
        results = self._evaluated(
            folder,
            folder / "weights",
            sampler,
            train=["train", *variant.arguments, *overrides, "--workdir", folder],
            trained={"config": decisive(config), **_contents(config, pairs, variant.images)},
        )
        return results | {"training": _took(folder, config)}

    def folder(self, name: str, seed: int) -> Path:
        """The workdir of one variant's run."""
        return self.workdir / name / f"seed-{seed}"

    def images(self, seed: int) -> dict[str, np.ndarray]:
        """{label: [COLUMNS, H, W, C]} of the teacher and of each variant, from the same latents."""
        teacher, steps = path_of(self.config.teacher.weights), self.config.pairs.num_steps
        made = {
            f"teacher, {steps} steps": (teacher, {"sampler": "heun", "num_steps": steps}),
            "teacher, one step": (teacher, {"sampler": "one-step"}),
        }
        made |= {name: (self.folder(name, seed) / "weights", {}) for name in self.variants}
        images = {}
        for label, (folder, options) in made.items():
            maker = ImageMaker(load_pipeline(folder), batch_size=COLUMNS, **options)
            z = draw_latents(SAMPLES_SEED, 0, COLUMNS, maker.sample_shape)
            labels = np.arange(COLUMNS, dtype=np.int32) * max(maker.num_classes, 1) // COLUMNS
            images[label] = maker(z, {"label": labels})
        return images

    def _evaluated(
        self,
        folder: Path,
        weights: Path,
        sampler: list[str],
        *,
        train: Sequence[Any] = (),
        trained: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """What evaluate says of `weights`, once the command `train`, if any, has made them.

        FOLDER/finished.json holds it with all that it follows from, so that it is done once.
        """
        arguments = [*self.evaluate, "--seed", str(SAMPLES_SEED), *sampler]
        settings = {
            "trained": trained,
            "evaluate": arguments,
            "draws": DRAWS,
            "judges": self.judges,
            "teacher_sha256": self.teacher_sha256,
        }
        path = folder / "finished.json"
        finished = _read(path)
        if finished.get("settings") == settings:
            print(f"{self.name}: {folder} is finished", file=sys.stderr)
            return finished["results"]
        if train:
            run_step(*train)
        out = folder / "results.json"
        run_step("evaluate", "--weights", weights, *arguments, "--out", out)
        results = _read(out)
        try:
            write_sealed(path, {"settings": settings, "results": results})
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error}") from error
        return results


def _took(folder: Path, config: ConfigDict) -> dict[str, Any]:
    """A run's steps, and the seconds of one in the middle of the lines that it wrote."""
    rates = [line["images_per_second"] for line in read_metrics(folder)]
    usual = float(np.median(rates)) if rates else None
    seconds = config.batch_size / usual if usual else None
    return {"steps": config.steps, "seconds_per_step": seconds}


def _contents(
    config: ConfigDict, pairs: Path | None, images: Sequence[Any] | None
) -> dict[str, Any]:
    """What the paths lead to that training reads, as another file may come under a name."""
    contents: dict[str, Any] = {}
    if pairs is not None:
        metadata = read_metadata(pairs)
        names = ("seed", "count", "num_steps", "teacher_sha256")
        contents["pairs"] = {name: getattr(metadata, name) for name in names}
    if images is not None:
        contents["images"] = list(images)
    objective = config.objective
    if objective.get("distance") == "lpips" and objective.get("regression_weight", 1):
        lpips = describe_auxiliary(path_of(config.lpips.weights), LPIPS)
        contents["lpips_sha256"] = lpips["params_sha256"]
    return contents


def _read(path: Path) -> dict[str, Any]:
    """A JSON file's content; nothing where there is none that can be read and is as it was."""
    try:
        return read_sealed(path, "what a study wrote")[0]
    except UserError:
        return {}
