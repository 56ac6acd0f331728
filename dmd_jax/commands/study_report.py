"""What a study found: its figures, one table, one picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dmd_jax.reporting.pictures import GUTTER, grid, viewing_scale

LABEL_HEIGHT, LABEL_MARGIN = 14, 8  # pixels


def summarize(found: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The Fréchet distances of one row over its seeds, and what its training took.

    Args:
      found: {seed: results of `dmd-jax evaluate`}, all of the same features.

    Returns:
      "frechet_distance": {feature: {"mean", "std", "values"}}, std the sample's (n - 1), None for
      a single seed; "features": {feature: {seed: all that evaluate says in it}}; and of what was
      trained "training": {"steps", "seconds_per_step"}, the median over the seeds.
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
    summary: dict[str, Any] = {"frechet_distance": distances, "features": details}
    took = [results["training"] for results in found.values() if "training" in results]
    if took:
        times = [one["seconds_per_step"] for one in took if one["seconds_per_step"]]
        seconds = statistics.median(times) if times else None
        summary["training"] = {"steps": took[0]["steps"], "seconds_per_step": seconds}
    return summary


def table(results: Mapping[str, Any], *, title: str, detailed: bool = False) -> str:
    """The study as one Markdown table, from what results.json holds.

    Args:
      detailed: adds precision and recall in the first of the features, and what training took.
    """
    rows = results["baselines"] | results["rows"]
    features = list(next(iter(rows.values()))["frechet_distance"])
    columns = {
        name: lambda row, name=name: _cell(row["frechet_distance"][name]) for name in features
    }
    if detailed:
        columns |= {
            "precision": lambda row: _mean(row["features"][features[0]], "precision"),
            "recall": lambda row: _mean(row["features"][features[0]], "recall"),
            "steps": lambda row: f"{row['training']['steps']:,}" if "training" in row else "",
            "ms a step": _milliseconds,
        }
    if any("paper_fid" in row for row in rows.values()):
        columns["paper's FID"] = lambda row: f"{row['paper_fid']:.2f}" if "paper_fid" in row else ""
    trained = _trained(results)
    lines = [["row", "what it is", *columns], ["---"] * 2 + ["---:"] * len(columns)]
    for name, row in rows.items():
        lines.append([name, row["summary"], *(cell(row) for cell in columns.values())])
    return "\n".join(
        [
            f"# {title}",
            "",
            f"Fréchet distance to {results['reference']} in each of the features, lower is better. "
            f"{results['num_samples']:,} samples from the same latents for all; {trained}",
            "",
            *("| " + " | ".join(cells) + " |" for cells in lines),
            "",
        ]
    )


def _trained(results: Mapping[str, Any]) -> str:
    """How many steps were made from which seeds."""
    steps = {row["training"]["steps"] for row in results["rows"].values() if "training" in row}
    made = f"{steps.pop():,} training steps" if len(steps) == 1 else "trained"
    seeds = results["seeds"]
    if len(seeds) == 1:
        return f"{made} from seed {seeds[0]}."
    return (
        f"{made} from each of the seeds {', '.join(map(str, seeds))}: mean ± standard deviation, "
        "and each in brackets."
    )


def _milliseconds(row: Mapping[str, Any]) -> str:
    seconds = row.get("training", {}).get("seconds_per_step")
    return "" if seconds is None else f"{1e3 * seconds:.0f}"


def _mean(by_seed: Mapping[str, Mapping[str, Any]], name: str) -> str:
    values = [each[name] for each in by_seed.values() if name in each]
    return f"{statistics.fmean(values):.3f}" if values else ""


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
