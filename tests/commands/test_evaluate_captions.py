"""`dmd-jax evaluate --coco`: what it measures, that it goes on, and what it refuses."""

import json
import sys

import jax
import numpy as np
import pytest
from clip_folder import write_clip
from commands import fails, finish, free_port, start, succeeds
from diffusers_folder import write_folder
from PIL import Image

from dmd_jax.commands import arguments
from dmd_jax.commands.cli import main
from dmd_jax.evaluation import samples as samples_module
from dmd_jax.evaluation.clip_score import ClipScore, score
from dmd_jax.evaluation.frechet import Statistics, frechet_distance
from dmd_jax.teachers.tokenizer import load_tokenizer

SIZE, RESIZE, COUNT = 64, 24, 40
PLUG = """
def halves(images):
    return images.reshape(len(images), 2, -1).mean(axis=2)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Converted weights, a converted CLIP, captions, and real images of the size that is judged."""
    folder = tmp_path_factory.mktemp("text")
    write_folder(folder / "sd")
    write_clip(folder / "clip_model")
    succeeds("convert", "diffusers", folder / "sd", folder / "weights")
    succeeds("convert", "clip", folder / "clip_model", folder / "clip")
    annotations = [
        {"image_id": 7 * image, "id": 10 * image + which, "caption": f"{image} dogs, {which}"}
        for image in range(COUNT)
        for which in range(2)
    ]
    (folder / "captions.json").write_text(json.dumps({"annotations": annotations[::-1]}))
    real = np.random.default_rng(0).integers(0, 256, (30, RESIZE, RESIZE, 3), np.uint8)
    np.savez(folder / "real.npz", images=real)
    (folder / "coco32").mkdir()
    for index in range(2):
        Image.new("RGB", (32, 32)).save(folder / "coco32" / f"{index}.png")
    (folder / "features_of_halves.py").write_text(PLUG)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """The results of an evaluation, and its samples.npz."""
    folder = tmp_path_factory.mktemp("whole")
    more = ("--clip", made / "clip", "--seed", 3, "--samples", folder / "samples.npz")
    results = measured(made, folder / "results.json", *more)
    assert not (folder / "results.parts").exists()
    return results, folder / "samples.npz"


def evaluate(made, out, *more, num=COUNT, features="features_of_halves:halves"):
    """The arguments of a small evaluation, in parts of 16; later ones count before earlier ones."""
    return (
        *("evaluate", "--weights", made / "weights", "--coco", made / "captions.json"),
        *("--reference", made / "real.npz", "--features", features),
        *("--resize", RESIZE, "--num", num, "--out", out, *more),
    )


def measured(made, out, *more, **options):
    succeeds(*evaluate(made, out, *more, **options))
    return json.loads(out.read_text())


def judged(made, folder, texts, *more):
    """What `sample` makes of the texts, as bytes and as PIL resizes these."""
    (folder / "texts.txt").write_text("\n".join(texts) + "\n")
    succeeds(
        *("sample", "--weights", made / "weights", "--prompts", folder / "texts.txt"),
        *("--seed", 3, "--out", folder / "images.npy", *more),
    )
    images = np.load(folder / "images.npy")
    assert images.shape == (len(texts), SIZE, SIZE, 3)
    pixels = np.clip(images * 127.5 + 128, 0, 255).astype(np.uint8)
    small = [Image.fromarray(p).resize((RESIZE, RESIZE), Image.Resampling.LANCZOS) for p in pixels]
    return np.stack([np.asarray(image) for image in small])


def test_figures_are_those_of_the_captions_images(made, whole, tmp_path):
    texts = [f"{image} dogs, 0" for image in range(COUNT)]
    pixels = judged(made, tmp_path, texts)
    results, samples = whole
    with np.load(samples) as samples:
        found, tokens = samples["images"], samples["tokens"]
    np.testing.assert_array_equal(np.round((found + 1) * 127.5), pixels)
    tokenizer = load_tokenizer(made / "weights" / "tokenizer")
    np.testing.assert_array_equal(tokens, tokenizer.encode(texts))
    with np.load(made / "real.npz") as real:
        ours, theirs = (
            (x / 127.5 - 1).reshape(len(x), 2, -1).mean(axis=2) for x in (pixels, real["images"])
        )
    expected = frechet_distance(Statistics.of(ours), Statistics.of(theirs))
    features = results["features"]["features_of_halves:halves"]
    np.testing.assert_allclose(features["frechet_distance"], expected, rtol=1e-4)
    clip = ClipScore(made / "clip")
    expected = score(clip.cosines(pixels, clip.features_of_texts(clip.tokens(texts))))
    for key, value in expected.items():
        np.testing.assert_allclose(results["clip"][key], value, atol=1e-5)
    assert results["clip"]["origin"]["file"] == "clip_model"
    assert results["num_samples"] == COUNT and results["num_reference"] == 30
    assert results["image_shape"] == [SIZE, SIZE, 3] and results["resize"] == RESIZE
    assert (results["sampler"], results["num_steps"], results["guidance"]) == ("one-step", 1, 1)
    assert results["decoder"] == "vae" and results["seconds_per_image"] > 0
    assert results["captions"]["file"].endswith("captions.json") and "latency" not in results


