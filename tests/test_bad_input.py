"""Each mistake ends in one line that names it, with exit code 2, and nothing lost."""

import json
import re
import shutil
import zipfile

import numpy as np
import pytest
from commands import ROOT, TINY, fails, finish, start, succeeds
from shard_labels import write_changed

from dmd_jax.data.pairs_metadata import read_metadata
from dmd_jax.reporting.metrics import read_metrics
from dmd_jax.storage.checkpoints import Checkpoints
from dmd_jax.storage.seals import read_sealed, write_sealed
from dmd_jax.storage.weights import load_weights, params_sha256


def argument(tiny, name):
    return next(a.partition("=")[2] for a in map(str, tiny) if a.startswith(f"--config.{name}="))


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def test_unknown_command_and_argument(capsys):
    assert "unknown command 'trane'" in fails(capsys, "trane")
    assert "--out" in fails(capsys, "sample", "--weights", "x")
    line = fails(capsys, "sample", "--weights", "x", "--out", "x.png", "--colour", "red")
    assert "unexpected argument '--colour'" in line


def test_missing_or_unreadable_config(capsys, tmp_path):
    line = fails(capsys, "train", "--config", tmp_path / "no.py", "--workdir", tmp_path / "w")
    assert "no.py: no such file" in line
    (tmp_path / "torn.py").write_text("def get_config(:\n")
    line = fails(capsys, "train", "--config", tmp_path / "torn.py", "--workdir", tmp_path / "w")
    assert "torn.py: SyntaxError" in line
    (tmp_path / "raises.py").write_text("def get_config():\n    return 1 / 0\n")
    line = fails(capsys, "train", "--config", tmp_path / "raises.py", "--workdir", tmp_path / "w")
    assert "ZeroDivisionError" in line
    line = fails(capsys, "train", "--workdir", tmp_path / "w")
    assert "holds no run to go on with; expected --config FILE" in line
    assert not (tmp_path / "w").exists()


def test_unknown_or_mistyped_key(capsys, tiny, tmp_path):
    line = fails(capsys, "train", *tiny, "--workdir", tmp_path / "w", "--config.bach_size=8")
    assert "no key bach_size; did you mean batch_size?" in line
    line = fails(capsys, "train", *tiny, "--workdir", tmp_path / "w", "--config.batch_size=many")
    assert "--config.batch_size=many" in line
    line = fails(
        capsys, "train", *tiny, "--workdir", tmp_path / "w", "--config.objective.weighting=eq9"
    )
    assert "config.objective.weighting is 'eq9'; expected one of normalized" in line


def test_batch_that_the_devices_do_not_divide(capsys, tiny, tmp_path):
    line = fails(capsys, "train", *tiny, "--workdir", tmp_path / "w", "--config.batch_size=12")
    assert "config.batch_size=12 does not divide over 8 devices" in line
    line = fails(capsys, "train", *tiny, "--workdir", tmp_path / "v", "--config.mesh.fsdp=3")
    assert "does not multiply to the 8 devices" in line


def test_a_refused_config_leaves_nothing_behind(capsys, tiny, tmp_path):
    command = ("train", *tiny, "--workdir", tmp_path / "w", "--config.steps=1")
    for wrong in ("batch_size=12", "objective.weighting=eq9", "keep_checkpoints=0"):
        assert wrong.partition("=")[0] in fails(capsys, *command, f"--config.{wrong}")
    assert not (tmp_path / "w").exists()
    succeeds(*command)
    before = (tmp_path / "w" / "config.json").read_bytes()
    fails(capsys, "train", "--workdir", tmp_path / "w", "--config.mesh.fsdp=3")
    assert (tmp_path / "w" / "config.json").read_bytes() == before


def test_network_options_of_a_wrong_type(capsys, tmp_path):
    for option in ("attn_resolutions=(1.5,)", "channel_mult=(1,'2')"):
        line = fails(
            capsys,
            "teacher",
            "--config",
            TINY,
            "--workdir",
            tmp_path / "w",
            f"--config.network.{option}",
        )
        assert option.partition("=")[0] in line


