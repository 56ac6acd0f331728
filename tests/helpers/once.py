"""Programs that run once: what the compiler spends on optimising them is never earned back."""

import functools

import jax

once = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
