"""The rows of Table 2, as PAPER's numbers and as changes to a config."""

import pytest
from commands import ROOT, fails
from ml_collections import ConfigDict

from dmd_jax.config import apply_overrides, flatten, load_config, shipped_config
from dmd_jax.distillation.ablations import (
    ROWS,
    apply_row,
    changes_nothing,
    lowered,
    paper_fid,
    row_overrides,
)
from dmd_jax.errors import UserError

# row: (what differs from the full objective, FID on CIFAR-10, FID on ImageNet-64)
TABLE_2 = {
    "full": ({}, 2.66, 2.62),
    "without_matching": ({"objective.matching_weight": 0.0}, 3.82, 9.21),
    "without_regression": ({"objective.regression_weight": 0.0}, 5.58, 5.61),
    "sigma_over_alpha": ({"objective.weighting": "sigma_over_alpha"}, 3.60, None),
    "sigma3_over_alpha": ({"objective.weighting": "sigma3_over_alpha"}, 3.71, None),
    "l2": ({"objective.distance": "l2"}, 2.78, None),
}
RATES = ("optimizer.generator.learning_rate", "optimizer.fake_score.learning_rate")


def differences(before: ConfigDict, after: ConfigDict) -> dict:
    before, after = flatten(before.to_dict()), flatten(after.to_dict())
    return {key: after[key] for key in after if after[key] != before[key]}


@pytest.mark.parametrize("row", TABLE_2)
@pytest.mark.parametrize("stem", ["cifar10", "imagenet64"])
def test_the_configs_are_the_papers_table(stem, row):
    base_name = {"cifar10": "cifar10_cond", "imagenet64": "imagenet64"}[stem]
    base = load_config(str(shipped_config(base_name)), [])
    found = load_config(f"{shipped_config(f'ablations/{stem}')}:{row}", [])
    changes, cifar10, imagenet64 = TABLE_2[row]
    if row == "without_regression" and stem == "cifar10":
        changes = changes | dict.fromkeys(RATES, 1e-5)
    assert differences(base, found) == changes
    assert ROWS[row].paper.get(base_name) == {"cifar10": cifar10, "imagenet64": imagenet64}[stem]


def test_the_table_is_whole():
    assert ROWS.keys() == TABLE_2.keys()


@pytest.mark.parametrize("stem", ["cifar10", "imagenet64"])
def test_a_missing_or_unknown_row_lists_the_rows(capsys, tmp_path, stem):
    path = ROOT / "configs" / "ablations" / f"{stem}.py"
    for argument in ("", ":without_everything"):
        line = fails(capsys, "train", "--config", f"{path}{argument}", "--workdir", tmp_path / "w")
        assert f"ablation '{argument[1:]}': unknown" in line
        assert "without_matching, without_regression, sigma_over_alpha" in line


def test_learning_rates_are_lowered_as_the_paper_lowers_them():
    assert lowered(5e-5) == 1e-5  # CIFAR-10
    assert lowered(2e-6) == 2e-6  # ImageNet-64: never raised
    assert lowered(1e-3) == 2e-4
    assert lowered(2e-5) == 1e-5  # not below the paper's


def test_overrides_say_what_the_row_changes_and_the_config_is_left_alone():
    config = load_config(str(shipped_config("cifar10_cond")), [])
    before = config.to_dict()
    for row in ROWS:
        overridden = apply_overrides(config, row_overrides(config, row))
        assert overridden.to_dict() == apply_row(config, row).to_dict()
    assert config.to_dict() == before
    with pytest.raises(UserError, match="ablation 'none': unknown; expected one of full, "):
        row_overrides(config, "none")


def test_a_row_that_the_config_is_already_changes_nothing():
    config = load_config(str(shipped_config("cifar10_cond")), [])
    assert not any(changes_nothing(config, row) for row in ROWS)
    assert changes_nothing(apply_row(config, "l2"), "l2")
    digits = load_config(str(shipped_config("digits")), ["--config.objective.distance=l2"])
    assert [row for row in ROWS if changes_nothing(digits, row)] == ["l2"]


def test_the_papers_figure_is_for_the_papers_config_alone():
    path = str(shipped_config("cifar10_cond"))
    here = ["--config.teacher.weights=mine", "--config.log_every=7", "--config.mesh.fsdp=2"]
    config = load_config(path, here)
    for row, (_, fid, _) in TABLE_2.items():
        assert paper_fid(config, row) == fid
    for override in ("--config.steps=1000", "--config.batch_size=8", "--config.seed=4"):
        assert paper_fid(load_config(path, [override]), "full") is None
    imagenet64 = str(shipped_config("ablations/imagenet64"))
    assert paper_fid(load_config(f"{imagenet64}:full", []), "full") == 2.62
    assert paper_fid(load_config(f"{imagenet64}:full", []), "l2") is None
    assert paper_fid(load_config(f"{imagenet64}:without_matching", []), "full") is None
