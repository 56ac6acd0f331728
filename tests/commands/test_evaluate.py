"""`dmd-jax evaluate`: what it measures, that it goes on where it stopped, and what it refuses."""

import json
import signal
import time

import jax
import numpy as np
import pytest
from commands import fails, finish, free_port, start, succeeds

from dmd_jax.commands import evaluate as module
from dmd_jax.commands.cli import main
from dmd_jax.data.images import open_images
from dmd_jax.evaluation import samples as samples_module
from dmd_jax.evaluation.frechet import Statistics, frechet_distance
from dmd_jax.evaluation.kernel_distance import kernel_distance
from dmd_jax.evaluation.precision_recall import precision_recall
from dmd_jax.method import samplers
from dmd_jax.method.schedules import NoiseSchedule
from dmd_jax.models import build_denoiser, complete
from dmd_jax.sampling.draws import draw_labels, draw_latents
from dmd_jax.storage.weights import load_weights

PLUG = """
import numpy as np

def halves(images):
    return images.reshape(len(images), 2, -1).mean(axis=2)

def many(images):
    return np.zeros((len(images), 20_001))

def undefined(images):
    return np.full((len(images), 2), np.nan)
"""


@pytest.fixture
def plug(tmp_path, monkeypatch):
    (tmp_path / "my_features.py").write_text(PLUG)
    monkeypatch.syspath_prepend(tmp_path)


def evaluate(weights, out, *more):
    """The arguments of a small evaluation: parts of 64 samples."""
    common = ("--weights", weights, "--reference", "digits", "--batch-size", 32, "--out", out)
    return ("evaluate", *common, *more)


def measured(weights, out, *more):
    succeeds(*evaluate(weights, out, *more))
    return json.loads(out.read_text())


def interrupts(*argv):
    return main([str(argument) for argument in argv]) == 130


def start_two(*argv):
    """The same command in two processes of four devices."""
    join = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2, "--process")
    return [start(*argv, *join, index, devices=4) for index in range(2)]


def test_figures_are_those_of_the_samples_and_the_reals(trained, plug, tmp_path):
    results = measured(
        trained,
        tmp_path / "results.json",
        *(
            "--num",
            300,
            "--seed",
            5,
            "--kid",
            20,
            "--features",
            "pixels",
            "--features",
            "my_features:halves",
        ),
        *("--samples", tmp_path / "samples.npz"),
    )
    z, labels = draw_latents(5, 0, 300, (8, 8, 1)), draw_labels(5, 0, 300, 10)
    weights = load_weights(trained)
    denoise = build_denoiser(weights.network).denoise
    expected = jax.jit(
        lambda p, z: samplers.one_step(denoise, p, z, labels, schedule=NoiseSchedule.edm())
    )(weights.params, z)
    with np.load(tmp_path / "samples.npz") as samples:
        images = samples["images"]
        np.testing.assert_array_equal(samples["labels"], labels)
        np.testing.assert_allclose(images, expected, atol=1e-5 * np.abs(expected).max())
    digits = open_images("digits")
    real = np.stack([digits[index]["x0"] for index in range(1797)])
    for name, vectors in (
        ("pixels", lambda x: x.reshape(len(x), -1)),
        ("my_features:halves", lambda x: x.reshape(len(x), 2, -1).mean(axis=2)),
    ):
        found = results["features"][name]
        ours, theirs = vectors(images), vectors(real)
        np.testing.assert_allclose(
            found["frechet_distance"],
            frechet_distance(Statistics.of(ours), Statistics.of(theirs)),
            rtol=1e-9,
        )
        shares = precision_recall(theirs, ours)
        np.testing.assert_allclose((found["precision"], found["recall"]), shares, atol=1e-12)
        kid = kernel_distance(theirs.astype(np.float64), ours, subsets=20)
        assert found["kernel_distance"] == pytest.approx(kid, rel=1e-6)
        assert kid["subset_size"] == 300
        assert found["feature_dimensions"] == ours.shape[1]
    assert results["num_samples"] == 300 and results["num_reference"] == 1797
    assert results["num_steps"] == 1 and results["sampler"] == "one-step"
    assert results["seed"] == 5 and results["reference"] == "digits"
    assert results["seconds_per_image"] > 0 and "at step 12" in results["weights"]
    assert "CPU cores" in results["machine"] and results["command"].startswith("dmd-jax")
    assert not (tmp_path / "results.parts").exists()


