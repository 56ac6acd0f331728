"""The ablation study on a tiny network: its runs, figures, table and picture, and its refusals."""

import json
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from commands import TINY, fails, finish, start, succeeds
from PIL import Image
from sklearn.datasets import load_digits

from dmd_jax.commands import study as study_module
from dmd_jax.commands.ablate import _paper, row_variant
from dmd_jax.commands.cli import main
from dmd_jax.commands.study_report import labelled_rows, summarize, table
from dmd_jax.config import load_config, shipped_config
from dmd_jax.evaluation.digits_classifier import features
from dmd_jax.evaluation.frechet import Statistics, frechet_distance
from dmd_jax.method import samplers
from dmd_jax.method.schedules import NoiseSchedule
from dmd_jax.models import build_denoiser
from dmd_jax.reporting.metrics import read_metrics
from dmd_jax.sampling.draws import draw_labels, draw_latents
from dmd_jax.storage.files import write_json
from dmd_jax.storage.seals import read_sealed, write_sealed
from dmd_jax.storage.weights import load_weights

CLASSIFIER = "dmd_jax.evaluation.digits_classifier:features"
ROWS = ["full", "without_matching", "without_regression"]
NUM = 80
OPTIONS = (
    "--num",
    NUM,
    "--config.steps=40",
    "--config.log_every=40",
    "--config.checkpoint_every=40",
)
OFTEN = ("--config.log_every=1", "--config.checkpoint_every=5")


@pytest.fixture(scope="module")
def command(tiny):
    """The study's command but for its workdir; the pairs are its own."""
    weights = next(a for a in map(str, tiny) if "teacher.weights=" in a)
    return ("ablate", "--config", TINY, weights, *OPTIONS, "--rows", ",".join(ROWS))


@pytest.fixture(scope="module")
def study(command, tmp_path_factory):
    """The workdir of a study that nothing disturbs, of two seeds."""
    workdir = tmp_path_factory.mktemp("study")
    succeeds(*command, "--seeds", "0,1", "--workdir", workdir)
    return workdir


@pytest.fixture(scope="module")
def results(study):
    return json.loads((study / "results.json").read_text())


def test_each_run_is_of_its_row_and_seed(study):
    expected = {
        "full": (1.0, 0.25, 1e-3),
        "without_matching": (0.0, 0.25, 1e-3),
        "without_regression": (1.0, 0.0, 2e-4),
    }
    for row, (matching, regression, rate) in expected.items():
        for seed in (0, 1):
            workdir = study / row / f"seed-{seed}"
            config = json.loads((workdir / "config.json").read_text())["config"]
            assert config["seed"] == seed and config["steps"] == 40
            assert config["data"]["pairs"] == str(study / "pairs")
            objective, optimizers = config["objective"], config["optimizer"].values()
            found = (objective["matching_weight"], objective["regression_weight"])
            assert found == (matching, regression)
            assert [one["learning_rate"] for one in optimizers] == [rate, rate]
            line = read_metrics(workdir)[-1]
            assert line["step"] == 40
            assert ("loss_matching" in line) == (matching > 0)
            assert ("loss_regression" in line) == (regression > 0)


def test_figures_are_of_the_same_latents_for_all(study, results):
    """Each distance, made again from the weights and the latents of evaluate's seed 0."""
    teacher = json.loads((study / "config.json").read_text())["config"]["teacher"]["weights"]
    z, labels = draw_latents(0, 0, NUM, (8, 8, 1)), draw_labels(0, 0, NUM, 10)
    generate = None
    reals = load_digits().images[..., None] / 8 - 1
    folders = {("baselines", "teacher_one_step", 0): teacher}
    for row in ROWS:
        for seed in (0, 1):
            folders["rows", row, seed] = study / row / f"seed-{seed}" / "weights"
    for (kind, row, seed), folder in folders.items():
        weights = load_weights(folder)
        denoise = build_denoiser(weights.network).denoise
        generate = generate or jax.jit(
            lambda params, denoise=denoise: samplers.one_step(
                denoise, params, z, labels, schedule=NoiseSchedule.edm()
            )
        )
        images = np.asarray(generate(weights.params))
        for name, extract in (
            ("pixels", lambda images: images.reshape(len(images), -1)),
            (CLASSIFIER, features),
        ):
            expected = frechet_distance(
                Statistics.of(extract(images)), Statistics.of(extract(reals))
            )
            found = results[kind][row]["frechet_distance"][name]["values"][seed]
            assert found == pytest.approx(expected, rel=1e-4)


