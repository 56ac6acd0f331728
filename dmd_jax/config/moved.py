"""Keys of configs of earlier versions: where each of them is to be found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dmd_jax.errors import UserError

_OBJECTIVE = (
    "match_reference",
    "regression_batch_size",
    "matching_weight",
    "regression_weight",
    "distance",
    "weighting",
    "alpha_factor",
    "min_index",
    "max_index",
    "generator_every",
    "ema_decay",
)
_OPTIMIZER = ("warmup_steps", "warmup_counts", "weight_decay", "beta1", "beta2")
_PLAYERS = ("optimizer.generator", "optimizer.fake_score")

# Later ones overwrite what earlier ones say.
_MOVED: dict[str, tuple[str, ...]] = {
    "images": ("data.images",),
    "pairs.folder": ("data.pairs",),
    "guidance": ("teacher.guidance",),
    "guidance_at_once": ("teacher.guidance_at_once",),
    "text.prompts": ("data.prompts",),
    **{
        f"text.{name}": (f"teacher.{name}",)
        for name in ("encode", "decoder", "text_encoder", "taesd", "vae")
    },
    **{
        f"teacher.{name}": (f"teaching.{name}",)
        for name in ("steps", "batch_size", "ema_decay", "p_mean", "p_std")
    },
    **{
        f"teacher.{name}": (f"teaching.optimizer.{name}",)
        for name in ("learning_rate", "warmup_steps", "weight_decay")
    },
    **{name: (f"objective.{name}",) for name in _OBJECTIVE},
    **{name: tuple(f"{player}.{name}" for player in _PLAYERS) for name in _OPTIMIZER},
    "clip_norm": (*(f"{player}.clip_norm" for player in _PLAYERS), "teaching.optimizer.clip_norm"),
    "learning_rate": ("optimizer.generator.learning_rate",),
    "fake_score_learning_rate": ("optimizer.fake_score.learning_rate",),
    "toy.fake_score_warmup_steps": ("optimizer.fake_score.warmup_steps",),
}
# Keys that there are no more, and the one value by which they asked for what there is.
_GONE = {"mesh.tensor": 1}


def place_of(key: str) -> str | None:
    """Where a dotted key of earlier versions has gone, for a message; None of any other key."""
    if key == "text":
        return "in config.teacher and config.data"
    places = _renamed(key)
    return None if places == (key,) else " and ".join(f"config.{place}" for place in places)


def places(override: str) -> list[str]:
    """An argument --config.KEY=VALUE of any earlier version, as those of the keys that it sets."""
    key, equals, value = override.removeprefix("--config.").partition("=")
    if not override.startswith("--config.") or not equals:
        return [override]
    return [f"--config.{place}={value}" for place in _renamed(key)]


def drop_gone(tree: dict[str, Any], where: Any) -> None:
    """Removes from a config's nested values the keys that there are no more.

    Raises:
      UserError: one asks for something that there is no more.
    """
    for key, value in _GONE.items():
        part, _, name = key.rpartition(".")
        inner = tree.get(part)
        if isinstance(inner, dict) and inner.get(name, value) != value:
            raise UserError(
                f"{where}: config.{key} is {inner[name]!r}; expected none, or {value}: nothing is "
                "split over such an axis"
            )
        if isinstance(inner, dict):
            inner.pop(name, None)


def with_places(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the dotted keys of any earlier version, by today's keys.

    A stage's keys are dotted ones as well.
    """
    order = {key: number for number, key in enumerate(_MOVED)}
    found = {}
    for key in sorted(values, key=lambda key: order.get(key, -1)):
        value = values[key]
        if key == "stages":
            stages = value if isinstance(value, list) else []
            value = [with_places(one) if isinstance(one, dict) else one for one in stages] or value
        found |= dict.fromkeys(_renamed(key), value)
    return found


def _renamed(key: str) -> tuple[str, ...]:
    """The keys that a key, or the part that it is in, has become; itself where it is as it was."""
    for old, places in _MOVED.items():
        if key == old or key.startswith(f"{old}."):
            return tuple(place + key[len(old) :] for place in places)
    return (key,)
