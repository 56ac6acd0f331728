"""What the values of a config may be, and when they may change."""

import dataclasses

import numpy as np
import pytest
from commands import TINY, fails, succeeds

from dmd_jax.config import (
    check_values,
    default_config,
    flatten,
    lasting,
    load_config,
    option_of,
    settings_of,
    when_asked,
)
from dmd_jax.errors import UserError
from dmd_jax.objectives import DMD
from dmd_jax.options import make, option
from dmd_jax.reporting.metrics import read_metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    point: tuple[float, float] = option((0.0, 1.0))
    named: dict[str, float] = option(factory=dict, most=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    given: int
    count: int = option(3, least=1)
    rate: float = option(0.5, above=0, most=1)
    kind: str = option("a", choices=("a", "b"))
    switch: bool = option(False)
    inner: Inner = option(factory=Inner)
    perhaps: Inner | None = option(None)


def test_settings_are_made_of_values_by_name():
    values = {"count": 5, "rate": 1, "inner": {"point": [1, 2], "named": {"x": 2}}, "perhaps": {}}
    found = make(Outer, values, "here", given=7)
    inner = Inner(point=(1.0, 2.0), named={"x": 2.0})
    assert found == Outer(given=7, count=5, rate=1.0, inner=inner, perhaps=Inner())
    assert type(found.rate) is type(found.inner.point[0]) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "here.count is 0; expected at least 1"),
        ({"count": 2.0}, "here.count is 2.0; expected a whole number"),
        ({"count": True}, "here.count is True; expected a whole number"),
        ({"rate": 0}, "here.rate is 0; expected more than 0"),
        ({"rate": 1.5}, "here.rate is 1.5; expected at most 1"),
        ({"rate": float("nan")}, "here.rate is nan; expected a finite number"),
        ({"rate": "0.5"}, "here.rate is '0.5'; expected a finite number"),
        ({"kind": "c"}, "here.kind is 'c'; expected one of a, b"),
        ({"kind": 3}, "here.kind is 3; expected text"),
        ({"switch": 1}, "here.switch is 1; expected True or False"),
        ({"inner": 4}, "here.inner is 4; expected a dict"),
        ({"inner": {"point": (1.0,)}}, "here.inner.point is (1.0,); expected 2 numbers"),
        ({"inner": {"point": "ab"}}, "here.inner.point is 'ab'; expected a sequence"),
        ({"inner": {"point": (1, "b")}}, "here.inner.point is 'b'; expected a finite number"),
        ({"perhaps": {"named": {"x": 3}}}, "here.perhaps.named.x is 3; expected at most 2"),
        ({"other": 1}, "here: missing keys [], unknown keys ['other']"),
    ],
)
def test_a_value_that_cannot_be_is_named(values, message):
    with pytest.raises(UserError) as caught:
        make(Outer, values, "here", given=1)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.name=dmd3", "config.objective.name is 'dmd3'; expected one of dmd"),
        ("objective.regresion_weight=1", "did you mean objective.regression_weight?"),
        ("optimizer.generator.beta1=2.0", "config.optimizer.generator.beta1 is 2.0; expected less"),
        ("teaching.optimizer.clip_norm=0.0", "teaching.optimizer.clip_norm is 0.0; expected more"),
        ("teacher.decoder=jpeg", "config.teacher.decoder is 'jpeg'; expected one of vae, taesd"),
        ("compute_dtype=float16", "config.compute_dtype is 'float16'; expected one of float32, b"),
        ("remat=some", "config.remat is 'some'; expected one of none, full, dots"),
        ("optimizer.fake_score.beta2=1.0", "beta2 is 1.0; expected less than 1"),
        ("objective.ema_decay=1.0", "config.objective.ema_decay is 1.0; expected less than 1"),
        ("seed=-1", "config.seed is -1; expected at least 0"),
        ("pairs.seed=4294967296", "config.pairs.seed is 4294967296; expected at most 2147483647"),
        (f"batch_size={'9' * 400}", "expected a whole number"),
        ("pairs={'seed':3}", "pairs is a part; expected --config.pairs.KEY=VALUE"),
        ("objective={'name':'dmd'}", "objective is a part; expected --config.objective.KEY=VALUE"),
        ("optimizer.generator={}", "is a part; expected --config.optimizer.generator.KEY=VALUE"),
        ("stages=({'until':4,'seed':1},)", "config.stages[0] sets seed; expected some of"),
        ("stages=({'until':4,3:3},)", "config.stages[0]: the config has no key 3"),
        ("stages=(b'x',)", "config.stages is (b'x',); expected plain Python numbers, text"),
        ("network.channel_mult=(1,2j)", "config.network.channel_mult is (1, 2j); expected plain"),
        ("start.head=there", "the config has no key start.head; did you mean"),
        ("pairs.count=0", "config.pairs.count is 0; expected at least 1"),
    ],
)
def test_an_override_that_cannot_be_is_named(override, message):
    with pytest.raises(UserError) as caught:
        load_config(str(TINY), [f"--config.{override}"])
    assert message in str(caught.value)


