"""`dmd-jax pairs` of a text-to-image teacher, from the folder to the shards."""

import json
import shutil

import jax
import numpy as np
import pytest
from commands import ROOT, fails, finish, free_port, start, succeeds
from diffusers_folder import save_pipeline, write_folder
from small_tokenizer import VOCAB_SIZE

from dmd_jax.data.pair_shards import PairSource
from dmd_jax.method.discrete_samplers import ddim
from dmd_jax.method.randomness import Role
from dmd_jax.models import build_denoiser, build_network, guided
from dmd_jax.sampling.draws import draw_latents
from dmd_jax.storage.seals import read_sealed
from dmd_jax.storage.weights import load_weights, packaged, params_sha256
from dmd_jax.teachers.tokenizer import load_tokenizer

PROMPTS = ["a cat", "the red dog", "", "a photo of the cat on the dog " * 12]
COUNT = 10
CONFIG = """
from dmd_jax.config import default_config

def get_config():
    config = default_config()
    config.network = {network!r}
    config.teacher.weights = {weights!r}
    config.data.prompts = {prompts!r}
    config.teacher.guidance = 3.0
    config.pairs.sampler = "ddim"
    config.pairs.num_steps = 3
    config.pairs.count = 10
    config.pairs.shard_size = 4
    config.pairs.batch_size = 4
    return config
"""


def convert(folder, pipeline):
    """The teacher and the prompts in `folder`; a config of the two."""
    succeeds("convert", "diffusers", pipeline, folder / "teacher")
    rows = "".join(json.dumps({"caption": prompt}) + "\n" for prompt in PROMPTS)
    (folder / "prompts.jsonl").write_text(rows)
    succeeds("prompts", folder / "prompts.jsonl", folder / "prompts")
    network = json.loads((folder / "teacher" / "config.json").read_text())["network"]
    path = folder / "config.py"
    path.write_text(
        CONFIG.format(
            network=network, weights=str(folder / "teacher"), prompts=str(folder / "prompts")
        )
    )
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write_folder(folder / "pipeline")
    return convert(folder, folder / "pipeline")


@pytest.fixture(scope="module")
def pairs(config):
    workdir = config.parent / "pairs"
    succeeds("pairs", "--config", config, "--workdir", workdir)
    return workdir


def read(folder, shape=(8, 8, 4)):
    source = PairSource(folder, sample_shape=shape, num_classes=0, token_length=77)
    records = [source[index] for index in range(len(source))]
    return {name: np.stack([record[name] for record in records]) for name in records[0]}


def test_pairs_are_the_guided_teachers_samples_of_their_noise_and_prompts(config, pairs):
    found = read(pairs)
    assert len(found["tokens"]) == COUNT
    z = draw_latents(1, 0, COUNT, (8, 8, 4), role=Role.PAIR_LATENTS)
    np.testing.assert_array_equal(found["z_ref"], z)
    teacher = load_weights(config.parent / "teacher")
    text = load_weights(config.parent / "teacher" / "text_encoder")
    denoiser = build_denoiser(teacher.network)

    def expected(params, text_params, z, tokens, empty):
        encode = lambda t: build_network(text.network).apply({"params": text_params}, t)[0]  # noqa: E731
        return ddim(
            guided(denoiser.denoise, 3.0),
            params,
            z,
            (encode(tokens), encode(empty)),
            schedule=denoiser.schedule,
            num_steps=3,
        )

    empty = load_tokenizer(config.parent / "teacher" / "tokenizer").encode([""])
    y_ref = jax.jit(expected)(teacher.params, text.params, found["z_ref"], found["tokens"], empty)
    np.testing.assert_allclose(found["y_ref"], y_ref, atol=1e-5 * np.abs(y_ref).max())
    # Neighbours' noise or prompts would be seen.
    assert np.abs(np.diff(y_ref, axis=0)).max(axis=(1, 2, 3)).min() > 1e-2


def test_each_prompt_is_used_once_before_any_is_used_again(config, pairs):
    tokens = load_tokenizer(config.parent / "teacher" / "tokenizer").encode(PROMPTS).tolist()
    used = [tokens.index(row) for row in read(pairs)["tokens"].tolist()]
    assert sorted(used[:4]) == sorted(used[4:8]) == [0, 1, 2, 3]
    assert len(set(used[8:])) == 2
    assert used[:4] != used[4:8]


def test_the_metadata_says_what_the_pairs_are_of(config, pairs):
    found, _ = read_sealed(pairs / "metadata.json", "a test's")
    parts = config.parent / "teacher"
    assert found == {
        "format_version": 1,
        "teacher": load_weights(parts).description,
        "teacher_sha256": params_sha256(load_weights(parts).params),
        "sampler": "ddim",
        "num_steps": 3,
        "guidance": 3.0,
        "seed": 1,
        "count": COUNT,
        "shard_size": 4,
        "sample_shape": [8, 8, 4],
        "num_classes": 0,
        "dtype": "float32",
        "compute_dtype": "float32",
        "matmul_precision": "highest",
        "token_length": 77,
        "vocab_size": VOCAB_SIZE,
        "text_encoder_sha256": params_sha256(load_weights(parts / "text_encoder").params),
        "prompts": 4,
        "prompts_sha256": json.loads((config.parent / "prompts" / "metadata.json").read_text())[
            "prompts_sha256"
        ],
        "sampling": read_sealed(parts / "scheduler.json", "a test's")[0],
    }


