"""What an ablation study found: its figures, one table, one picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dmd_jax.reporting.pictures import GUTTER, grid, viewing_scale

LABEL_HEIGHT, LABEL_MARGIN = 14, 8  # pixels


def summarize(found: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The Fréchet distances of one row over its seeds.

    Args:
      found: {seed: results of `dmd-jax evaluate`}, all of the same features.

    Returns:
      "frechet_distance": {feature: {"mean", "std", "values"}}, std the sample's (n - 1), None for
      a single seed; and "features": {feature: {seed: all that evaluate says in it}}.
    """
    names = next(iter(found.values()))["features"]
    details = {
        name: {str(seed): results["features"][name] for seed, results in found.items()}
        for name in names
    }
    distances = {}
    for name, figures in details.items():
        values = [each["frechet_distance"] for each in figures.values()]
        std = statistics.stdev(values) if len(values) > 1 else None
        distances[name] = {"mean": statistics.fmean(values), "std": std, "values": values}
    return {"frechet_distance": distances, "features": details}


def table(results: Mapping[str, Any]) -> str:
    """The study as one Markdown table, from what results.json holds."""
    rows = results["baselines"] | results["rows"]
    features = list(next(iter(rows.values()))["frechet_distance"])
    papers = any("paper_fid" in row for row in rows.values())
    header = ["row", "what it is", *features, *(["paper's FID"] if papers else [])]
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2)]
    for name, row in rows.items():
        cells = [name, row["summary"], *(_cell(row["frechet_distance"][key]) for key in features)]
        if papers:
            cells.append(f"{row['paper_fid']:.2f}" if "paper_fid" in row else "")
        lines.append(cells)
    seeds = results["seeds"]
    trained = f"{results['steps']:,} training steps from seed {seeds[0]}."
    if len(seeds) > 1:
        trained = (
            f"{results['steps']:,} training steps from each of the seeds "
            f"{', '.join(map(str, seeds))}: mean ± standard deviation, and each in brackets."
        )
    return "\n".join(
        [
            f"# Ablation of {results['config_file']}",
            "",
            f"Fréchet distance to {results['reference']} in each of the features, lower is better. "
            f"{results['num_samples']:,} samples from the same latents for all; {trained}",
            "",
            *("| " + " | ".join(cells) + " |" for cells in lines),
            "",
        ]
    )


def labelled_rows(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """A sheet with one row of images for each name, which stands at its left.

    Args:
      rows: {name: images [N, H, W, C] in [-1, 1]}, all of one shape.

    Returns:
      uint8 [height, width, C].
    """
    first = next(iter(rows.values()))
    scale = viewing_scale(first.shape[1])
    sheet = grid(np.concatenate(list(rows.values())), columns=len(first), scale=scale)
    font = ImageFont.load_default(LABEL_HEIGHT)
    width = round(max(map(font.getlength, rows))) + 2 * LABEL_MARGIN
    strip = Image.new("L", (width, sheet.shape[0]), 255)
    draw = ImageDraw.Draw(strip)
    cell = first.shape[1] * scale + GUTTER
    for index, name in enumerate(rows):
        middle = GUTTER + index * cell + (cell - GUTTER) / 2
        draw.text((LABEL_MARGIN, middle), name, fill=0, font=font, anchor="lm")
    labels = np.repeat(np.asarray(strip)[..., None], sheet.shape[-1], axis=-1)
    return np.concatenate([labels, sheet], axis=1)


def _cell(distance: Mapping[str, Any]) -> str:
    if distance["std"] is None:
        return f"{distance['mean']:.3f}"
    values = ", ".join(f"{value:.3f}" for value in distance["values"])
    return f"{distance['mean']:.3f} ± {distance['std']:.3f} ({values})"
