"""What a config makes a run read and train, and what its players start from."""

import jax
import numpy as np
import pytest
from commands import fails, succeeds

from dmd_jax.reporting.metrics import read_metrics
from dmd_jax.storage.checkpoints import restore_subtree
from dmd_jax.storage.weights import load_weights


def player_of(workdir, *names):
    found = restore_subtree(workdir / "checkpoints", names)
    return None if found is None else found[2]


def assert_equal(found, expected):
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_without_the_regression_no_pairs_are_asked_for(tiny, tmp_path):
    *without_pairs, pairs = tiny
    assert pairs.startswith("--config.data.pairs=")
    arguments = [*without_pairs, "--config.objective.regression_weight=0", "--config.steps=2"]
    succeeds("train", *arguments, "--workdir", tmp_path)
    (line, *_) = read_metrics(tmp_path)
    assert line["loss_matching"] >= 0 and "loss_regression" not in line
    assert (tmp_path / "pictures" / "preview-0000002.png").exists()


def test_without_the_matching_loss_no_fake_score_is_trained(tiny, tmp_path):
    arguments = [*tiny, "--config.objective.matching_weight=0", "--config.steps=2"]
    succeeds("train", *arguments, "--workdir", tmp_path)
    (line, *_) = read_metrics(tmp_path)
    assert line["loss_regression"] > 0
    assert not [name for name in line if "fake_score" in name]
    assert player_of(tmp_path, "players/fake_score/params") is None
    assert player_of(tmp_path, "players/generator/params") is not None


def test_players_start_from_those_of_an_earlier_run(tiny, trained, tmp_path):
    """The first update of a warm-up has learning rate 0, so a step leaves both as they were."""
    starts = [f"--config.start.{name}={trained}" for name in ("generator", "fake_score")]
    warmups = [f"--config.optimizer.{name}.warmup_steps=5" for name in ("generator", "fake_score")]
    arguments = [*tiny, "--config.steps=1", *warmups]
    succeeds("train", *arguments, *starts, "--workdir", tmp_path / "both")
    assert_equal(
        player_of(tmp_path / "both", "players/generator/params"), load_weights(trained).params
    )
    fake_score = player_of(trained, "players/fake_score/ema", "players/fake_score/params")
    assert_equal(player_of(tmp_path / "both", "players/fake_score/params"), fake_score)
    # A weights folder does as well, and a player that names none is the teacher's copy.
    start = f"--config.start.generator={trained / 'weights'}"
    succeeds("train", *arguments, start, "--workdir", tmp_path / "one")
    assert_equal(
        player_of(tmp_path / "one", "players/generator/params"), load_weights(trained).params
    )
    teacher = tiny[2].partition("=")[2]
    assert_equal(
        player_of(tmp_path / "one", "players/fake_score/params"), load_weights(teacher).params
    )


@pytest.mark.parametrize(
    "overrides, named",
    [
        (
            ["start.fake_score={trained}", "objective.matching_weight=0"],
            "nothing trains a fake_score here; expected some of generator",
        ),
        (["start.generator=/nowhere"], "weights /nowhere: no such folder"),
        (["start.generator={digits}"], "another architecture than config.network"),
        (["start.fake_score={teacher}"], "no whole checkpoint with a fake_score; expected one"),
    ],
)
def test_starts_that_cannot_be_are_refused(tiny, trained, tmp_path, capsys, overrides, named):
    from dmd_jax.storage.weights import packaged

    teacher = tiny[2].partition("=")[2].removesuffix("/weights")
    places = {"trained": trained, "digits": packaged("digits_teacher"), "teacher": teacher}
    arguments = [f"--config.{override.format(**places)}" for override in overrides]
    assert named in fails(capsys, "train", *tiny, *arguments, "--workdir", tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
