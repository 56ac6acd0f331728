"""Runs whose workdir, weights, pairs and prompts are in a bucket; gs:// is served by a stand-in."""

import io
import json
import shutil
import signal
import struct

import jax
import numpy as np
import pytest
from commands import ROOT, TINY, fails, finish, start, succeeds
from PIL import Image
from stand_in_gcs import PAGE

from dmd_jax.data.pair_shards import PairSource
from dmd_jax.data.prompt_shards import PromptSource
from dmd_jax.errors import UserError
from dmd_jax.reporting.metrics import MetricsWriter, read_metrics
from dmd_jax.reporting.profiling import Profile
from dmd_jax.storage.bucket_copies import local_copy, local_folder
from dmd_jax.storage.checkpoints import Checkpoints
from dmd_jax.storage.files import local_path, path_of, replacing, write_json, write_whole
from dmd_jax.storage.judge_weights import LPIPS, load_auxiliary
from dmd_jax.storage.weights import load_weights
from dmd_jax.teachers.families import load_pipeline


@pytest.fixture
def folder(gcs, request):
    """A path of the bucket for one test alone."""
    return path_of(f"gs://bucket/{request.node.name.partition('[')[0]}")


@pytest.fixture(scope="module")
def tiny_there(gcs, tiny):
    """The tiny teacher and its pairs in the bucket: arguments as those of `tiny`."""
    there = []
    for argument in tiny:
        option, _, local = str(argument).partition("=")
        if local:
            name = option.removeprefix("--config.")
            gcs.put_folder("bucket", name, path_of(local))
            argument = f"{option}=gs://bucket/{name}"
        there.append(argument)
    return there


def assert_same_bits(found, expected):
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected):
        np.testing.assert_array_equal(one, other)