def test_samplers_and_guidance_reach_the_images(made, tmp_path):
    more = ("--sampler", "ddim", "--steps", 2, "--guidance", 3)
    pixels = judged(made, tmp_path, [f"{image} dogs, 0" for image in range(0, 40, 10)], *more)
    results = measured(
        made,
        tmp_path / "results.json",
        *(*more, "--seed", 3, "--samples", tmp_path / "samples.npz"),
        num=4,  # of forty, evenly spread
    )
    with np.load(tmp_path / "samples.npz") as samples:
        np.testing.assert_array_equal(np.round((samples["images"] + 1) * 127.5), pixels)
    assert (results["sampler"], results["num_steps"], results["guidance"]) == ("ddim", 2, 3)
    assert "clip" not in results


def test_the_protocol_of_coco_is_bytes_and_a_prefix(made, tmp_path):
    texts = [f"{image} dogs, 0" for image in range(0, 40, 5)]
    judged(made, tmp_path, texts)
    pixels = np.clip((np.load(tmp_path / "images.npy") + 1) * 127.5, 0, 255).astype(np.uint8)
    small = [Image.fromarray(p).resize((RESIZE, RESIZE), Image.Resampling.LANCZOS) for p in pixels]
    more = ("--clip", made / "clip", "--seed", 3, "--protocol", "clean-fid")
    samples = ("--samples", tmp_path / "samples.npz")
    results = measured(made, tmp_path / "results.json", *more, *samples, num=8)
    with np.load(tmp_path / "samples.npz") as held:
        np.testing.assert_array_equal(np.round((held["images"] + 1) * 127.5), small)
    clip = ClipScore(made / "clip")
    prefixed = clip.features_of_texts(clip.tokens([f"A photo depicts {text}" for text in texts]))
    expected = score(clip.cosines(np.stack(small), prefixed))
    np.testing.assert_allclose(results["clip"]["cosine"], expected["cosine"], atol=1e-5)
    plain = clip.cosines(np.stack(small), clip.features_of_texts(clip.tokens(texts)))
    assert abs(score(plain)["cosine"] - expected["cosine"]) > 1e-3
    assert results["clip"]["prefix"] == "A photo depicts "
    assert results["protocol"]["name"] == "clean-fid"
    overridden = ("--clip-prefix", "", "--bytes", "edm")
    results = measured(made, tmp_path / "other.json", *more, *overridden, num=8)
    assert results["protocol"]["overridden"] == ["bytes", "clip_prefix"]
    assert results["clip"]["prefix"] == ""


def test_an_interrupted_evaluation_goes_on_to_the_same_figures(
    made, whole, tmp_path, monkeypatch, capsys
):
    more, out = ("--clip", made / "clip", "--seed", 3), tmp_path / "results.json"
    latents, drawn = samples_module.draw_latents, []

    def interrupted(seed, start, stop, shape):
        drawn.append(start)
        if drawn == [0, 16]:
            raise KeyboardInterrupt
        return latents(seed, start, stop, shape)

    monkeypatch.setattr(samples_module, "draw_latents", interrupted)
    assert main([str(argument) for argument in evaluate(made, out, *more)]) == 130
    kept = sorted(path.name for path in (tmp_path / "results.parts").glob("samples-*"))
    assert kept == ["samples-00000.npz"]
    (tmp_path / "other.txt").write_text("a dog\n" * COUNT)
    np.savez(tmp_path / "real.npz", images=np.zeros((4, SIZE, SIZE, 3), np.uint8))
    for other, message in (
        (("--guidance", 2, "--sampler", "ddim"), "guidance 1.0 there, 2.0 asked for"),
        (("--resize", 0, "--reference", tmp_path / "real.npz"), "resize 24 there, 0 asked for"),
        (("--coco", tmp_path / "other.txt"), "captions_sha256"),
    ):
        assert message in fails(capsys, *evaluate(made, out, *more, *other))
    prefix = ("--clip-prefix", "A photo of ")
    assert "clip_prefix '' there, 'A photo of ' asked for" in (
        fails(capsys, *evaluate(made, out, *more, *prefix))
    )
    assert "(clip '" in fails(capsys, *evaluate(made, out, "--seed", 3))
    found = measured(made, out, *more)
    assert found["features"] == whole[0]["features"] and found["clip"] == whole[0]["clip"]
    assert drawn == [0, 16, 16, 32]
    assert "evaluate: going on after 16 of 40" in capsys.readouterr().err