def test_a_file_may_say_no_more_than_a_config_has(tmp_path):
    path = tmp_path / "mine.py"
    source = (
        "from dmd_jax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.{line}\n"
        "    return config\n"
    )
    for line, message in (
        ("objective.wieghting = 'normalized'", "no key objective.wieghting; did you mean obj"),
        (
            "optimizer.head = dict(learning_rate=1e-3)",
            "config.optimizer.head is of no player of dm",
        ),
        ("teacher = 'weights'", "mine.py: line 4: TypeError: Could not override field 'teacher'"),
        ("objective = dict(name='gan')", "config.objective.name is 'gan'; expected one of dmd"),
        ("objective = dict(name=['dmd'])", r"objective.name is .'dmd'.; expected one of dmd"),
        ("foo = {}", "the config has no key foo"),
        ("pairs.foo = {}", "the config has no key pairs.foo"),
        ("toy = dict(mode1=(1, 2))", "config.toy: missing keys .'mode2', 'mode_std', 'center'"),
        ("toy = 3; import sys; sys.exit(0)", "line 4: SystemExit: 0"),
        ("network = dict(name=bytes(3))", "config.network.name is b'.*; expected plain Python"),
    ):
        path.write_text(source.format(line=line))
        with pytest.raises(UserError, match=message):
            load_config(str(path), [])
    # A part may say a part of itself.
    path.write_text(source.format(line="objective = dict(name='dmd', min_index=7)"))
    found = load_config(str(path), [])
    assert settings_of(found) == DMD(batch_size=392, min_index=7)


def test_every_default_is_one_that_may_be():
    config = default_config()
    assert settings_of(config) == DMD(batch_size=392)
    check_values(config)
    for key in flatten(config.to_dict()):
        assert option_of(key, "dmd") is not None, key


def test_what_may_change_when_a_run_goes_on():
    values = flatten(default_config().to_dict())
    fixed = lasting(default_config())
    changing = {key for key in values if key not in fixed}
    assert changing == {
        *("steps", "teaching.steps", "remat", "mesh.data", "mesh.fsdp"),
        *("teacher.weights", "teacher.encode", "lpips.weights"),
        *("data.images", "data.pairs", "data.prompts", "start.generator", "start.fake_score"),
        *("log_every", "picture_every", "checkpoint_every", "keep_checkpoints"),
    }
    rates = [f"optimizer.{player}.learning_rate" for player in ("generator", "fake_score")]
    assert when_asked(values, "dmd") == {*rates, "teaching.optimizer.learning_rate"}


def test_a_folder_that_a_stage_names_may_move_and_its_batch_may_not():
    config = default_config()
    before, moved, other = (
        ({"until": 4, "data.pairs": folder, "batch_size": size},)
        for folder, size in (("a", 8), ("b", 8), ("a", 16))
    )
    found = []
    for config.stages in (before, moved, other):
        found.append(lasting(config))
    assert found[0] == found[1] != found[2]
    assert found[0]["stages"] == [{"until": 4, "batch_size": 8}]


def test_a_learning_rate_changes_when_an_override_asks_for_it(tiny, tmp_path, capsys):
    run, rate = tmp_path / "run", "--config.optimizer.generator.learning_rate=2e-4"
    succeeds("train", *tiny, "--workdir", run, "--config.steps=4")
    lines = (run / "metrics.jsonl").read_bytes()
    # Not by another value in the file, and nothing else by an override.
    other = tmp_path / "other.py"
    other.write_text(
        "from dmd_jax.config import load_config\n"
        "def get_config():\n"
        f"    config = load_config({str(TINY)!r}, [])\n"
        "    config.optimizer.generator.learning_rate = 2e-4\n"
        "    return config\n"
    )
    line = fails(capsys, "train", "--config", other, *tiny[2:], "--workdir", run)
    assert "optimizer.generator.learning_rate is 0.001 there, 0.0002 here; expected" in line
    assert "a learning rate may change by an override" in line
    fails(capsys, "train", "--workdir", run, "--config.optimizer.generator.beta1=0.5")
    assert (run / "metrics.jsonl").read_bytes() == lines
    for steps in (8, 12):  # the second goes on without asking again
        asked = [rate] if steps == 8 else []
        succeeds("train", "--workdir", run, f"--config.steps={steps}", *asked)
    said = capsys.readouterr().err
    assert said.count("config.optimizer.generator.learning_rate is 0.0002, 0.001 up to step 4") == 1
    found = [
        (line["learning_rate_generator"], line["learning_rate_fake_score"])
        for line in read_metrics(run)
    ]
    np.testing.assert_allclose(found[1:], [(2e-4, 1e-3)] * 2, rtol=1e-6)