def events(gcs, prefix):
    """The (step, name) of all scalars in the TensorBoard files below."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for name in gcs.names("bucket", prefix):
        content, at = gcs.buckets["bucket"][name].content, 0
        while at < len(content):  # length, its checksum, the event, its checksum
            (size,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + size])
            found += [(event.step, value.tag) for value in event.summary.value]
            at += 12 + size + 4
    return found


def test_a_run_that_is_stopped_goes_on(gcs, tiny_there, trained, tmp_path):
    run = path_of("gs://bucket/run")
    process = start("train", *tiny_there, "--workdir", run, devices=8)

    def stop(bucket, name):
        # The next checkpoint waits for this one, so the process gets the signal before step 9.
        if name == "run/checkpoints/4/commit_success.txt":
            process.send_signal(signal.SIGTERM)

    gcs.on_put = stop
    output = finish(process)
    assert "go on with --workdir gs://bucket/run" in output and "Traceback" not in output
    assert not (run / "weights").exists()
    succeeds("train", "--workdir", run)

    assert_same_bits(load_weights(run / "weights").params, load_weights(trained / "weights").params)
    assert_same_bits(load_weights(run).params, load_weights(trained).params)  # of the checkpoints
    lines = [
        [{k: v for k, v in line.items() if k != "images_per_second"} for line in read_metrics(path)]
        for path in (run, trained)
    ]
    assert [line["step"] for line in lines[0]] == [4, 8, 12]
    # The means of the line between are of the steps since the stop.
    assert (lines[0][0], lines[0][2]) == (lines[1][0], lines[1][2])
    shown = events(gcs, "run/tensorboard/")
    assert sorted(step for step, name in shown if name == "loss_generator") == [4, 8, 12]
    (picture,) = gcs.names("bucket", "run/pictures/")
    with Image.open(io.BytesIO((path_of("gs://bucket") / picture).read_bytes())) as image:
        assert image.size == Image.open(trained / "pictures" / picture.rpartition("/")[2]).size
    saved = json.loads((run / "config.json").read_text())
    assert saved["config"]["teacher"]["weights"] == "gs://bucket/teacher.weights"
    # Both commands read the same copies, made once.
    shards = [name for name in gcs.names("bucket", "data.pairs/") if "array_record" in name]
    assert len(shards) == 3
    assert [gcs.requests["READ", "bucket", name] for name in shards] == [1, 1, 1]
    assert not (ROOT / "gs:").exists()

    for weights, out in ((run, tmp_path / "there.npy"), (trained, tmp_path / "here.npy")):
        succeeds("sample", "--weights", weights, "--num", 4, "--out", out)
    np.testing.assert_array_equal(np.load(tmp_path / "there.npy"), np.load(tmp_path / "here.npy"))


def test_a_teacher_and_its_pairs_are_made_there(gcs, tiny, tiny_there, folder, capsys):
    succeeds("teacher", "--config", TINY, "--workdir", folder / "teacher")
    teacher = tiny[2].partition("=")[2]
    assert_same_bits(load_weights(folder / "teacher").params, load_weights(teacher).params)

    make = ("pairs", "--config", TINY, tiny_there[2], "--workdir", folder / "pairs")
    succeeds(*make)
    options = dict(sample_shape=(8, 8, 1), num_classes=10)
    found = PairSource(folder / "pairs", **options)
    expected = PairSource(tiny[3].partition("=")[2], **options)
    assert len(found) == len(expected) == 80
    for index in range(80):
        assert_same_bits(found[index], expected[index])
    # What is there is not made again, and what is missing is.
    first, second, _ = gcs.names("bucket", f"{folder.name}/pairs/pairs-")
    kept = gcs.buckets["bucket"][first].generation
    del gcs.buckets["bucket"][second]
    succeeds(*make)
    assert "pairs  80/80" in capsys.readouterr().err
    assert gcs.buckets["bucket"][first].generation == kept
    assert_same_bits(PairSource(folder / "pairs", **options)[40], expected[40])


def test_networks_and_prompts_are_read_from_there(gcs, text_weights, lpips_file, folder, tmp_path):
    gcs.put_folder("bucket", f"{folder.name}/sd", text_weights)
    found, expected = load_pipeline(str(folder / "sd")), load_pipeline(text_weights)
    assert found.frozen.keys() == {"network", "text_encoder", "decoders"}
    assert_same_bits(found.frozen, expected.frozen)
    np.testing.assert_array_equal(
        found.tokenizer.encode(["a cat"]), expected.tokenizer.encode(["a cat"])
    )
    assert found.sampling == expected.sampling

    (folder / "lpips.safetensors").upload(lpips_file)  # 58 MB, so in parts
    there = load_auxiliary(folder / "lpips.safetensors", LPIPS)
    assert_same_bits(there, load_auxiliary(lpips_file, LPIPS))

    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    succeeds("prompts", tmp_path / "prompts.txt", folder / "prompts")
    assert [PromptSource(folder / "prompts")[index] for index in (0, 1)] == ["a cat", "a dog"]


def test_a_checkpoint_that_is_torn_there_is_set_aside(gcs, folder):
    state = {"a": jax.numpy.arange(5.0)}
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(step, {"a": state["a"] + step}, {"identity": step})
    checkpoints.wait()
    (manifest,) = gcs.names("bucket", f"{folder.name}/2/state/manifest")
    gcs.put("bucket", manifest, gcs.buckets["bucket"][manifest].content[:20])
    step, restored, position = checkpoints.restore(abstract)
    assert (step, position) == (1, {"identity": 1})
    np.testing.assert_array_equal(restored["a"], [1, 2, 3, 4, 5])
    assert {name.split("/")[1] for name in gcs.names("bucket", folder.name)} == {"1", "broken-2"}
    checkpoints.save(2, state, {"identity": 2})
    checkpoints.close()
    assert checkpoints.steps == [1, 2]


def test_lines_and_events_reach_the_bucket_at_checkpoints(gcs, folder):
    writer = MetricsWriter(folder)
    for step in (1, 2, 3):
        writer.scalars(step, {"loss": step / 2})
    assert read_metrics(folder) == []
    writer.flush()
    assert read_metrics(folder) == [{"step": step, "loss": step / 2} for step in (1, 2, 3)]
    writer.scalars(4, {"loss": 2.0})  # and then the process is killed

    writer = MetricsWriter(folder, step=2)
    writer.scalars(3, {"loss": 7.0})
    writer.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(folder)] == [
        *((1, 0.5), (2, 1.0)),
        (3, 7.0),
    ]
    assert events(gcs, f"{folder.name}/tensorboard/") == [(n, "loss") for n in (1, 2, 3, 3)]
    files = gcs.names("bucket", f"{folder.name}/tensorboard/")
    assert [gcs.requests["WRITE", "bucket", name] for name in files] == [1] * len(files)


def test_lines_are_written_at_most_twice_a_minute(gcs, folder, monkeypatch):
    from dmd_jax.reporting import metrics

    clock = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    writer = MetricsWriter(folder)
    written = []
    for step in range(1, 13):
        clock[0] += 11.0
        writer.scalars(step, {"loss": 0.0})
        written.append(len(read_metrics(folder)))
    assert written == [0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9, 12]
    writer.close()


def test_a_trace_reaches_the_bucket(gcs, folder):
    profile = Profile(folder, range(1, 2), 0)
    with profile.step("train", 1) as outputs:
        outputs.append(jax.numpy.ones(3) + 1)
    assert any(name.endswith(".xplane.pb") for name in gcs.names("bucket", folder.name))


def test_a_bucket_path_does_what_a_path_does(gcs, folder):
    names = [f"n{index}" for index in range(2 * PAGE + 1)]
    for name in names:
        (folder / "a" / name).write_text(name)
    assert sorted(path.name for path in (folder / "a").iterdir()) == names
    assert [path.name for path in folder.glob("a/n1*")] == ["n1"]
    sizes = {name: stored.size for name, stored in (folder / "a").files().items()}
    assert sizes == dict.fromkeys(names, 2)
    assert (folder / "a").is_dir() and not (folder / "a").is_file() and (folder / "a").exists()
    assert (folder / "a" / "n1").is_file() and not (folder / "a" / "n1").is_dir()
    assert not (folder / "b").exists() and (folder / "b").files() == {}
    # What another process writes is seen at once.
    gcs.put("bucket", f"{folder.name}/b/x", b"1")
    assert (folder / "b").is_dir() and (folder / "b" / "x").read_bytes() == b"1"
    (folder / "b" / "x").unlink()
    assert not (folder / "b").exists()
    (folder / "a").rename(folder / "c")
    assert sorted((folder / "c").files()) == names and not (folder / "a").exists()
    assert not (folder / "a").is_symlink() and not (folder / "b").is_symlink()
    assert folder.resolve() == folder and (folder / "a").parent == folder
    with pytest.raises(FileNotFoundError, match="no such object"):
        (folder / "none").read_bytes()
    with pytest.raises(FileNotFoundError, match="no such bucket"):
        path_of("gs://elsewhere/x").write_bytes(b"1")
    with pytest.raises(FileNotFoundError, match="no such bucket"):
        path_of("gs://elsewhere/x").mkdir(parents=True, exist_ok=True)
    assert "elsewhere" not in gcs.buckets


def test_files_appear_whole_or_not_at_all(gcs, folder):
    large = np.random.default_rng(0).bytes(6 << 20)  # more than goes in one request
    write_whole(folder / "x", large)
    assert gcs.buckets["bucket"][f"{folder.name}/x"].content == large

    def fail_half_way():
        with replacing(folder / "x") as temporary:
            temporary.write_bytes(b"sec")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert (folder / "x").read_bytes() == large
    write_json(folder / "x.json", {"a": [1, 2.5, None]})
    assert json.loads((folder / "x.json").read_text()) == {"a": [1, 2.5, None]}


def test_a_file_is_copied_once_for_each_content(gcs, folder, monkeypatch):
    name = f"{folder.name}/x"

    def reads():
        return gcs.requests["READ", "bucket", name]

    gcs.put("bucket", name, b"first")
    assert local_copy(folder / "x").read_bytes() == b"first"
    copy = local_copy(folder / "x")
    assert copy.read_bytes() == b"first" and reads() == 1
    gcs.put("bucket", name, b"other")  # of the same size
    assert local_copy(folder / "x").read_bytes() == b"other" and reads() == 2
    copy.write_bytes(b"torn")
    assert local_copy(folder / "x").read_bytes() == b"other" and reads() == 3
    # What is no longer there has no copy that could be taken for it.
    gcs.put("bucket", f"{folder.name}/y", b"")
    del gcs.buckets["bucket"][name]
    assert local_folder(folder, ["y"]) == copy.parent and not copy.exists()
    with pytest.raises(UserError, match="gs://bucket/.*/x: no such file"):
        local_copy(folder / "x")
    usage = shutil.disk_usage(copy.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    gcs.put("bucket", name, bytes(2_000_000))
    with pytest.raises(UserError, match=r"has 2 MB to copy to .*, where 1 MB are free"):
        local_copy(folder / "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3://bucket/x", "unknown kind of path"),
        ("gs://", "expected gs://BUCKET/NAME"),
        ("gs:///x", "expected gs://BUCKET/NAME"),
        ("gs://Bucket/x", "expected gs://BUCKET/NAME"),
        ("gs://bucket/../x", "expected gs://BUCKET/NAME"),
        ("gs://bucket/x*", "expected gs://BUCKET/NAME"),
        ("gs://bucket/x#1", "expected gs://BUCKET/NAME"),
    ],
)
def test_what_is_no_path_is_refused(text, message):
    with pytest.raises(UserError, match=f"^{text.replace('*', '[*]')}: {message}"):
        path_of(text)
    with pytest.raises(UserError, match="expected a path on this host"):
        local_path(text)


def test_local_paths_stay_as_they_are(tmp_path):
    for text in ("x/y", "gs/bucket", "/gs/bucket/x", "a:b", "."):
        assert path_of(text) == local_path(text) == type(tmp_path)(text)
        assert type(path_of(text)) is type(tmp_path)


def test_without_gcsfs_the_extra_is_named(monkeypatch, capsys):
    def missing(protocol):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    line = fails(capsys, "train", "--config", TINY, "--workdir", "gs://bucket/none")
    assert "argument --workdir: gs://bucket/none needs the package gcsfs" in line
    assert 'pip install "dmd_jax[gcs]"' in line


def test_what_cannot_be_used_is_named(gcs, tiny, tiny_there, trained, folder, tmp_path, capsys):
    line = fails(capsys, "train", *tiny, "--workdir", "gs://elsewhere/run")
    assert "gs://elsewhere/run cannot be written: " in line and "no such bucket" in line
    line = fails(capsys, "train", *tiny, "--workdir", "gs://closed/run")
    assert "gs://closed/run/config.json cannot be reached: Anonymous caller does not have" in line
    line = fails(capsys, "sample", "--weights", "gs://bucket/none", "--out", tmp_path / "x.png")
    assert "weights gs://bucket/none: no such folder" in line
    line = fails(capsys, "sample", "--weights", trained, "--out", "gs://bucket/x.png")
    assert "argument --out: gs://bucket/x.png: expected a path on this host" in line
    line = fails(capsys, "train", *tiny[:3], "--workdir", tmp_path, f"--config.data.pairs={folder}")
    assert f"{folder}/metadata.json: no such file" in line

    shard = "data.pairs/pairs-00001-of-00003.array_record"
    whole = gcs.buckets["bucket"][shard].content
    gcs.put("bucket", shard, whole[:1000])
    line = fails(capsys, "train", *tiny_there, "--workdir", folder)
    assert f"gs://bucket/{shard}: truncated or damaged, 0 pairs are readable, expected 32" in line
    gcs.put("bucket", shard, whole)
    assert not gcs.names("bucket", folder.name)
