"""JAX's flags that change numbers: each has to be as this package counts on it."""

from __future__ import annotations

import jax

from dmd_jax.errors import UserError

# Where one of them differs, the same seed gives other noise, or sums have another type.
EXPECTED = {
    "jax_enable_x64": False,
    "jax_threefry_partitionable": True,
    "jax_default_prng_impl": "threefry2x32",
    "jax_numpy_dtype_promotion": "standard",
    "jax_random_seed_offset": 0,
}


def check_flags() -> None:
    """Raises a UserError that names the first flag of JAX by which a seed gives other numbers."""
    for name, expected in EXPECTED.items():
        value = getattr(jax.config, name)
        if value != expected:
            raise UserError(
                f"{name.upper()} is {value!r}, by which the same seed gives other numbers; "
                f"expected {expected!r}: take it out of the environment"
            )
