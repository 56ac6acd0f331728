"""`dmd-jax sample`: grids, arrays and folders of images; and what is refused."""

import json
import re

import numpy as np
import pytest
from commands import fails, finish, start, succeeds
from PIL import Image
from small_tokenizer import END, small_vocab, write_tokenizer

from dmd_jax.reporting.pictures import to_uint8
from dmd_jax.sampling.draws import draw_latents
from dmd_jax.sampling.maker import ImageMaker
from dmd_jax.storage.weights import packaged
from dmd_jax.teachers.families import load_pipeline

PROMPTS = ["a photo of the cat", "the red dog's cat"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture(scope="module")
def expected(text_weights):
    """Three images of the two prompts in turn, of 32 x 64 pixels and from seed 5."""
    pipeline = load_pipeline(text_weights, decoder="taesd")
    maker = ImageMaker(pipeline, sampler="one-step", batch_size=3, sample_shape=(4, 8, 4))
    z = draw_latents(5, 0, 3, (4, 8, 4))
    return z, maker(z, pipeline.tokens([PROMPTS[0], PROMPTS[1], PROMPTS[0]]))


def sample(text_weights, *arguments):
    succeeds("sample", "--weights", text_weights, "--decoder", "taesd", *arguments)


def test_prompts_of_a_file_in_turn_make_an_array(text_weights, prompts, expected, tmp_path):
    size = ("--height", 32, "--width", 64, "--seed", 5, "--num", 3)
    sample(text_weights, "--prompts", prompts, *size, "--out", tmp_path / "x.npy")
    images = np.load(tmp_path / "x.npy")
    assert images.dtype == np.float32 and images.shape == (3, 32, 64, 3)
    np.testing.assert_allclose(images, expected[1], rtol=0, atol=1e-6 * np.abs(images).max())


def test_latents_of_a_file_make_a_grid(text_weights, expected, tmp_path, caplog):
    np.save(tmp_path / "z.npy", expected[0])
    sample(
        text_weights,
        *("--prompt", PROMPTS[0], "--prompt", PROMPTS[1] + " and the cat" * 40),
        *("--latents", tmp_path / "z.npy", "--num", 2, "--out", tmp_path / "x.png"),
    )
    assert "1 of 2 prompts have more than 77 tokens and are cut, the first is number 2" in (
        caplog.text
    )
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (2 * 66 + 2, 32 + 4)
        first = np.asarray(picture)[2:34, 2:66]
    assert np.abs(first.astype(int) - to_uint8(expected[1][0])).max() <= 1


def test_a_folder_of_images_goes_on_where_it_was_stopped(
    text_weights, prompts, expected, tmp_path, capsys
):
    out = tmp_path / "images"
    size = ("--height", 32, "--width", 64, "--seed", 5, "--num", 3, "--batch-size", 3)
    command = ("--prompts", prompts, *size, "--out", out)
    sample(text_weights, *command)
    files = sorted(path.name for path in out.iterdir())
    assert files == ["00000.png", "00001.png", "00002.png", "prompts.txt", "settings.json"]
    assert (out / "prompts.txt").read_text().splitlines() == [*PROMPTS, PROMPTS[0]]
    made = [(out / name).read_bytes() for name in files[:3]]
    for path, image in zip(files, expected[1]):
        with Image.open(out / path) as picture:
            assert np.abs(np.asarray(picture).astype(int) - to_uint8(image)).max() <= 1
    # What a run that was killed leaves behind.
    (out / "00001.png").unlink()
    (out / ".00002.png.tmp").write_bytes(b"half")
    sample(text_weights, *command)
    assert [(out / name).read_bytes() for name in files[:3]] == made
    # A finished folder is left as it is, and one of other settings too.
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    sample(text_weights, *command)
    common = ("sample", "--weights", text_weights, "--decoder", "taesd")
    line = fails(capsys, *common, *command, "--seed", 6)
    assert "holds images of other settings (seed 5 there, 6 asked for)" in line
    assert before == {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    (tmp_path / "notes" / "mine").mkdir(parents=True)
    line = fails(capsys, *common, *command, "--out", tmp_path / "notes")
    assert "notes holds no settings.json; expected another --out" in line


def test_a_process_says_nothing_but_its_progress(text_weights, tmp_path):
    """Warnings of other libraries are not the user's."""
    (tmp_path / "prompts.jsonl").write_text(
        "\n".join(json.dumps({"caption": f"a cat\n{number}"}) for number in range(4))
    )
    command = ("--weights", text_weights, "--prompts", tmp_path / "prompts.jsonl")
    options = ("--decoder", "taesd", "--batch-size", 2, "--out", tmp_path / "images")
    output = finish(start("sample", *command, *options, devices=1))
    *progress, last = output.splitlines()
    assert progress[-1].startswith("sample  4/4  ") and progress[-1].endswith("images/s  0s left")
    assert all(re.match(r"sample  [24]/4  ", line) for line in progress)
    assert last == f"sample: 4 images in {tmp_path / 'images'}"
    written = (tmp_path / "images" / "prompts.txt").read_text().splitlines()
    assert written == [f"a cat {number}" for number in range(4)]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--prompt", "a", "--sampler", "k-lms"], "argument --sampler: invalid choice: 'k-lms'"),
        (["--prompt", "a", "--sampler", "heun"], "unknown sampler 'heun' of text; expected one"),
        (["--prompt", "a", "--guidance", "2"], "guidance 2 with the sampler one-step"),
        (["--prompt", "a", "--sampler", "pndm", "--guidance", "-1"], "guidance is -1.0; expected"),
        (["--prompt", "a", "--sampler", "ddim", "--steps", "0"], "num_steps is 0; expected 1"),
        (["--prompt", "a", "--height", "60"], "--height 60; expected a multiple of 8"),
        (["--prompt", "a", "--width", "0"], "--width 0; expected a multiple of 8"),
        (["--prompt", "a", "--num", "0"], "--num 0; expected at least 1"),
        (["--prompt", "a", "--batch-size", "0"], "--batch-size 0; expected at least 1"),
        (["--prompt", "a", "--labels", "3"], "--labels is given, but"),
        (["--prompt", "a", "--s-churn", "3"], "--s-churn is given, but"),
        (["--prompt", "a", "--out", "x.jpg"], "ends in .png or .npy, or a folder's"),
        (["--prompt", "a", "--parts", "nowhere"], "--parts nowhere has no text_encoder folder"),
        ([], "expected --prompts FILE or --prompt"),
        (["--prompt", "a", "--prompts", "b.txt"], "expected --prompts FILE or --prompt"),
        (["--prompts", "none.txt"], "none.txt: no such file"),
    ],
)
def test_arguments_that_are_refused(
    text_weights, tmp_path, monkeypatch, capsys, arguments, expected
):
    monkeypatch.chdir(tmp_path)
    line = fails(capsys, "sample", "--weights", text_weights, "--out", "x", *arguments)
    assert expected in line
    assert not list(tmp_path.iterdir())


