"""The stages of a run: parts of it that set some values for themselves."""

from __future__ import annotations

from ml_collections import ConfigDict

from dmd_jax.config.checks import check_values, flatten, option_of, unknown
from dmd_jax.errors import UserError, first_line


def stages_of(config: ConfigDict) -> list[tuple[int, ConfigDict]]:
    """The run's parts: the steps done at the end of each, and the config that it has.

    Raises:
      UserError: config.stages is no sequence of such dicts, or their ends do not ascend.
    """
    stages, last = [], 0
    for number, stage in enumerate(config.stages):
        where = f"config.stages[{number}]"
        values = dict(stage) if isinstance(stage, dict) else {}
        until = values.pop("until", None)
        if type(until) is not int or until <= last:
            raise UserError(
                f"{where} is {stage!r}; expected a dict whose until is more than {last} steps"
            )
        stages.append((until, _with_values(config, values, where)))
        last = until
    ended = [stage for stage in stages if stage[0] < config.steps]
    return [*ended, (config.steps, stages[len(ended)][1] if len(ended) < len(stages) else config)]


def named_stages(config: ConfigDict) -> list[tuple[str, ConfigDict]]:
    """Each part of the run by the name that errors give it, such as "config.stages[0]"."""
    return [
        (f"config.stages[{number}]" if number < len(config.stages) else "config", stage)
        for number, (_, stage) in enumerate(stages_of(config))
    ]


def _with_values(config: ConfigDict, values: dict, where: str) -> ConfigDict:
    """The config of a stage that sets these values by their dotted keys."""
    for key in values:
        if not isinstance(key, str) or option_of(key, config.objective.name) is None:
            raise UserError(f"{where}: {unknown(str(key), config)}")
        if not _is_staged(key, config):
            staged = [name for name in flatten(config.to_dict()) if _is_staged(name, config)]
            raise UserError(f"{where} sets {key}; expected some of {', '.join(staged)}")
    stage = ConfigDict(config.to_dict())
    try:
        stage.update_from_flattened_dict(values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {first_line(error)}") from error
    check_values(stage, where)
    return stage


def _is_staged(key: str, config: ConfigDict) -> bool:
    return option_of(key, config.objective.name).staged