def test_a_resumed_run_makes_the_missing_shard_to_the_bit(pairs, tmp_path, caplog):
    folder = shutil.copytree(pairs, tmp_path / "pairs")
    before = {path.name: path.read_bytes() for path in folder.glob("*.array_record")}
    kept, missing, torn = sorted(before)
    age = (folder / kept).stat().st_mtime_ns
    (folder / missing).unlink()
    (folder / torn).write_bytes(before[torn][:1000])
    succeeds("pairs", "--workdir", folder)
    assert {path.name: path.read_bytes() for path in folder.glob("*.array_record")} == before
    assert (folder / kept).stat().st_mtime_ns == age
    assert "2 of the prompts of 6 pairs are longer than 77 tokens and were cut there" in caplog.text


def test_two_processes_make_what_one_makes(config, pairs, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    command = ("pairs", "--config", config, "--workdir", tmp_path, "--coordinator", address)
    command = (*command, "--processes", 2, "--process")
    processes = [start(*command, index, devices=1) for index in range(2)]
    for process in processes:
        finish(process)
    one, two = read(pairs), read(tmp_path)
    for name in ("z_ref", "tokens"):
        np.testing.assert_array_equal(two[name], one[name])
    np.testing.assert_allclose(two["y_ref"], one["y_ref"], atol=1e-5 * np.abs(one["y_ref"]).max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("pairs.sampler=heun", "config.pairs.sampler is 'heun'; expected pndm or ddim or dpm++"),
        ("pairs.sampler=one-step", "config.pairs.sampler is 'one-step'; expected pndm"),
        ("teacher.guidance=-1.0", "guidance is -1.0; expected a number of at least 0"),
        ("pairs.num_steps=1001", "num_steps is 1001; expected 1 to 1000"),
        ("pairs.compute_dtype=float8", "dtype is 'float8'; expected one of"),
        ("pairs.matmul_precision=tf32", "matmul_precision is 'tf32'; expected one of highest"),
        ("data.prompts=", "config.data.prompts is empty; expected the folder of `dmd-jax prompts`"),
        ("data.prompts=no", "no/metadata.json: no such file; expected a folder written by `prompt"),
        ("network.sample_size=16", "sample_size is 8, expected 16"),
    ],
)
def test_refused_in_one_line_and_nothing_left_behind(capsys, config, tmp_path, change, message):
    workdir = tmp_path / "pairs"
    command = ("pairs", "--config", config, "--workdir", workdir, f"--config.{change}")
    assert message in fails(capsys, *command)
    assert not workdir.exists()


def test_samplers_and_guidance_of_text_are_refused_without_text(capsys, tmp_path):
    config = ("--config", ROOT / "configs" / "digits.py")
    weights = f"--config.teacher.weights={packaged('digits_teacher')}"
    command = ("pairs", *config, weights, "--workdir", tmp_path / "pairs")
    line = fails(capsys, *command, "--config.pairs.sampler=pndm")
    assert "config.pairs.sampler is 'pndm'; expected heun: the teacher is no text" in line
    assert "config.teacher.guidance is 2.0; expected 1.0" in fails(
        capsys, *command, "--config.teacher.guidance=2"
    )
    assert not (tmp_path / "pairs").exists()


def test_a_folder_goes_on_with_its_own_prompts_only(capsys, config, pairs, tmp_path):
    folder = shutil.copytree(pairs, tmp_path / "pairs")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "other.txt").write_text("a dog\n")
    succeeds("prompts", tmp_path / "other.txt", tmp_path / "other")
    other = f"--config.data.prompts={tmp_path / 'other'}"
    line = fails(capsys, "pairs", "--workdir", folder, other)
    assert "already holds other pairs (prompts 4 there, 1 now; prompts_sha256" in line
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_tokens_outside_the_vocabulary_are_refused(capsys, config, tmp_path):
    teacher = shutil.copytree(config.parent / "teacher", tmp_path / "teacher")
    path = teacher / "tokenizer" / "added_tokens.json"
    path.write_text(json.dumps({"cat": VOCAB_SIZE}))
    weights = f"--config.teacher.weights={teacher}"
    line = fails(capsys, "pairs", "--config", config, weights, "--workdir", tmp_path / "pairs")
    assert f"prompts of pairs 0 to 3: token {VOCAB_SIZE} at" in line
    assert f"expected 0 to {VOCAB_SIZE - 1}" in line
    assert not list((tmp_path / "pairs").glob("*.array_record"))


@pytest.mark.torch
@pytest.mark.parametrize(("sampler", "v2"), [("pndm", False), ("ddim", True)])
def test_pairs_are_the_latents_of_pytorchs_pipeline(tmp_path, sampler, v2):
    """PNDM with guidance, as the paper's pairs; and v-prediction, which PNDM does otherwise."""
    import diffusers
    import torch

    pipeline = save_pipeline(tmp_path / "pipeline", v2=v2)
    if sampler == "ddim":
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(
            pipeline.scheduler.config, clip_sample=False
        )
    config = convert(tmp_path, tmp_path / "pipeline")
    options = (f"--config.pairs.sampler={sampler}", "--config.pairs.num_steps=6")
    succeeds("pairs", "--config", config, "--workdir", tmp_path / "pairs", *options)
    found = read(tmp_path / "pairs")
    tokens = load_tokenizer(tmp_path / "teacher" / "tokenizer").encode(PROMPTS).tolist()
    texts = [PROMPTS[tokens.index(row)] for row in found["tokens"].tolist()]
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        expected = pipeline(
            texts,
            latents=torch.tensor(found["z_ref"]).permute(0, 3, 1, 2),
            num_inference_steps=6,
            guidance_scale=3.0,
            output_type="latent",
        ).images
    expected = expected.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(found["y_ref"], expected, atol=1e-5 * np.abs(expected).max())