def test_two_processes_measure_what_one_does(made, tmp_path):
    real = np.eye(48, dtype=np.uint8).reshape(-1, 4, 4, 3)
    np.savez(tmp_path / "real.npz", images=real)
    more = ("--reference", tmp_path / "real.npz", "--resize", 4, "--clip", made / "clip")
    options = {"num": 24, "features": "pixels"}
    one = measured(made, tmp_path / "one.json", *more, "--batch-size", 4, **options)
    join = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2, "--process")
    arguments = evaluate(made, tmp_path / "two.json", *more, "--batch-size", 4, **options)
    processes = [start(*arguments, *join, index, devices=2) for index in range(2)]
    outputs = [finish(process) for process in processes]
    assert "CLIP score" in outputs[0] and "CLIP score" not in outputs[1]
    two = json.loads((tmp_path / "two.json").read_text())
    for key in ("cosine", "clip_score"):
        np.testing.assert_allclose(two["clip"][key], one["clip"][key], rtol=1e-5)
    distances = [r["features"]["pixels"]["frechet_distance"] for r in (one, two)]
    np.testing.assert_allclose(*distances, rtol=1e-4)


def test_latency_is_of_one_image_on_one_device(made, tmp_path, monkeypatch, capsys):
    made_of, maker = [], arguments.ImageMaker

    class Watched(maker):
        def __init__(self, pipeline, **options):
            self.alone = "devices" in options  # the other one makes what is judged
            if self.alone:
                made_of.append(options)
            super().__init__(pipeline, **options)

        def __call__(self, z, tokens):
            if self.alone:
                made_of.append((z.shape, tokens["tokens"].shape))
            return super().__call__(z, tokens)

    monkeypatch.setattr(arguments, "ImageMaker", Watched)
    found = measured(made, tmp_path / "results.json", "--latency", 5, num=8)["latency"]
    options, *shapes = made_of
    assert options["batch_size"] == 1 and options["devices"] == [jax.local_devices()[0]]
    assert shapes == [((1, 8, 8, 4), (1, 77))] * 8
    assert (found["count"], found["warm_up"]) == (5, 3)
    seconds = found["seconds"]
    assert 0 < seconds["p50"] <= seconds["p90"] <= seconds["p99"]
    assert "s an image, images made in float32, protocol pytorch-fid, in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num", COUNT + 1), "has 40 captions (one an image); expected --num 41 or more"),
        (("--num", 1), "--num 1; expected at least 2 samples"),
        (("--resize", SIZE + 1), "--resize 65; expected at most 64, the images' size"),
        (("--resize", -1), "--resize -1; expected pixels, or 0"),
        (("--latency", 0), "--latency 0; expected at least 1 image"),
        (("--width", 32), "images of 64x32; expected squares, as references are"),
        (("--height", 60), "--height 60; expected a multiple of 8"),
        (("--guidance", -1, "--sampler", "ddim"), "guidance"),
        (("--steps", 4), "--steps is given, but the sampler is one-step; expected none"),
        (("--reference", "coco32"), f"images of 32x32, expected resolution {RESIZE}"),
        (("--labels", "balanced"), "--labels is given, but"),
        (("--clip-prefix", "A "), "--clip-prefix is given, but there is no --clip"),
        (("--guidance", 2), "guidance 2 with the sampler one-step; expected 1"),
        (("--sampler", "heun"), "unknown sampler 'heun' of text"),
        (("--s-churn", 1), "--s-churn is given, but"),
        (("--clip", "weights"), "has no clip.json in it; expected a folder that `dmd-jax convert"),
        (("--clip", "nothing"), "has no clip.json in it"),
        (("--decoder", "taesd"), "has no taesd folder in it"),
        (("--coco", "real.npz"), "real.npz: expected COCO's captions as .json"),
        (("--out", "captions.json"), "captions.json is that of --coco; expected another name"),
    ],
)
def test_bad_arguments_are_refused(made, tmp_path, capsys, arguments, message):
    arguments = [made / a if (made / str(a)).exists() else a for a in arguments]
    before = (made / "captions.json").read_bytes()
    assert message in fails(capsys, *evaluate(made, tmp_path / "results.json", *arguments, num=4))
    assert not list(tmp_path.glob("results*"))
    assert (made / "captions.json").read_bytes() == before


def test_captions_are_for_text_to_image_weights_alone(made, tmp_path, capsys):
    common = ("--reference", "digits", "--out", tmp_path / "results.json")
    weights = ("evaluate", "--weights", made / "weights", *common)
    assert "are text-to-image weights; expected --coco CAPTIONS" in fails(capsys, *weights)
    for option in (("--coco", made / "captions.json"), ("--latency", 3), ("--guidance", 2)):
        line = fails(
            capsys, "evaluate", "--weights", "dmd_jax/assets/digits_teacher", *common, *option
        )
        assert f"{option[0]} is given, but" in line and "are no text-to-image weights" in line
    assert not list(tmp_path.glob("results*"))