def test_resuming_with_other_pairs_is_refused(capsys, tiny, copy, tmp_path):
    succeeds("pairs", *tiny, "--workdir", tmp_path / "p", "--config.pairs.count=48")
    folder = f"--config.data.pairs={tmp_path / 'p'}"
    before = (copy / "config.json").read_bytes()
    line = fails(capsys, "train", "--workdir", copy, folder)
    assert (copy / "config.json").read_bytes() == before
    assert "'pairs': 80" in line and "'pairs': 48" in line


def test_damaged_weights(capsys, copy, tmp_path):
    path = copy / "weights" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    line = fails(capsys, "sample", "--weights", copy / "weights", "--out", tmp_path / "x.png")
    assert "model.safetensors is damaged" in line


def test_pairs_of_another_resolution_channels_or_classes(capsys, tiny, tmp_path):
    folder = shutil.copytree(argument(tiny, "data.pairs"), tmp_path / "pairs")
    original, _ = read_sealed(folder / "metadata.json", "a test's")
    changes = {
        "resolution": {"sample_shape": [16, 16, 1]},
        "channels": {"sample_shape": [8, 8, 3]},
        "num_classes": {"num_classes": 7},
    }
    for name, change in changes.items():
        write_sealed(folder / "metadata.json", original | change)
        line = fails(
            capsys, "train", *tiny, f"--config.data.pairs={folder}", "--workdir", tmp_path / "w"
        )
        assert name in line and "expected" in line
    folder = argument(tiny, "data.pairs")
    other = write_changed(
        folder, read_metadata(folder), tmp_path / "other", teacher_sha256="0" * 64
    )
    line = fails(
        capsys, "train", *tiny, f"--config.data.pairs={other}", "--workdir", tmp_path / "w"
    )
    assert "another teacher" in line


def test_truncated_or_corrupt_shard(capsys, tiny, tmp_path):
    folder = shutil.copytree(argument(tiny, "data.pairs"), tmp_path / "pairs")
    shard = folder / "pairs-00001-of-00003.array_record"
    whole = shard.read_bytes()
    command = ("train", *tiny, f"--config.data.pairs={folder}")
    shard.write_bytes(whole[: len(whole) // 2])
    line = fails(capsys, *command, "--workdir", tmp_path / "w")
    assert shard.name in line and "truncated or damaged" in line
    # Bytes of a record, which come early in the file, changed: found when the record is read.
    place = whole.index(next(r for r in re.findall(rb"[^\0]{64}", whole)))
    shard.write_bytes(whole[:place] + bytes(64) + whole[place + 64 :])
    line = fails(capsys, *command, "--workdir", tmp_path / "v")
    assert shard.name in line and "damaged" in line
    shard.unlink()
    line = fails(capsys, *command, "--workdir", tmp_path / "u")
    assert shard.name in line and "run pairs again" in line


def test_half_written_checkpoint_falls_back_to_the_last_whole_one(copy, caplog):
    expected = params_sha256(load_weights(copy / "weights").params)
    for file in (copy / "checkpoints" / "12" / "state").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:10])
    succeeds("train", "--workdir", copy)
    assert "checkpoints/12 is not whole" in caplog.text and "falling back" in caplog.text
    # It went on from step 8 and came to the same end; the torn folder was only renamed.
    assert params_sha256(load_weights(copy / "weights").params) == expected
    assert (copy / "checkpoints" / "broken-12").is_dir()
    assert [line["step"] for line in read_metrics(copy)] == [4, 8, 12]


def test_no_whole_checkpoint_is_an_error(capsys, copy):
    for metadata in (copy / "checkpoints").glob("*/state/_METADATA"):
        metadata.write_text("{")
    assert "no whole checkpoint" in fails(capsys, "train", "--workdir", copy)
    assert len(list((copy / "checkpoints").iterdir())) == 3


