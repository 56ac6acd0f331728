"""The parts of an ablation study: what is trained and evaluated where, and what is finished."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dmd_jax.commands.cli import run_step
from dmd_jax.data.pairs_metadata import read_metadata
from dmd_jax.distillation.ablations import apply_row, decisive, row_overrides
from dmd_jax.errors import UserError
from dmd_jax.sampling.draws import DRAWS, draw_latents
from dmd_jax.sampling.maker import ImageMaker
from dmd_jax.storage.files import path_of
from dmd_jax.storage.judge_weights import LPIPS, describe_auxiliary
from dmd_jax.storage.seals import read_sealed, write_sealed
from dmd_jax.teachers.families import load_pipeline

COLUMNS = 20  # images of a row in the picture
SAMPLES_SEED = 0  # of the latents that everything is judged by


class Study(NamedTuple):
    """What all rows share; each method is one part, done where it is not finished."""

    config: ConfigDict
    arguments: list[str]  # --config and its overrides, which gave `config`
    evaluate: list[str]  # arguments of `dmd-jax evaluate` for every row
    judges: dict[str, Any]  # what they lead to, as evaluate.origins says
    teacher_sha256: str
    workdir: Path

    def baselines(self) -> dict[str, dict[str, Any]]:
        """{name: evaluate's results} of the teacher in many steps and in one."""
        teacher = path_of(self.config.teacher.weights)
        steps = str(self.config.pairs.num_steps)
        return {
            name: self._evaluated(self.workdir / name, teacher, sampler)
            for name, sampler in (
                ("teacher", ["--sampler", "heun", "--steps", steps]),
                ("teacher_one_step", ["--sampler", "one-step"]),
            )
        }

    def make_pairs(self) -> Path:
        """The folder of the pairs, which are made where the config names none."""
        if self.config.data.pairs:
            return path_of(self.config.data.pairs)
        folder = self.workdir / "pairs"
        run_step("pairs", *self.arguments, "--workdir", folder)
        return folder

    def run_row(self, row: str, seed: int, pairs: Path) -> dict[str, Any]:
        """evaluate's results of one row, trained from one seed."""
        folder = self.folder(row, seed)
        config = apply_row(self.config, row)
        config.seed = seed
        overrides = [
            *row_overrides(self.config, row),
            f"--config.seed={seed}",
            f"--config.data.pairs={pairs}",
        ]
        train = ["train", *self.arguments, *overrides, "--workdir", folder]
        return self._evaluated(
            folder,
            folder / "weights",
            ["--sampler", "one-step"],
            train=train,
            trained={"config": decisive(config), **_contents(config, pairs)},
        )

    def folder(self, row: str, seed: int) -> Path:
        """The workdir of one row's run."""
        return self.workdir / row / f"seed-{seed}"

    def images(self, rows: Sequence[str], seed: int) -> dict[str, np.ndarray]:
        """{label: [COLUMNS, H, W, C]} of the teacher and of each row, from the same latents."""
        teacher, steps = path_of(self.config.teacher.weights), self.config.pairs.num_steps
        makers = {
            f"teacher, {steps} steps": (teacher, "heun"),
            "teacher, one step": (teacher, "one-step"),
        }
        makers |= {row: (self.folder(row, seed) / "weights", "one-step") for row in rows}
        images = {}
        for label, (folder, sampler) in makers.items():
            maker = ImageMaker(
                load_pipeline(folder), sampler=sampler, num_steps=steps, batch_size=COLUMNS
            )
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
            print(f"ablate: {folder} is finished", file=sys.stderr)
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


def _contents(config: ConfigDict, pairs: Path) -> dict[str, Any]:
    """What the paths lead to that training reads, as another file may come under a name."""
    metadata = read_metadata(pairs)
    names = ("seed", "count", "num_steps", "teacher_sha256")
    contents: dict[str, Any] = {"pairs": {name: getattr(metadata, name) for name in names}}
    if config.objective.distance == "lpips" and config.objective.regression_weight:
        lpips = describe_auxiliary(path_of(config.lpips.weights), LPIPS)
        contents["lpips_sha256"] = lpips["params_sha256"]
    return contents


def _read(path: Path) -> dict[str, Any]:
    """A JSON file's content; nothing where there is none that can be read and is as it was."""
    try:
        return read_sealed(path, "what ablate wrote")[0]
    except UserError:
        return {}
