"""How a run is configured: a Python file, overrides on the command line, a copy in the workdir."""

from dmd_jax.config.checks import (
    check_keys,
    check_same_run,
    check_values,
    flatten,
    lasting,
    option_of,
    settings_of,
    value_of,
    when_asked,
)
from dmd_jax.config.files import (
    apply_overrides,
    default_config,
    load_config,
    resolve_config,
    save_config,
    shipped_config,
    with_objective,
)
from dmd_jax.config.stages import named_stages, stages_of

__all__ = [
    "apply_overrides",
    "check_keys",
    "check_same_run",
    "check_values",
    "default_config",
    "flatten",
    "lasting",
    "load_config",
    "named_stages",
    "option_of",
    "resolve_config",
    "save_config",
    "settings_of",
    "shipped_config",
    "stages_of",
    "value_of",
    "when_asked",
    "with_objective",
]