def test_config_and_checkpoint_of_another_architecture(capsys, tiny, copy, tmp_path):
    line = fails(capsys, "train", *tiny, "--workdir", copy, "--config.network.model_channels=8")
    assert "network.model_channels is 16 there, 8 here" in line
    line = fails(
        capsys, "train", *tiny, "--workdir", tmp_path / "w", "--config.network.model_channels=8"
    )
    assert "of another architecture than config.network: model_channels is 16, expected 8" in line
    # The config fits, the checkpoint does not: as after a copied config.json.
    shutil.rmtree(copy / "checkpoints")
    other = Checkpoints(copy / "checkpoints")
    other.save(5, {"step": np.zeros((), np.int32), "key": np.zeros(2, np.uint32)}, {})
    other.wait()
    line = fails(capsys, "train", "--workdir", copy)
    assert "of another architecture" in line and "is missing" in line


def rewritten(path, old, new):
    """Puts text in place of other text that is there."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [('"learning_rate"', '"learhing_rate"'), ('"beta2": 0.999', '"beta2": 0.909'), ("16", "24")],
)
def test_a_config_that_was_changed_is_not_gone_on_with(capsys, tiny, copy, old, new):
    path = copy / "config.json"
    rewritten(path, old, new)
    expected = f"{path} cannot be read: it was changed since it was written"
    for arguments in ((), tiny):
        assert expected in fails(capsys, "train", *arguments, "--workdir", copy)
    # The checkpoint knows the run's config too.
    path.unlink()
    line = fails(
        capsys, "train", *tiny, "--workdir", copy, "--config.optimizer.generator.beta2=0.9"
    )
    assert "optimizer.generator.beta2 is 0.999 there, 0.9 here; expected the same values" in line
    succeeds("train", *tiny, "--workdir", copy)


def test_a_config_of_an_earlier_version_needs_its_file(capsys, tiny, copy):
    path = copy / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({key: saved[key] for key in ("command", "config")}))
    line = fails(capsys, "train", "--workdir", copy)
    assert f"{path} has no sha256" in line and "expected --config FILE as well" in line
    succeeds("train", *tiny, "--workdir", copy)
    assert json.loads(path.read_text()) == saved
    path.write_text(json.dumps({**saved, "schema": 3, "sha256": None}))
    assert "is of schema 3; expected 2" in fails(capsys, "train", *tiny, "--workdir", copy)


def test_workdir_of_another_command(capsys, tiny, copy):
    assert "is the workdir of `dmd-jax train`" in fails(capsys, "teacher", "--workdir", copy)


def test_labels_out_of_range(capsys, copy, tmp_path):
    common = ("sample", "--weights", copy, "--out", tmp_path / "x.png", "--labels")
    assert "10 is out of range 0..9" in fails(capsys, *common, "3,10")
    assert "-1 is out of range" in fails(capsys, *common, "3,-1")
    assert "expected numbers" in fails(capsys, *common, "cat")
    assert not (tmp_path / "x.png").exists()


def test_bad_latents(capsys, copy, tmp_path):
    path = tmp_path / "z.npy"
    good = np.random.default_rng(0).standard_normal((2, 8, 8, 1)).astype(np.float32)
    nan = good.copy()
    nan[1, 2, 3, 0] = np.nan
    for latents, expected in (
        (good[..., 0], "has shape (2, 8, 8); expected float [N, 8, 8, 1]"),
        (good[:0], "has shape (0, 8, 8, 1)"),
        (good.astype(np.int32), "has type int32"),
        (nan, "holds NaN"),
        (np.array([{}], dtype=object), "holds Python objects"),
    ):
        np.save(path, latents, allow_pickle=True)
        line = fails(
            capsys, "sample", "--weights", copy, "--latents", path, "--out", tmp_path / "x.npy"
        )
        assert str(path) in line and expected in line
    path.write_bytes(b"\x93NUMPY")
    common = ("sample", "--weights", copy, "--latents", path)
    assert "cannot be read" in fails(capsys, *common, "--out", tmp_path / "x.npy")
    np.save(path, good)
    assert "holds 2 latents" in fails(capsys, *common, "--num", 3, "--out", tmp_path / "x.npy")
    assert "ends in .png or .npy" in fails(capsys, *common, "--out", tmp_path / "x.jpg")
    assert not list(tmp_path.glob("x.*"))


def test_zip_with_paths_that_leave_the_folder(capsys, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("../outside.png", b"")
    line = fails(
        capsys,
        "teacher",
        "--config",
        TINY,
        "--workdir",
        tmp_path / "w",
        f"--config.data.images={tmp_path / 'images.zip'}",
    )
    assert "images.zip" in line and "../outside.png" in line


def test_images_of_another_shape_than_the_network(capsys, tmp_path):
    np.savez(tmp_path / "colour.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    line = fails(
        capsys,
        "teacher",
        "--config",
        TINY,
        "--workdir",
        tmp_path / "w",
        f"--config.data.images={tmp_path / 'colour.npz'}",
    )
    assert "(8, 8, 3)" in line and "(8, 8, 1)" in line


def test_weights_that_are_none(capsys, tmp_path):
    out = ("--out", tmp_path / "x.png")
    assert "no such folder" in fails(capsys, "sample", "--weights", tmp_path / "no", *out)
    assert "expected model.safetensors" in fails(capsys, "sample", "--weights", tmp_path, *out)
    (tmp_path / "config.json").write_text('{"network": {"name": "mlp", "dim": 2}}')
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    assert "model.safetensors cannot be read" in fails(
        capsys, "sample", "--weights", tmp_path, *out
    )


def test_disk_full_while_writing_pairs(tiny, tmp_path):
    command = ("pairs", *tiny, "--workdir", tmp_path / "p", "--config.pairs.count=96")
    output = finish(start(*command, largest_file=30_000), code=2)
    line = next(line for line in output.splitlines() if "error:" in line)
    assert "pairs-00000-of-00003.array_record" in line and "cannot be written" in line
    assert "Traceback" not in output
    assert not list((tmp_path / "p").glob("*.tmp"))
    finish(start(*command))
    assert len(list((tmp_path / "p").glob("*.array_record"))) == 3


def test_disk_full_while_writing_a_checkpoint(tiny, copy):
    before = sorted(path.name for path in (copy / "checkpoints").iterdir())
    command = ("train", "--workdir", copy, "--config.steps=16")
    output = finish(start(*command, largest_file=20_000), code=2)
    line = next(line for line in output.splitlines() if "error:" in line)
    assert "could not be written" in line and "the last whole one is step 12" in line
    assert "Traceback" not in output
    assert set(before) <= {path.name for path in (copy / "checkpoints").iterdir()}
    finish(start(*command))
    assert read_metrics(copy)[-1]["step"] == 16


def test_disk_full_while_writing_pictures(tiny, tmp_path):
    """The limit lets the metrics through; the preview is what does not fit."""
    command = ("train", *tiny, "--workdir", tmp_path, "--config.picture_every=1")
    output = finish(start(*command, largest_file=2_500), code=2)
    line = next(line for line in output.splitlines() if "error:" in line)
    assert "cannot be written" in line
    assert "Traceback" not in output


def test_nonfinite_loss_stops_at_its_step(capsys, tiny, tmp_path):
    line = fails(
        capsys,
        "train",
        *tiny,
        "--workdir",
        tmp_path,
        "--config.optimizer.generator.learning_rate=1e30",
        "--config.optimizer.generator.clip_norm=1e30",
        "--config.optimizer.fake_score.clip_norm=1e30",
        "--config.checkpoint_every=1",
        "--config.log_every=5",
    )
    step = int(re.search(r"at step (\d+)", line)[1])
    assert "expected a finite number" in line
    # Every step before it has a checkpoint, and it has none.
    assert f"the last good checkpoint is step {step - 1}" in line
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept[-1] == step - 1


def test_unwritable_workdir(capsys, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    line = fails(capsys, "train", *tiny, "--workdir", tmp_path / "file" / "w")
    assert f"{tmp_path / 'file' / 'w'} cannot be written" in line


def test_python_dash_m_prints_one_line_and_exits_with_two(tmp_path):
    output = finish(start("train", "--config", ROOT / "no.py", "--workdir", tmp_path), code=2)
    assert output.count("\n") == 1