def test_prompts_and_latents_that_are_refused(text_weights, tmp_path, capsys):
    common = ("sample", "--weights", text_weights, "--out", tmp_path / "x")
    path = tmp_path / "prompts.txt"
    path.write_text("")
    assert "holds no prompts" in fails(capsys, *common, "--prompts", path)
    path.write_text("a cat\n\n\na dog\n")
    line = fails(capsys, *common, "--prompts", path)
    assert "2 of 4 rows are broken, the first is" in line and "line 2: empty line" in line

    z = np.zeros((2, 8, 8, 4), np.float32)
    latents = ("--latents", tmp_path / "z.npy", "--prompt", "a")
    np.save(tmp_path / "z.npy", z[..., :3])
    assert "has shape (2, 8, 8, 3); expected float [N, h, w, 4]" in fails(capsys, *common, *latents)
    np.save(tmp_path / "z.npy", z[:, :0])
    assert "has shape (2, 0, 8, 4)" in fails(capsys, *common, *latents)
    np.save(tmp_path / "z.npy", z)
    assert "has a size of its own" in fails(capsys, *common, *latents, "--height", 64)
    more = ("--prompt", "b", "--prompt", "c")
    assert "holds 2 latents; expected at least one for each of the 3 prompts" in fails(
        capsys, *common, *latents, *more
    )
    assert "holds 2 latents; expected --num 3" in fails(capsys, *common, *latents, "--num", 3)
    assert not (tmp_path / "x").exists()


def test_a_tokenizer_of_a_larger_vocabulary(text_weights, tmp_path, capsys):
    parts = tmp_path / "parts"
    for name in ("text_encoder", "vae"):
        (parts / name).parent.mkdir(exist_ok=True)
        (parts / name).symlink_to(text_weights / name)
    (parts / "scheduler.json").write_bytes((text_weights / "scheduler.json").read_bytes())
    write_tokenizer(parts / "tokenizer")
    vocab = small_vocab()
    (parts / "tokenizer" / "vocab.json").write_text(json.dumps(vocab | {END: 600}))
    line = fails(
        capsys,
        *("sample", "--weights", text_weights, "--parts", parts, "--prompt", "a cat"),
        *("--out", tmp_path / "x"),
    )
    assert "token 600 at [0, 3] (and 73 more) is outside the vocabulary" in line
    assert not (tmp_path / "x").exists()


def test_flags_of_text_are_refused_for_images_of_classes(tmp_path, capsys):
    common = ("sample", "--weights", packaged("digits_teacher"), "--out", tmp_path / "x.png")
    for flag, value in (
        ("--prompt", "a"),
        ("--prompts", "b.txt"),
        ("--guidance", "2"),
        ("--parts", "c"),
        ("--decoder", "vae"),
        ("--height", "64"),
        ("--width", "64"),
    ):
        line = fails(capsys, *common, flag, value)
        assert f"{flag} is given, but" in line and "are no text-to-image weights" in line
    assert "unknown sampler 'pndm'" in fails(capsys, *common, "--sampler", "pndm")
    assert "ends in .png or .npy" in fails(capsys, *common[:-1], tmp_path / "x")
    assert not list(tmp_path.iterdir())
