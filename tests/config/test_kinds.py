"""A config of another objective than DMD: its settings are keys, and the commands run it."""

import dataclasses
import json

import jax
import pytest
from commands import TINY, fails, succeeds

from dmd_jax.config import default_config, load_config, settings_of
from dmd_jax.errors import UserError
from dmd_jax.objectives import DMD, dmd
from dmd_jax.objectives.kinds import KINDS, Kind
from dmd_jax.options import option
from dmd_jax.performance.compilation.programs import compilable
from dmd_jax.reporting.metrics import read_metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pulled:
    batch_size: int
    strength: float = option(1.0, above=0, staged=True)


def pulled(settings, **parts):
    """A generator that the real score alone pulls; one player, and nothing to read."""
    as_dmd = DMD(
        batch_size=settings.batch_size,
        matching_weight=settings.strength,
        regression_weight=0.0,
        use_fake_score=False,
    )
    return dmd(as_dmd, **parts)


@pytest.fixture(autouse=True)
def kind(monkeypatch):
    monkeypatch.setitem(KINDS, "pulled", Kind(Pulled, pulled, ("generator",)))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "pulled.py"
    path.write_text(
        "from dmd_jax.config import load_config\n"
        "def get_config():\n"
        f"    config = load_config({str(TINY)!r}, [])\n"
        "    config.objective = dict(name='pulled', strength=0.5)\n"
        "    config.optimizer = dict(generator=dict(learning_rate=1e-3))\n"
        "    config.start = {}\n"
        "    return config\n"
    )
    return path


def test_its_settings_are_keys_of_the_config(file):
    config = load_config(str(file), ["--config.objective.strength=2"])
    assert config.objective.to_dict() == {"name": "pulled", "strength": 2.0}
    assert settings_of(config) == Pulled(batch_size=16, strength=2.0)
    assert list(config.optimizer) == list(config.start) == ["generator"]
    assert config.optimizer.generator.beta1 == 0.9
    assert default_config("pulled").objective.strength == 1.0
    for override, message in (
        ("objective.strength=0.0", "config.objective.strength is 0.0; expected more than 0"),
        ("objective.distance=l2", "the config has no key objective.distance"),
        ("optimizer.fake_score.beta1=0", "the config has no key optimizer.fake_score.beta1"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(str(file), [f"--config.{override}"])


def test_the_commands_run_it(file, tiny, tmp_path, capsys):
    run, (_, _, weights, _) = tmp_path / "run", tiny
    stages = "--config.stages=({'until': 4, 'objective.strength': 2.0},)"
    arguments = ("--config", file, weights, stages)
    succeeds("train", *arguments, "--workdir", run, "--config.steps=6")
    succeeds("train", "--workdir", run, "--config.steps=8")
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == [4, 6, 8]
    for line, strength in zip(lines, (2.0, 0.5, 0.5)):
        assert line["loss_generator"] == pytest.approx(strength * line["loss_matching"], rel=1e-5)
    saved = json.loads((run / "config.json").read_text())["config"]
    assert saved["objective"] == {"name": "pulled", "strength": 0.5}
    line = fails(capsys, "train", "--workdir", run, "--config.objective.strength=1.0")
    assert "objective.strength is 0.5 there, 1.0 here" in line
    config = load_config(str(file), [str(weights)])
    facts = compilable(config, "train", jax.devices()).facts
    assert (facts["images"], facts["regression_images"]) == (16, 0)
