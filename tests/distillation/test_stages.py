"""A run whose batch, weights and levels change on the way."""

import jax
import numpy as np
import pytest
import small
from commands import ROOT, succeeds

from dmd_jax.config import default_config, load_config, stages_of, value_of
from dmd_jax.data.loader import EpochOrder
from dmd_jax.distillation import setting_of
from dmd_jax.distillation.from_config import teacher_of
from dmd_jax.distillation.setting import Method, Setting, data_of
from dmd_jax.errors import UserError
from dmd_jax.objectives.objective import need
from dmd_jax.parallel.sharding import make_mesh
from dmd_jax.reporting.metrics import read_metrics
from dmd_jax.storage.checkpoints import Checkpoints
from dmd_jax.storage.weights import load_weights

SCALAR = jax.ShapeDtypeStruct((), np.int32)
STAGED = ROOT / "tests" / "configs" / "staged.py"


def values(config, *keys):
    return [(until, *(value_of(stage, key) for key in keys)) for until, stage in stages_of(config)]


def test_stages_end_where_they_say_and_the_rest_is_the_config():
    config = default_config()
    config.steps = 100
    assert values(config, "batch_size") == [(100, 392)]
    config.stages = (
        {"until": 10, "batch_size": 8},
        {"until": 30, "objective.regression_weight": 1.0, "teacher.decoder": "vae"},
    )
    keys = ("batch_size", "objective.regression_weight")
    assert values(config, *keys) == [(10, 8, 0.25), (30, 392, 1.0), (100, 392, 0.25)]
    assert [stage.teacher.decoder for _, stage in stages_of(config)] == ["taesd", "vae", "taesd"]
    config.steps = 30
    assert values(config, *keys) == [(10, 8, 0.25), (30, 392, 1.0)]
    config.steps = 5
    assert values(config, *keys) == [(5, 8, 0.25)]


@pytest.mark.parametrize(
    "stages, named",
    [
        (
            ({"batch_size": 8},),
            "config.stages[0] is {'batch_size': 8}; expected a dict whose until",
        ),
        (({"until": 4}, {"until": 4}), "config.stages[1] is {'until': 4}; expected a dict whose"),
        ((7,), "config.stages[0] is 7; expected a dict whose until is more than 0 steps"),
        (({"until": 4, "seed": 1},), "config.stages[0] sets seed; expected some of batch_size"),
        (({"until": 4, "batch_size": "many"},), "config.stages[0]: Could not override field"),
        (
            ({"until": 4, "objective.regression_weight": -1.0},),
            "config.stages[0].objective.regression_weight is -1.0; expected at least 0",
        ),
        (
            ({"until": 4, "max_index": 500},),
            "config.stages[0]: max_index has moved: it is config.objective.max_index",
        ),
        (
            ({"until": 4, "objective.min_indx": 1},),
            "config.stages[0]: the config has no key objective.min_indx; did you mean",
        ),
    ],
)
def test_an_impossible_stage_is_named(stages, named):
    config = default_config()
    config.stages = stages
    with pytest.raises(UserError) as caught:
        stages_of(config)
    assert str(caught.value).startswith(named)


def test_a_run_in_stages_stopped_at_and_within_them_is_the_run_in_one_go(tiny, tmp_path):
    arguments = ("--config", STAGED, *tiny[2:])
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    succeeds("train", *arguments, "--workdir", whole)
    for steps in (4, 6, 12):
        succeeds("train", *arguments, "--workdir", stopped, f"--config.steps={steps}")
    for found, expected in zip(
        *(jax.tree.leaves(load_weights(w).params) for w in (stopped, whole))
    ):
        np.testing.assert_array_equal(found, expected)
    # The second stage's position is its own: two batches of it were taken by step 6.
    assert Checkpoints(stopped / "checkpoints", keep=3).steps[-1] == 12
    lines = read_metrics(whole)
    assert [line["step"] for line in lines] == [4, 8, 12]
    # Only the first stage weighs the regression by 2: the generator's loss tells.
    for line, weight in zip(lines, (2.0, 0.25, 0.25)):
        expected = line["loss_matching"] + weight * line["loss_regression"]
        np.testing.assert_allclose(line["loss_generator"], expected, rtol=1e-5)


def test_a_stage_takes_up_the_data_where_the_one_before_left_it():
    class Numbers:
        def __len__(self):
            return 50

        def __getitem__(self, index):
            return {"number": np.int32(index)}

    config = default_config()
    config.steps = 30
    config.objective.regression_batch_size = 6
    config.stages = ({"until": 3, "objective.regression_batch_size": 4},)
    (_, first), (_, second) = stages_of(config)

    def objective(stage):
        needs = {"numbers": need(stage.objective.regression_batch_size, {"number": SCALAR})}
        return small.objective(batch_size=8)._replace(needs=needs)

    fields = dict.fromkeys(Setting._fields) | {"sources": lambda stage: {"numbers": Numbers()}}
    setting = Setting(**fields | {"method": Method(objective, frozen=dict, ahead=None)})
    taken = data_of(setting, make_mesh(2, 4), first, [])
    rows = [next(taken)["numbers"]["number"] for _ in range(3)]
    taken = data_of(setting, make_mesh(2, 4), second, [(3, first)])
    rows += [next(taken)["numbers"]["number"] for _ in range(15)]
    numbers = np.concatenate(rows)
    # 12 and 90: two epochs, each with every record once, and two records of a third.
    assert sorted(numbers[:50]) == sorted(numbers[50:100]) == list(range(50))


def test_pairs_may_grow_with_the_position_kept(tiny, tmp_path):
    """A later stage's folder has more pairs; its batches go on where the first stage's ended."""
    _, path, weights, small = tiny
    grown = tmp_path / "grown"
    more = ("--config.pairs.count=96", "--config.pairs.seed=2")
    succeeds("pairs", "--config", path, weights, *more, "--workdir", grown)
    config = load_config(str(path), [weights, f"--config.data.pairs={grown}"])
    config.stages = ({"until": 3, "data.pairs": small.partition("=")[2]},)
    setting, mesh = setting_of(config, teacher_of(config)), make_mesh(2, 4)
    (_, first), (_, second) = stages_of(config)
    few, many = (setting.sources(stage)["pairs"] for stage in (first, second))
    assert (len(many), many.metadata.seed) == (96, 2) and len(few) < 96
    rows = config.objective.regression_batch_size
    for stage, earlier, pairs, done in ((first, [], few, 0), (second, [(3, first)], many, 3)):
        batch = next(data_of(setting, mesh, stage, earlier))["pairs"]
        order = EpochOrder(len(pairs), config.seed)
        for row in range(rows):
            expected = pairs[order(done * rows + row)]
            np.testing.assert_array_equal(batch["y_ref"][row], expected["y_ref"])
    # A run with other pairs in an earlier stage is another run.
    assert setting.identity["pairs"] == 96
    assert [each["pairs"] for each in setting.identity["earlier_pairs"]] == [len(few)]
    config.stages = ()
    assert "earlier_pairs" not in setting_of(config, teacher_of(config)).identity
