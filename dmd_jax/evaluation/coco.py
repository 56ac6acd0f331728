"""Captions of images, such as COCO's, and which of them an evaluation takes.

A fixed rule, so that two evaluations of one file are of the same prompts: from COCO's JSON, one
caption an image, that with the lowest "id", the images in the order of their "image_id"; from a
text file all lines in order. Of these `num`, evenly spread from the first on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dmd_jax.data.prompt_rows import BrokenRow, PromptRows
from dmd_jax.errors import UserError
from dmd_jax.evaluation.reference import evenly
from dmd_jax.storage.untrusted import read_json

NUM_CAPTIONS = 30_000
_FORMS = "expected COCO's captions as .json, or a caption a line in a .txt"
_NAMED = 3  # of the annotations or lines that are broken


class Annotation(NamedTuple):
    """One of COCO's captions; these sort as the rule has it."""

    image_id: int
    id: int
    caption: str


def read_captions(path: str | Path, num: int) -> list[str]:
    """The captions of an evaluation of `num` images.

    Raises:
      UserError: the file cannot be read, has another form, broken captions (counted, the first
        named), or too few.
    """
    path = Path(path)
    if path.suffix not in (".json", ".txt"):
        raise UserError(f"--coco {path}: {_FORMS}")
    captions = _from_json(path) if path.suffix == ".json" else _from_lines(path)
    if num > len(captions):
        images = " (one an image)" if path.suffix == ".json" else ""
        raise UserError(
            f"--coco {path} has {len(captions):,} captions{images}; expected --num {num:,} or more"
        )
    return [captions[index] for index in evenly(len(captions), num)]


def _from_lines(path: Path) -> list[str]:
    rows = list(PromptRows(path))
    _refuse(path, [f"{row.where}: {row.problem}" for row in rows if isinstance(row, BrokenRow)])
    return [row.decode() for row in rows]


def _from_json(path: Path) -> list[str]:
    try:
        content = read_json(path, "the JSON of COCO's captions")
    except UserError as error:
        raise UserError(f"--coco {error}") from error
    entries = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UserError(f"--coco {path} has no list of annotations; {_FORMS}")
    annotations = [_annotation(entry) for entry in entries]
    broken = [number for number, found in enumerate(annotations) if found is None]
    _refuse(path, [f"annotation {n} has no caption, image_id and id of its kinds" for n in broken])
    captions: dict[int, str] = {}
    for annotation in sorted(annotations):
        captions.setdefault(annotation.image_id, annotation.caption)
    return list(captions.values())


def _annotation(entry: Any) -> Annotation | None:
    """None if it is broken."""
    if not isinstance(entry, dict):
        return None
    values = [entry.get(field) for field in Annotation._fields]
    fits = type(values[0]) is int and type(values[1]) is int and isinstance(values[2], str)
    return Annotation(*values) if fits else None


def _refuse(path: Path, problems: Sequence[str]) -> None:
    if problems:
        more = "; …" if len(problems) > _NAMED else ""
        named = "; ".join(problems[:_NAMED])
        raise UserError(f"--coco {path}: {len(problems):,} broken captions: {named}{more}")
