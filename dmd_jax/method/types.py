"""The types that functions of the method are written in; no library's classes are among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from dmd_jax.method.schedules import NoiseLevel

# A nested dict of arrays, or any other pytree that its function understands.
Params = Any
# (params, x_t, level, cond) -> x0; cond is labels, embeddings, or None.
Denoise = Callable[[Params, jax.Array, NoiseLevel, Any], jax.Array]
# (params, z, cond) -> x
Generate = Callable[[Params, jax.Array, Any], jax.Array]