def test_an_interrupted_evaluation_goes_on_to_the_same_figures(
    trained, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "results.json"
    whole = measured(trained, tmp_path / "whole.json", "--num", 200)
    latents, drawn = samples_module.draw_latents, []

    def interrupted(seed, start, stop, shape):
        drawn.append(start)
        if drawn == [0, 64, 128]:
            raise KeyboardInterrupt
        return latents(seed, start, stop, shape)

    monkeypatch.setattr(samples_module, "draw_latents", interrupted)
    assert interrupts(*evaluate(trained, out, "--num", 200))
    assert not out.exists()
    kept = sorted(path.name for path in (tmp_path / "results.parts").glob("samples-*"))
    assert kept == ["samples-00000.npz", "samples-00001.npz"]
    capsys.readouterr()
    assert measured(trained, out, "--num", 200)["features"] == whole["features"]
    assert drawn == [0, 64, 128, 128, 192]
    assert "evaluate: going on after 128 of 200" in capsys.readouterr().err
    assert not (tmp_path / "results.parts").exists()


def test_parts_of_other_settings_are_kept_and_refused(trained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(samples_module, "draw_latents", stop)
        assert interrupts(*evaluate(trained, out, "--num", 100))
    line = fails(capsys, *evaluate(trained, out, "--num", 101, "--seed", 3))
    assert "results.parts holds parts of another evaluation" in line
    assert "num_samples 100 there, 101 asked for; seed 0 there, 3 asked for" in line
    line = fails(capsys, *evaluate(trained, out, "--num", 100, "--num-reference", 50))
    assert "'chosen': 1797" in line
    assert list((tmp_path / "results.parts").glob("reference-*"))


def test_parts_are_of_the_whole_network_and_of_the_batches_of_the_noise(
    trained, tmp_path, monkeypatch
):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(samples_module, "draw_latents", stop)
    weights = load_weights(trained)
    heun = ("--sampler", "heun", "--steps", 2, "--num", 100, "--batch-size", 30)
    # On eight devices 30 images are made as 32, which matters where they share a draw of noise.
    for name, options, noise_batch in (("a", (), None), ("b", ("--s-churn", 1), 32)):
        assert interrupts(*evaluate(trained, tmp_path / f"{name}.json", *heun, *options))
        settings = json.loads((tmp_path / f"{name}.parts" / "settings.json").read_text())
        assert settings["batch_size"] == 30 and settings["noise_batch_size"] == noise_batch
        assert settings["network"] == complete(weights.network)
        assert settings["network"].keys() > weights.network.keys()


def test_nothing_that_is_there_is_overwritten(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("real.npz", images=np.zeros((9, 8, 8, 1), np.uint8))
    (tmp_path / "link.npz").symlink_to("real.npz")
    reference = ("--reference", tmp_path / "real.npz")
    before = (tmp_path / "real.npz").read_bytes()
    for flag in ("--samples", "--save-reference"):
        for name in ("real.npz", "link.npz"):
            line = fails(capsys, *evaluate(trained, "r.json", *reference, flag, name))
            assert f"{flag} {name} is that of --reference; expected another name" in line
        line = fails(capsys, *evaluate(trained, "r.json", flag, "real.npz"))
        assert "real.npz exists already; expected a name that is free" in line
    both = ("--samples", "new.npz", "--save-reference", "new.npz")
    line = fails(capsys, *evaluate(trained, "r.json", *both))
    assert "--save-reference new.npz is that of --samples" in line
    (tmp_path / "images.json").mkdir()
    line = fails(capsys, *evaluate(trained, "images.json", "--reference", "images.json"))
    assert "--out images.json is that of --reference" in line
    assert (tmp_path / "real.npz").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_a_run_that_was_stopped_behind_its_samples_goes_on(trained, tmp_path, monkeypatch):
    out, samples = tmp_path / "r.json", tmp_path / "s.npz"
    write_json = module.write_json

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_json", stop)
    assert interrupts(*evaluate(trained, out, "--num", 40, "--samples", samples))
    assert samples.exists() and not out.exists()
    monkeypatch.setattr(module, "write_json", write_json)
    measured(trained, out, "--num", 40, "--samples", samples)


def test_sigterm_stops_every_process_and_leaves_whole_parts(trained, tmp_path):
    out, folder = tmp_path / "results.json", tmp_path / "results.parts"
    arguments = evaluate(trained, out, "--num", 100_000, "--sampler", "heun", "--steps", 3)
    processes = start_two(*arguments)
    deadline = time.monotonic() + 200
    while not list(folder.glob("samples-*")):
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        finish(process, code=-signal.SIGTERM)
    assert not out.exists()
    for path in folder.glob("samples-*"):
        with np.load(path) as part:
            assert part["features_0"].shape == (64, 64)


def test_two_processes_measure_what_one_does(trained, tmp_path):
    more = ("--num", 300, "--samples")
    one = measured(trained, tmp_path / "one.json", *more, tmp_path / "one.npz")
    arguments = evaluate(trained, tmp_path / "two.json", *more, tmp_path / "two.npz")
    outputs = [finish(process) for process in start_two(*arguments)]
    assert "Fréchet distance" in outputs[0] and "Fréchet distance" not in outputs[1]
    two = json.loads((tmp_path / "two.json").read_text())
    first, second = (results["features"]["pixels"] for results in (one, two))
    assert second.pop("kernel_distance") == pytest.approx(first.pop("kernel_distance"), rel=1e-4)
    for key, expected in first.items():
        np.testing.assert_allclose(second[key], expected, rtol=1e-5)
    with np.load(tmp_path / "one.npz") as first, np.load(tmp_path / "two.npz") as second:
        np.testing.assert_array_equal(second["labels"], first["labels"])
        np.testing.assert_allclose(second["images"], first["images"], atol=1e-5)
    assert not (tmp_path / "two.parts").exists()


def test_two_processes_of_other_settings_are_both_refused(trained, tmp_path):
    join = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2, "--process")
    processes = [
        start(*evaluate(trained, tmp_path / "r.json", "--seed", seed), *join, seed, devices=1)
        for seed in range(2)
    ]
    for process in processes:
        output = finish(process, code=2)
        assert "seed is '1' and '0' in process 0" in output and "Traceback" not in output


def test_saved_statistics_serve_as_reference(trained, tmp_path, capsys):
    path = tmp_path / "digits.npz"
    images = measured(
        trained, tmp_path / "a.json", "--num", 100, "--save-reference", path, "--num-reference", 900
    )
    assert "kernel distance" in capsys.readouterr().out
    saved = measured(trained, tmp_path / "b.json", "--num", 100, "--reference", path)
    shown = capsys.readouterr()
    left_out = f"{path} is of statistics: no kernel distance (KID), precision and recall, which"
    assert left_out in shown.err and "kernel distance" not in shown.out
    assert saved["num_reference"] == images["num_reference"] == 900
    found, expected = (results["features"]["pixels"] for results in (saved, images))
    assert found["frechet_distance"] == expected["frechet_distance"]
    kinds = {"precision", "recall", "kernel_distance"}
    assert kinds <= expected.keys() and not kinds & found.keys()
    line = fails(capsys, *evaluate(trained, tmp_path / "c.json", "--reference", path, "--kid", 5))
    assert f"--kid 5: {path} is of statistics; expected images" in line


def test_networks_see_grey_images_if_they_may(trained, lpips_file, tmp_path, capsys):
    out = tmp_path / "results.json"
    vgg16 = ("--features", "vgg16", "--lpips", lpips_file, "--vgg-resolution", 16)
    line = fails(capsys, *evaluate(trained, out, *vgg16, "--num", 40))
    assert "three channels; --repeat-grey" in line
    results = measured(trained, out, *vgg16, "--repeat-grey", "--num", 40, "--num-reference", 40)[
        "features"
    ]["vgg16"]
    assert results["feature_dimensions"] == 512 and results["frechet_distance"] > 0
    assert results["origin"]["source"] and len(results["origin"]["source_sha256"]) == 64
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == [
        "dmd-jax: warning: Fréchet distance of 512-dimensional features from 40 samples: a "
        "covariance needs more than 512, so the distance is mostly estimation bias"
    ]


@pytest.fixture
def channel_means(monkeypatch):
    """In place of Inception: each channel's mean, whichever way the image was resized."""
    from dmd_jax.evaluation import features

    metadata = {"source": "a.pth", "source_sha256": "12", "recognised": "yes"}
    monkeypatch.setattr(features, "load_auxiliary", lambda path, kind: {"w": np.eye(3)})
    monkeypatch.setattr(features, "describe_auxiliary", lambda path, kind: metadata)
    monkeypatch.setattr(
        features, "pool3", lambda params, x, preprocessing: x.mean((1, 2)) @ params["w"]
    )
    monkeypatch.setattr(features, "class_logits", lambda params, x: x[:, :1] * [0.0, 0.1, 0.3])


INCEPTION = ("--features", "inception", "--inception", "file", "--repeat-grey")


def test_inception_brings_its_score(trained, channel_means, tmp_path):
    out = tmp_path / "results.json"
    found = measured(trained, out, "--num", 100, *INCEPTION)["features"]["inception"]
    score = found["inception_score"]
    assert 1 <= score["mean"] < 3 and 0 <= score["std"] < 1
    assert found["origin"]["preprocessing"] == "pytorch_fid"


def test_a_protocol_is_resizing_bytes_and_labels_together(trained, channel_means, tmp_path, capsys):
    """The distance of one-dimensional features by its closed form, of bytes by each rule."""
    digits = open_images("digits")
    real = np.stack([digits[index]["x0"] for index in range(1797)])
    real = ((real + 1) * 127.5).round().mean(axis=(1, 2, 3), dtype=np.float64)
    down = lambda x: np.clip((x + 1) * 127.5, 0, 255).astype(np.uint8)  # noqa: E731
    nearest = lambda x: np.clip(x * 127.5 + 128, 0, 255).astype(np.uint8)  # noqa: E731
    uniform, balanced = draw_labels(0, 0, 100, 10), np.arange(100) % 10
    for protocol, preprocessing, to_bytes, labels, named in (
        ((), "pytorch_fid", nearest, uniform, "pytorch-fid"),
        (("--protocol", "edm"), "tensorflow", nearest, uniform, "edm"),
        (("--protocol", "dmd2"), "tensorflow", down, balanced, "dmd2"),
        (
            ("--protocol", "dmd2", "--labels", "uniform"),
            "tensorflow",
            down,
            uniform,
            "dmd2 but for --labels 'uniform'",
        ),
    ):
        out, samples = tmp_path / "r.json", tmp_path / f"{named}.npz"
        features = INCEPTION if not protocol else INCEPTION[2:]  # a protocol's are Inception
        results = measured(trained, out, "--num", 100, *features, *protocol, "--samples", samples)
        line = f"(inception), images made in float32, protocol {named}, in"
        assert line in capsys.readouterr().out
        with np.load(samples) as held:
            np.testing.assert_array_equal(held["labels"], labels)
            ours = to_bytes(held["images"]).mean(axis=(1, 2, 3), dtype=np.float64)
        # Of three equal channels: thrice the one-dimensional distance.
        expected = 3 * (
            (ours.mean() - real.mean()) ** 2 + (ours.std(ddof=1) - real.std(ddof=1)) ** 2
        )
        found = results["features"]["inception"]
        np.testing.assert_allclose(found["frechet_distance"], expected, rtol=1e-4)
        assert found["origin"]["preprocessing"] == preprocessing
        said = results["protocol"]
        assert said["preprocessing"] == preprocessing
        assert said["labels"] == ("balanced" if labels is balanced else "uniform")
        assert said["bytes"] == ("edm" if to_bytes is nearest else "dmd2")
        assert said["name"] == named.split()[0]
        assert said["overridden"] == (["labels"] if "but" in named else [])
        assert results["dtype"] == "float32" and results["feature_dtype"] == "float32"


def test_statistics_without_a_name_need_the_flag(trained, channel_means, tmp_path, capsys):
    """As EDM publishes them: a wrong resizing would be a wrong figure without a word."""
    path, out = tmp_path / "cifar10-32x32.npz", tmp_path / "r.json"
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    reference = ("--reference", path, "--num", 40)
    line = fails(capsys, *evaluate(trained, out, *INCEPTION, *reference))
    assert "expected --inception-preprocessing pytorch_fid|tensorflow|clean, or --protocol" in line
    assert "cifar10-32x32.npz does not say which features" in line and not out.exists()
    for flag in (("--protocol", "edm"), ("--inception-preprocessing", "tensorflow")):
        results = measured(trained, out, *INCEPTION, *reference, *flag)
        assert results["features"]["inception"]["origin"]["preprocessing"] == "tensorflow"


def test_parts_are_of_one_protocol(trained, channel_means, tmp_path, monkeypatch, capsys):
    def stop(*args):
        raise KeyboardInterrupt

    out = tmp_path / "r.json"
    with monkeypatch.context() as patch:
        patch.setattr(samples_module, "draw_latents", stop)
        assert interrupts(*evaluate(trained, out, "--num", 40, *INCEPTION, "--protocol", "edm"))
    line = fails(capsys, *evaluate(trained, out, "--num", 40, *INCEPTION, "--protocol", "dmd2"))
    assert "bytes 'edm' there, 'dmd2' asked for" in line
    assert "labels 'uniform' there, 'balanced' asked for" in line


def test_bfloat16_makes_nearly_the_same_images(trained, tmp_path):
    images = []
    for dtype in ("float32", "bfloat16"):
        path = tmp_path / f"{dtype}.npy"
        succeeds("sample", "--weights", trained, "--num", 8, "--dtype", dtype, "--out", path)
        images.append(np.load(path))
    difference = np.abs(images[0] - images[1]).max()
    assert 1e-5 < difference < 0.1 * np.abs(images[0]).max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num", 1), "--num 1; expected at least 2"),
        (("--precision-recall", -1), "--precision-recall -1"),
        (("--out", "results.txt"), "--out results.txt: expected a name that ends in .json"),
        (("--samples", "s.png"), "--samples s.png: expected a name that ends in .npz"),
        (("--save-reference", "s.json"), "--save-reference s.json: expected"),
        (("--save-reference", "s.npz", "--features", "a:b", "--features", "c:d"), "one of the"),
        (("--features", "fid"), 'features "fid": unknown'),
        (("--features", "inception"), "need --inception FILE"),
        (("--features", "vgg16"), "need --lpips FILE"),
        (("--kid", -1), "--kid -1; expected 0 or more subsets"),
        (("--protocol", "edm"), "need --inception FILE"),
        (("--protocol", "fid"), "--protocol"),
        (("--inception-preprocessing", "clean"), "is given, but the features are pixels"),
        (("--clip-prefix", "A photo of "), "--clip-prefix is given, but"),
        (("--dtype", "float16"), "--dtype"),
        (("--steps", 4), "--steps is given, but the sampler is one-step; expected none"),
        (("--reference", "no_such_folder"), "no_such_folder: no such file or folder"),
        (("--processes", 2), "--processes and --process need --coordinator"),
    ],
)
def test_bad_arguments_are_refused(trained, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *evaluate(trained, "results.json", *arguments))
    assert not list(tmp_path.iterdir())