def test_the_table_says_what_was_found(study, results):
    lines = (study / "ablation.md").read_text().splitlines()
    assert lines[0] == "# Ablation of tiny.py"
    assert "80 samples" in lines[2] and "40 training steps from each of the seeds 0, 1" in lines[2]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    assert rows[0] == ["row", "what it is", "pixels", CLASSIFIER]
    assert [row[0] for row in rows[2:]] == ["teacher", "teacher_one_step", *ROWS]
    assert rows[2][1] == "Heun, 2 steps"
    for row in rows[4:]:
        for name, cell in zip(("pixels", CLASSIFIER), row[2:], strict=True):
            values = results["rows"][row[0]]["frechet_distance"][name]["values"]
            first, second = values
            mean, std = (first + second) / 2, abs(first - second) / 2**0.5
            assert cell == f"{mean:.3f} ± {std:.3f} ({first:.3f}, {second:.3f})"
    for row in rows[2:4]:
        (value,) = results["baselines"][row[0]]["frechet_distance"]["pixels"]["values"]
        assert row[2] == f"{value:.3f}"
    assert results["seeds"] == [0, 1] and results["num_samples"] == NUM
    assert results["command"].startswith("dmd-jax") and "CPU cores" in results["machine"]


def test_the_picture_has_a_row_of_images_for_each(study):
    with Image.open(study / "ablation.png") as picture:
        # Five rows of 32 pixels and their gutters, twenty images in each beside the labels.
        assert picture.height == 5 * 34 + 2 and picture.width > 20 * 34 + 2 + 50


def test_what_is_finished_is_not_done_again(study, results, command, capsys):
    kept = [study / row / f"seed-{seed}" / "metrics.jsonl" for row in ROWS for seed in (0, 1)]
    before = [path.stat().st_mtime_ns for path in kept]
    succeeds(*command, "--seeds", "0,1", "--workdir", study)
    output = capsys.readouterr().err
    assert output.count("is finished") == 8 and "dmd-jax train" not in output
    assert [path.stat().st_mtime_ns for path in kept] == before
    again = json.loads((study / "results.json").read_text())
    assert {**again, "command": ""} == {**results, "command": ""}


