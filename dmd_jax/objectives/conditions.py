"""The conditions of a step's rows, of data and of fresh latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from dmd_jax.objectives.objective import Batch
from dmd_jax.teachers.teacher import Frozen, Teacher


def cond_of(teacher: Teacher, frozen: Frozen, rows: Mapping[str, jax.Array]) -> Any:
    """The condition of rows of data, which may have been encoded before the step."""
    return rows["cond"] if "cond" in rows else teacher.encode(frozen, rows)


def fresh_cond(teacher: Teacher, key: jax.Array, frozen: Frozen, batch: Batch, count: int) -> Any:
    """The conditions of `count` fresh latents: of the batch's prompts, or drawn."""
    if teacher.draw_tokens is None:
        return cond_of(teacher, frozen, batch["prompts"])
    return teacher.encode(frozen, teacher.draw_tokens(key, count))