def test_references_that_do_not_fit_are_refused(trained, tmp_path, capsys):
    path, out = tmp_path / "r.npz", tmp_path / "results.json"
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))
    line = fails(capsys, *evaluate(trained, out, "--reference", path))
    assert "r.npz does not say which features its statistics are of; expected --features" in line
    pixels = ("--features", "pixels")
    line = fails(capsys, *evaluate(trained, out, "--reference", path, *pixels))
    assert "another dimension" in line and "expected (64,) and (64, 64) as pixels" in line
    np.savez(path, mu=np.zeros(64), sigma=np.eye(64))
    num = ("--num-reference", 9)
    line = fails(capsys, *evaluate(trained, out, "--reference", path, *pixels, *num))
    assert "holds no images to choose from" in line
    again = tmp_path / "again.npz"
    save = ("--save-reference", again)
    line = fails(capsys, *evaluate(trained, out, "--reference", path, *pixels, *save))
    assert "--save-reference" in line and "expected images" in line
    np.savez(path, images=np.zeros((9, 8, 8, 3), np.uint8))
    line = fails(capsys, *evaluate(trained, out, "--reference", path))
    assert "(8, 8, 3); expected (8, 8, 1)" in line
    assert [path.name for path in tmp_path.iterdir()] == ["r.npz"]


def test_features_of_too_many_dimensions_are_refused_before_anything_is_made(
    trained, plug, tmp_path, capsys
):
    folder = tmp_path / "out"
    folder.mkdir()
    features = ("--features", "my_features:many")
    line = fails(capsys, *evaluate(trained, folder / "results.json", *features))
    assert 'features "my_features:many" of images (8, 8, 1) have 20,001 dimensions; ' in line
    assert "expected at most 20,000, as --features inception and vgg16 have" in line
    assert not list(folder.iterdir())


def test_features_that_are_not_finite_are_refused(trained, plug, tmp_path, capsys):
    out = tmp_path / "results.json"
    line = fails(capsys, *evaluate(trained, out, "--features", "my_features:undefined"))
    assert 'features "my_features:undefined" of real images 0 to 511 hold NaN' in line