def test_a_study_that_is_stopped_ends_as_the_one_that_never_was(
    study, results, command, tmp_path, capsys
):
    workdir = tmp_path / "study"
    shutil.copytree(study, workdir, ignore=shutil.ignore_patterns("full", "results.json"))
    argv = (*command, *OFTEN, "--rows", "full", "--seeds", "0", "--workdir", workdir)
    process = start(*argv, devices=8)
    deadline = time.monotonic() + 200
    while not any(line["step"] >= 7 for line in read_metrics(workdir / "full" / "seed-0")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert "of a row; the same command goes on with the study in" in output
    assert f"{workdir / 'teacher'} is finished" in output and "Traceback" not in output
    assert not (workdir / "results.json").exists()
    capsys.readouterr()
    succeeds(*argv)
    assert "going on from step" in capsys.readouterr().err
    found = json.loads((workdir / "results.json").read_text())
    for name in ("pixels", CLASSIFIER):
        (value,) = found["rows"]["full"]["frechet_distance"][name]["values"]
        expected = results["rows"]["full"]["frechet_distance"][name]["values"][0]
        assert value == pytest.approx(expected, rel=1e-6)


def test_other_samples_are_measured_without_training_again(study, command, capsys):
    succeeds(*command, "--rows", "full", "--seeds", "1", "--num", "70", "--workdir", study)
    assert "going on from step 40" in capsys.readouterr().err
    assert json.loads((study / "results.json").read_text())["num_samples"] == 70


def test_arguments_for_evaluate_are_passed_on(study, command, tmp_path):
    argv = (*command, "--rows", "full", "--seeds", "0", "--workdir", study)
    reals = load_digits().images[:50, ..., None] * 15.9
    np.savez(tmp_path / "real.npz", images=reals.astype(np.uint8))
    succeeds(*argv, "--evaluate", f"--features pixels --reference {tmp_path / 'real.npz'}")
    found = json.loads((study / "results.json").read_text())
    assert found["reference"] == str(tmp_path / "real.npz")
    assert found["rows"]["full"]["frechet_distance"].keys() == {"pixels"}

    np.savez(tmp_path / "real.npz", images=255 - (reals / 4).astype(np.uint8))
    succeeds(*argv, "--evaluate", f"--features pixels --reference {tmp_path / 'real.npz'}")
    other = json.loads((study / "results.json").read_text())
    for kind, row in (("rows", "full"), ("baselines", "teacher_one_step")):
        before, after = (each[kind][row]["frechet_distance"]["pixels"] for each in (found, other))
        assert after["mean"] > 1.05 * before["mean"]


def test_fewer_steps_than_a_row_has_are_refused(study, command, capsys):
    argv = (*command, "--rows", "full", "--seeds", "0", "--workdir", study)
    line = fails(capsys, *argv, "--config.steps=20")
    assert f"{study / 'full' / 'seed-0'} is at step 40, not 20; expected steps of at" in line


def test_a_row_is_finished_for_what_it_follows_from(study, tmp_path, monkeypatch):
    commands = []

    def run_step(*argv):
        commands.append(argv[0])
        if argv[0] == "evaluate":
            write_json(argv[argv.index("--out") + 1], {})

    monkeypatch.setattr(study_module, "run_step", run_step)
    lpips = {"params_sha256": "a"}
    monkeypatch.setattr(study_module, "describe_auxiliary", lambda path, kind: lpips)
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    metadata, _ = read_sealed(study / "pairs" / "metadata.json", "a test's")
    overrides, changes = [], {"judges": {"reference": "a"}}

    def run_row(row="full"):
        """The commands that a row takes."""
        write_sealed(pairs / "metadata.json", metadata)
        common = dict(name="ablate", arguments=[], evaluate=[], teacher_sha256="a")
        config = load_config(str(TINY), overrides)
        variants = {row: row_variant(config, row, [], [])}
        study = study_module.Study(
            config=config, variants=variants, workdir=tmp_path, **common, **changes
        )
        commands.clear()
        study.run_variant(row, 0, pairs)
        return list(commands)

    assert run_row() == ["train", "evaluate"]
    assert run_row() == []
    keys = ("log_every=7", "checkpoint_every=7", "mesh.fsdp=2", "data.images=elsewhere", "seed=9")
    overrides += [f"--config.{key}" for key in (*keys, "lpips.weights=f", "teacher.weights=elsewh")]
    assert run_row() == []
    for key in ("num_steps", "seed"):
        metadata[key] += 1
        assert run_row() == ["train", "evaluate"]
        assert run_row() == []
    overrides += ["--config.objective.distance=lpips"]
    changes["judges"] = {"reference": "b"}
    assert run_row() == run_row("l2") == ["train", "evaluate"]
    lpips["params_sha256"] = "b"
    assert run_row("l2") == []
    assert run_row() == ["train", "evaluate"]
    overrides += ["--config.steps=13"]
    assert run_row() == ["train", "evaluate"]


def test_the_papers_figure_is_beside_inceptions_alone():
    config = load_config(str(shipped_config("cifar10_cond")), [])
    assert _paper(config, "l2", ["pixels", "inception"]) == {"paper_fid": 2.78}
    assert _paper(config, "l2", ["pixels", "vgg16"]) == {}


def test_mean_and_standard_deviation_of_the_seeds():
    found = {
        seed: {"features": {"pixels": {"frechet_distance": value, "recall": 0.5}}}
        for seed, value in ((0, 1.0), (3, 2.0), (5, 4.0))
    }
    summary = summarize(found)
    # 7/3, and the root of ((4/3)^2 + (1/3)^2 + (5/3)^2) / 2 = 7/3.
    assert summary["frechet_distance"]["pixels"] == {
        "mean": pytest.approx(7 / 3),
        "std": pytest.approx((7 / 3) ** 0.5),
        "values": [1.0, 2.0, 4.0],
    }
    assert summary["features"]["pixels"]["5"] == {"frechet_distance": 4.0, "recall": 0.5}
    alone = summarize({0: found[0]})["frechet_distance"]["pixels"]
    assert alone == {"mean": 1.0, "std": None, "values": [1.0]}


def test_the_papers_figures_stand_beside_the_rows_of_its_configs():
    one = summarize({0: {"features": {"inception": {"frechet_distance": 2.7}}}})
    rows = {"full": {"summary": "s", "paper_fid": 2.66, **one}, "l2": {"summary": "t", **one}}
    text = table(
        {
            "baselines": {"teacher": {"summary": "u", **one}},
            "rows": rows,
            "seeds": [4],
            "num_samples": 2,
            "reference": "cifar.npz",
        },
        title="Ablation of cifar10_cond.py",
    )
    assert "| row | what it is | inception | paper's FID |" in text
    assert "| full | s | 2.700 | 2.66 |" in text
    assert "| l2 | t | 2.700 |  |" in text and "trained from seed 4." in text


def test_labels_stand_beside_their_rows():
    """A white row and a black one: the second label is drawn in the second half of the strip."""
    rows = {"a": np.ones((3, 8, 8, 3)), "MMMM": -np.ones((3, 8, 8, 3))}
    sheet = labelled_rows(rows)
    assert sheet.dtype == np.uint8 and sheet.shape[0] == 2 * 34 + 2 and sheet.shape[2] == 3
    strip, images = sheet[:, : -(3 * 34 + 2)], sheet[:, -(3 * 34 + 2) :]
    ink = (strip < 128).sum(axis=(1, 2))
    assert 0 < ink[:36].sum() < ink[36:].sum()
    assert images[18, 18].tolist() == [255] * 3 and images[52, 18].tolist() == [0] * 3


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (("--rows", "full,half"), "--rows: 'half' is unknown; expected some of full, without_m"),
        (("--rows", "full,full"), "--rows: 'full' is twice"),
        (("--rows", "l2"), "--rows l2: nothing of it changes the config"),
        (("--seeds", "0,one"), "--seeds '0,one'; expected whole numbers such as 0,1,2"),
        (("--seeds", "1,1"), "--seeds '1,1' has a number twice"),
        (("--seeds", "-1"), "--seeds '-1'; expected"),
        (("--num", "1"), "--num 1; expected at least 2"),
        (("--evaluate", "--num 3"), "--evaluate: --num is the study's own"),
        (("--evaluate", "--features 'a"), '--evaluate "--features \'a": No closing quotation'),
        (("--evaluate", "--colour red"), "unrecognized arguments: --colour red"),
        (("--features", "hue"), 'features "hue"'),
        (("--config.data.images=",), "config.data.images is empty; expected real images"),
        (("--config.objective.weighting=eq9",), "config.objective.weighting is 'eq9'"),
        (("--config.objective.distance=lpips",), "expected config.lpips.repeat_grey=True"),
    ],
)
def test_bad_input_is_named_before_anything_is_made(command, tmp_path, capsys, argv, named):
    short = command[: command.index("--rows")]
    assert named in fails(capsys, *short, *argv, "--workdir", tmp_path / "w")
    assert not (tmp_path / "w" / "config.json").exists()
    assert not (tmp_path / "w" / "pairs").exists()


def test_another_config_in_the_same_workdir_is_refused(study, command, capsys):
    line = fails(capsys, *command, "--workdir", study, "--config.batch_size=32")
    assert "batch_size is 16 there, 32 here" in line
    assert "--config" in fails(capsys, "ablate", "--workdir", study)


def test_a_row_that_the_config_is_already_is_left_out(command, tmp_path, capsys):
    argv = (*command, "--rows", "l2,full", "--num", "1", "--workdir", tmp_path)
    assert main([str(argument) for argument in argv]) == 2
    assert "ablate: l2 left out: the config is so already" in capsys.readouterr().err
