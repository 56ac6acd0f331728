"""The quickstart's report: one HTML file that shows its pictures, numbers and curves by itself.

Pictures are embedded, curves are drawn as SVG here, and nothing is loaded from anywhere.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dmd_jax.reporting.line_chart import line_chart
from dmd_jax.reporting.pictures import png_bytes
from dmd_jax.storage.files import write_whole

Curve = tuple[Sequence[float], Sequence[float]]  # steps, values


class Model(NamedTuple):
    """One of the three that are compared; `key` is its name in the results."""

    key: str
    title: str
    effort: str


MODELS = (
    Model("teacher_heun18", "Teacher, 18 steps", "35 evaluations"),
    Model("teacher_one_step", "Teacher, one step", "1 evaluation"),
    Model("generator", "Generator, one step", "1 evaluation"),
)


def write_report(
    folder: Path,
    results: Mapping[str, Any],
    pictures: Mapping[str, bytes | np.ndarray],
    curves: Mapping[str, Curve],
    command: str,
    machine: str,
) -> Path:
    """Writes report.html into `folder`, whole or not at all, and returns its path.

    Args:
      results: as in results.json: "fd", "class_agreement" and "seconds_per_image", each a dict by
        the keys of MODELS; what is missing shows as a dash.
      pictures: caption -> a PNG file's bytes, or uint8 [H, W, 1 or 3]. They stand side by side
        and are of the same latents and classes. MODELS has the captions.
      curves: name -> (steps, values), each drawn in a chart of its own.
      command: what a person types to repeat the run. machine: what it ran on, in words.
    """
    path = Path(folder) / "report.html"
    body = [
        "<header><p class='eyebrow'>dmd_jax quickstart</p>",
        "<h1>Handwritten digits in one&nbsp;step</h1>",
        f"<p class='lead'>{_summary(results)}</p></header>",
        "<section><h2>Same latents, three ways</h2>",
        "<p class='note'>A place in the pictures stands for one latent and one class, the same in",
        "all three. The generator began as the second picture’s network; distillation made it",
        "the third’s.</p>",
        "<div class='triptych'>",
        *(_figure(caption, picture) for caption, picture in pictures.items()),
        "</div></section>",
        "<section><h2>Measured</h2>",
        _table(results),
        "<p class='note'>Fréchet distance: between Gaussians fitted to the raw pixels of the",
        "samples and of the real digits; lower is better. Class agreement: the share of samples",
        "that a classifier trained on the real digits puts in the class asked for.</p></section>",
    ]
    if curves:
        body += [
            "<section><h2>Training</h2><p class='note'>Where two lines are drawn, the thin one is",
            "what was logged and the thick one its running mean.</p><div class='curves'>",
            *(line_chart(name, *curve) for name, curve in curves.items()),
            "</div></section>",
        ]
    body += [
        "<footer><h2>To repeat this</h2>",
        f"<pre><code>{escape(command)}</code></pre>",
        f"<p class='note'>Times were taken on {escape(machine)}.</p></footer>",
    ]
    page = PAGE.replace("{style}", STYLE).replace("{body}", "\n".join(body))
    write_whole(path, page.encode("utf-8"))
    return path


def _value(results: Mapping[str, Any], measure: str, key: str) -> float | None:
    return results.get(measure, {}).get(key)


def _ratio(results: Mapping[str, Any], measure: str, key: str, of: str) -> float | None:
    value, reference = _value(results, measure, key), _value(results, measure, of)
    return value / reference if value is not None and reference else None


def _summary(results: Mapping[str, Any]) -> str:
    distance = _ratio(results, "fd", "generator", "teacher_heun18")
    speed = _ratio(results, "seconds_per_image", "teacher_heun18", "generator")
    sentence = "A teacher’s 35 network evaluations for an image, distilled into one"
    if distance is None or speed is None:
        return f"{sentence}."
    return (
        f"{sentence}: <strong>{_times(speed)}&nbsp;as&nbsp;fast</strong>, at "
        f"<strong>{_times(distance)} the teacher’s Fréchet distance</strong> to the real digits."
    )


def _table(results: Mapping[str, Any]) -> str:
    rows = []
    for model in MODELS:
        speed = _ratio(results, "seconds_per_image", "teacher_heun18", model.key)
        distance = _ratio(results, "fd", model.key, "teacher_heun18")
        is_reference = model.key == "teacher_heun18"
        cells = [
            _cell(
                _value(results, "fd", model.key),
                "{:#.3g}".format,
                None if is_reference or distance is None else f"{_times(distance)} the teacher’s",
            ),
            _cell(_value(results, "class_agreement", model.key), "{:.1%}".format),
            _cell(
                _value(results, "seconds_per_image", model.key),
                _duration,
                None if is_reference or speed is None else f"{_times(speed)} as fast",
            ),
        ]
        name = f"{model.title}<small>{model.effort}</small>"
        rows.append(f"<tr><th scope='row'>{name}</th>{''.join(cells)}</tr>")
    heads = "".join(
        f"<th scope='col'>{head}</th>"
        for head in ("Model", "Fréchet distance", "Class agreement", "Time per image")
    )
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cell(value: float | None, show, remark: str | None = None) -> str:
    if value is None:
        return "<td class='none'><span aria-label='not measured'>–</span></td>"
    remark = f"<small>{remark}</small>" if remark else ""
    return f"<td>{show(value)}{remark}</td>"


def _times(ratio: float) -> str:
    return f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.2g}×"


def _duration(seconds: float) -> str:
    return f"{seconds:#.3g} s" if seconds >= 1 else f"{seconds * 1000:#.2g} ms"


def _figure(caption: str, picture: bytes | np.ndarray) -> str:
    png = picture if isinstance(picture, bytes) else png_bytes(picture)
    source = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
    efforts = {model.title: f" <small>{model.effort}</small>" for model in MODELS}
    return (
        f"<figure><img src='{source}' alt='{escape(caption)}: samples'>"
        f"<figcaption>{escape(caption)}{efforts.get(caption, '')}</figcaption></figure>"
    )


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>dmd_jax quickstart: handwritten digits in one step</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

STYLE = """
:root {
  --paper: #fdfdfc; --ink: #1c1e21; --quiet: #5f646b; --rule: #dfe0e2; --tint: #f2f3f3;
  --accent: #0b6e69;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16181a; --ink: #e8e9ea; --quiet: #a0a6ad; --rule: #34383c; --tint: #1f2225;
    --accent: #62cbc3;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 62rem; margin: 0 auto; padding: clamp(1.5rem, 5vw, 4rem) clamp(1rem, 4vw, 2rem); }
h1 { margin: 0; font-size: clamp(1.75rem, 5vw, 2.5rem); line-height: 1.15; font-weight: 650;
  letter-spacing: -0.02em; }
h2 { margin: 0 0 0.4rem; font-size: 1.15rem; font-weight: 650; }
p { margin: 0; max-width: 42rem; text-wrap: pretty; }
section, footer { margin-top: 3.25rem; }
small { font-size: 0.8125rem; color: var(--quiet); font-weight: 400; }
.eyebrow { margin-bottom: 0.5rem; color: var(--accent); font-size: 0.875rem; font-weight: 600; }
.lead { margin-top: 1rem; font-size: 1.15rem; }
.note { color: var(--quiet); font-size: 0.9rem; }
.triptych, .curves { display: grid; gap: 1.5rem; margin-top: 1.25rem; }
.triptych { grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); }
.curves { grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)); }
figure { margin: 0; min-width: 0; }
img { display: block; width: 100%; border-radius: 3px; image-rendering: pixelated; }
figcaption { margin: 0.5rem 0; font-weight: 600; font-size: 0.95rem; }
table { width: 100%; margin: 0.9rem 0; border-collapse: collapse;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.7rem 0 0.7rem 1rem; text-align: right; vertical-align: baseline; }
th:first-child { padding-left: 0; text-align: left; }
thead th { border-bottom: 2px solid var(--ink); font-size: 0.875rem; font-weight: 600;
  vertical-align: bottom; line-height: 1.3; }
tbody th { font-weight: 600; }
tbody tr { border-bottom: 1px solid var(--rule); }
tbody tr:last-child > * { color: var(--accent); }
td { white-space: nowrap; font-size: 1.05rem; }
th small, td small { display: block; }
.none { color: var(--quiet); }
svg { display: block; width: 100%; height: auto; font-size: 12px; }
svg text { fill: var(--quiet); font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--rule); }
svg .line { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round;
  stroke-linecap: round; }
svg .thin { stroke-width: 1; opacity: 0.4; }
pre { margin: 0.6rem 0; padding: 0.8rem 1rem; background: var(--tint); border-radius: 4px;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.875rem; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media (max-width: 34rem) {
  th, td { padding-left: 0.6rem; }
  td { font-size: 0.95rem; }
  thead th, small { font-size: 0.75rem; }
  td small { white-space: normal; line-height: 1.3; }
}
"""
