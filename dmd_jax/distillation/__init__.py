"""A config's distillation: its objective by stages, its parameters and its data."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dmd_jax.config import named_stages, settings_of, stages_of
from dmd_jax.data.pair_shards import PairSource
from dmd_jax.data.pairs_metadata import TextPairsMetadata
from dmd_jax.data.sources import ImageSource
from dmd_jax.distillation.from_config import (
    check_same_network,
    computation_of,
    distance_of,
    fake_weight_of,
    images_of,
    lpips_of,
)
from dmd_jax.distillation.setting import Method, Setting
from dmd_jax.distillation.text import Text, decoder_names, load_text, null_condition
from dmd_jax.errors import UserError
from dmd_jax.method import samplers
from dmd_jax.method.randomness import Role, key_data, role_key
from dmd_jax.method.types import Params
from dmd_jax.models import guided
from dmd_jax.models.judges.lpips import lpips_template
from dmd_jax.objectives import Networks, Objective
from dmd_jax.objectives.kinds import KINDS
from dmd_jax.objectives.optimizers import AdamW, Optimizer, adamw
from dmd_jax.options import make
from dmd_jax.storage.weights import Weights, load_weights, params_sha256
from dmd_jax.teachers.families import family_of, networks_of
from dmd_jax.teachers.family import abstract_frozen, abstract_tokens
from dmd_jax.teachers.teacher import Frozen, Teacher

# Columns of a picture: for images up to 64 pixels, and for larger ones.
COLUMNS, LARGE_COLUMNS = 10, 4


def method_of(config: ConfigDict) -> Method:
    """The functions and the shapes of the config's distillation, from the config alone.

    Raises:
      UserError: a value is impossible.
    """
    family = family_of(config.network)
    guidance, matches = config.teacher.guidance, config.objective.get("match_reference", False)
    if family.takes == "labels" and (guidance != 1 or matches):
        raise UserError(
            f"config.teacher.guidance is {guidance} and config.objective.match_reference "
            f"{matches}; expected 1.0 and False for a teacher that is {family.network_is}"
        )
    # Once for each decoder, not for each objective: a text encoder takes seconds to trace.
    teachers = {name: _teacher(config, name) for name in decoder_names(config)}
    teacher = teachers[config.teacher.decoder]
    ahead = teacher.draw_tokens is None and config.teacher.encode == "ahead"
    judge = distance_of(config, _image_shape(config, teacher))
    copy = lambda frozen, key: frozen["network"]  # noqa: E731
    optimizers, weight, key = optimizers_of(config), fake_weight_of(config), preview_key(config)

    def distance(teacher: Teacher, frozen: Frozen, x: jax.Array, y: jax.Array) -> jax.Array:
        """The distance of what two samples look like."""
        images = (teacher.decode(frozen, samples) for samples in (x, y))
        return judge(frozen["lpips"], *images)

    def objective(stage: ConfigDict) -> Objective:
        own = teachers[stage.teacher.decoder]
        judged = {} if judge is None else {"lpips": functools.partial(distance, own)}
        return build_objective(
            settings_of(stage),
            name=stage.objective.name,
            teacher=own,
            networks=roles_of(stage, own),
            init=dict.fromkeys(optimizers, copy),
            optimizers=optimizers,
            preview_key=key,
            **({"fake_weight": weight} if "fake_score" in optimizers else {}),
            **judged,
        )

    def frozen() -> dict[str, Any]:
        judges = {} if judge is None else {"lpips": lpips_template()}
        return _frozen(config, teacher) | judges

    encode_ahead = functools.partial(_encode_ahead, teacher) if ahead else None
    return Method(objective, frozen, encode_ahead, teacher, judged=judge is not None)


def build_objective(settings: Any, *, name: str, **parts: Any) -> Objective:
    """The objective of that name.

    Args:
      parts: the other arguments of its builder.

    Raises:
      UserError: settings that do not fit these.
    """
    try:
        return KINDS[name].build(settings, **parts)
    except UserError as error:
        raise UserError(f"config.objective: {error}") from error


def setting_of(config: ConfigDict, weights: Weights) -> Setting:
    """The setting that fits the teacher's network.

    Raises:
      UserError: data or weights that the config names are not there or do not fit, or a value is
        impossible.
    """
    text = None
    # A copy, since a run is gone on with by the config that it was given. The weights' own options
    # may differ in what only their training took.
    config = ConfigDict(config.to_dict() | {"network": weights.network})
    if family_of(config.network).takes == "text":
        text, config = load_text(config)
    method = method_of(config)
    teacher = method.teacher
    frozen: dict[str, Any] = {"network": weights.params}
    identity: dict[str, Any] = {"teacher_sha256": params_sha256(weights.params)}
    pairs = _pairs_by_folder(config, method, teacher, identity["teacher_sha256"], text)
    *earlier, last = [pairs_identity(one) for one in pairs.values()] or [{}]
    identity |= last | ({"earlier_pairs": earlier} if earlier else {})
    if text is not None:
        identity |= text.identity()
        frozen |= {
            "null": null_condition(text, teacher),
            "text_encoder": text.encoder.params,
            "decoders": {name: one.params for name, one in text.decoders.items()},
        }
    if method.judged:
        frozen["lpips"] = lpips_of(config)
        identity["lpips_sha256"] = params_sha256(frozen["lpips"])
    images = _images_of(config, method)
    if images is not None:
        identity["images"] = len(images)
    starts = _starts(config, method.objective(config))
    for name, start in starts.items():
        identity[f"start_{name}_sha256"] = params_sha256(start)

    def sources(stage: ConfigDict) -> dict[str, Any]:
        needs = method.objective(stage).needs
        found = {"pairs": pairs[stage.data.pairs]} if "pairs" in needs else {}
        found |= {"images": images} if "images" in needs else {}
        return found | ({"prompts": text.prompts} if "prompts" in needs else {})

    preview, count = _preview(teacher, frozen, sources(config))
    return Setting(
        method=method,
        frozen=frozen,
        starts=starts,
        sources=sources,
        identity=identity,
        network=weights.network,
        class_names=weights.class_names,
        description=f"{_steps_of(config)}-step generator, distilled for {{step}} steps",
        preview=preview,
        preview_count=count,
    )


def _steps_of(config: ConfigDict) -> str:
    count = config.objective.get("num_steps", 1)
    return "one" if count == 1 else str(count)


def _images_of(config: ConfigDict, method: Method) -> ImageSource | None:
    """The real images of the stages that read some, if any does.

    Raises:
      UserError: as images_of.
    """
    for where, stage in named_stages(config):
        if "images" in method.objective(stage).needs:
            if method.teacher.takes == "text":
                raise UserError(
                    f"{where}.objective: {stage.objective.name} reads real images with these "
                    "settings, and of text there is no source of them; expected dmd, or dmd2 with "
                    "gan_weight and gan_fake_weight 0 and backward_simulation"
                )
            return images_of(config, method.teacher)
    return None


def _starts(config: ConfigDict, objective: Objective) -> dict[str, Params]:
    """The parameters of the players that config.start names weights for.

    Raises:
      UserError: there are none, they are of another network, or the objective has no such player.
    """
    named = {name: folder for name, folder in config.start.items() if folder}
    starts = {}
    for name, folder in named.items():
        if name not in objective.players:
            raise UserError(
                f"config.start.{name} is {folder}, and nothing trains a {name} here; expected "
                f"some of {', '.join(objective.players)}"
            )
        weights = load_weights(folder, player=name)
        check_same_network(weights.network, config.network.to_dict(), folder)
        starts[name] = weights.params
    return starts


def optimizers_of(config: ConfigDict) -> dict[str, Optimizer]:
    """Those of the objective's players, by name."""
    every = {"generator": config.objective.get("generator_every", 1)}
    return {
        player: adamw(
            make(AdamW, options.to_dict(), f"config.optimizer.{player}"),
            every=every.get(player, 1),
        )
        for player, options in config.optimizer.items()
    }


def _teacher(config: ConfigDict, decoder: str) -> Teacher:
    """The config's teacher with one of its decoders.

    Raises:
      UserError: an impossible network, or networks that do not fit each other.
    """
    build = family_of(config.network).build
    return build(networks_of(config, decoder), remat=config.remat, **computation_of(config))


def _frozen(config: ConfigDict, teacher: Teacher) -> dict[str, Any]:
    """The frozen parameters of the teacher and of every stage's decoder, as ShapeDtypeStructs."""
    networks = dict(networks_of(config))
    decoders = {name: config.teacher[name].to_dict() for name in decoder_names(config)}
    if teacher.draw_tokens is None:
        networks["decoders"] = decoders
    frozen = abstract_frozen(networks)
    if teacher.draw_tokens is None:
        frozen["null"] = jax.eval_shape(teacher.encode, frozen, abstract_tokens(teacher, 1))
    return frozen


def _image_shape(config: ConfigDict, teacher: Teacher) -> tuple[int, ...]:
    """Of one image, (H, W, C)."""
    latents = jax.ShapeDtypeStruct((1, *teacher.sample_shape), jnp.float32)
    decoders = networks_of(config, config.teacher.decoder).get("decoders", {})
    frozen = {"decoders": abstract_frozen(decoders)}
    return jax.eval_shape(teacher.decode, frozen, latents).shape[1:]


def _encode_ahead(teacher: Teacher, frozen: Frozen, batch: Any) -> Any:
    """Each source's tokens as the condition that they encode."""
    return {
        source: {name: leaf for name, leaf in rows.items() if name not in teacher.tokens}
        | {"cond": teacher.encode(frozen, rows)}
        for source, rows in batch.items()
    }


def roles_of(config: ConfigDict, teacher: Teacher) -> Networks:
    """All three roles are the teacher's network; the teacher alone is guided."""
    guide = guided(
        teacher.denoise, config.teacher.guidance, at_once=config.teacher.guidance_at_once
    )

    def real_score(frozen: Frozen, x_t: jax.Array, level: Any, cond: Any) -> jax.Array:
        return guide(frozen["network"], x_t, level, (cond, teacher.null(frozen)))

    return Networks(
        generate=functools.partial(samplers.one_step, teacher.denoise, schedule=teacher.schedule),
        teacher=real_score,
        fake_score=teacher.denoise,
    )


def preview_key(config: ConfigDict) -> jax.Array:
    """Of the latents of pictures, which are the same throughout a run."""
    return role_key(key_data(config.seed), 0, Role.PREVIEW)


def _preview(
    teacher: Teacher, frozen: Frozen, sources: dict[str, Any]
) -> tuple[dict[str, dict[str, np.ndarray]], int]:
    """The batch of pictures, the first rows of each source; and how many."""
    latents = jax.ShapeDtypeStruct((1, *teacher.sample_shape), jnp.float32)
    size = jax.eval_shape(teacher.decode, frozen, latents).shape[1]
    count = COLUMNS if size <= 64 else LARGE_COLUMNS
    if not sources:
        tokens = teacher.draw_tokens(jax.random.key(0), count)
        return {"prompts": jax.device_get(dict(tokens))}, count
    count = min(count, len(next(iter(sources.values()))))
    first = {
        name: [source[index % len(source)] for index in range(count)]
        for name, source in sources.items()
    }
    return {
        name: {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        for name, rows in first.items()
    }, count


def _pairs_by_folder(
    config: ConfigDict, method: Method, teacher: Teacher, teacher_sha256: str, text: Text | None
) -> dict[str, PairSource]:
    """The pairs of all stages that read some, in the order in which they are read last.

    Raises:
      UserError: as _open_pairs.
    """
    pairs: dict[str, PairSource] = {}
    for _, stage in stages_of(config):
        if "pairs" in method.objective(stage).needs:
            source = pairs.pop(stage.data.pairs, None)
            source = source or _open_pairs(stage, teacher, teacher_sha256, text)
            pairs[stage.data.pairs] = source
    return pairs


def _open_pairs(
    config: ConfigDict, teacher: Teacher, teacher_sha256: str, text: Text | None
) -> PairSource:
    """The pairs of config.data.pairs, which are the teacher's.

    Raises:
      UserError: they are not there, not whole, of another kind or of another teacher.
    """
    if not config.data.pairs:
        raise UserError("config.data.pairs is empty; expected the workdir of `dmd-jax pairs`")
    pairs = PairSource(
        config.data.pairs,
        sample_shape=teacher.sample_shape,
        num_classes=teacher.limits.get("label", 0),
        token_length=None if text is None else text.tokenizer.max_length,
    )
    if pairs.metadata.teacher_sha256 != teacher_sha256:
        raise UserError(
            f"pairs {config.data.pairs} were made by another teacher "
            f"({pairs.metadata.teacher}) than config.teacher.weights {config.teacher.weights}"
        )
    if text is None:
        return pairs
    for name, found, expected in (
        ("guidance", pairs.metadata.guidance, config.teacher.guidance),
        ("text_encoder_sha256", pairs.metadata.text_encoder_sha256, text.encoder_sha256),
    ):
        if found != expected:
            raise UserError(
                f"pairs {config.data.pairs} were made with {name} {found}; expected {expected}, "
                "that of the config and its teacher"
            )
    return pairs


def pairs_identity(pairs: PairSource) -> dict[str, Any]:
    """What identifies pairs in a checkpoint."""
    identity = {
        "pairs_seed": pairs.metadata.seed,
        "pairs": len(pairs),
        "pairs_steps": pairs.metadata.num_steps,
        "pairs_sampler": pairs.metadata.sampler,
    }
    if isinstance(pairs.metadata, TextPairsMetadata):
        identity["pairs_prompts_sha256"] = pairs.metadata.prompts_sha256
    return identity
