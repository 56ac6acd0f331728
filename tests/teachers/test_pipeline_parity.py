"""From convert to sample and export, against PyTorch's StableDiffusionPipeline.

Each from the same latents and prompts, among them an empty one and one that is cut. Images differ
by 0.0005 to 0.0023 of 255 a pixel, as both compute in float32; they are held to 0.02.
"""

import re
import warnings

import numpy as np
import pytest
from commands import ROOT, succeeds
from diffusers_folder import save_pipeline
from PIL import Image

pytestmark = pytest.mark.torch

PROMPTS = ["a photo of the cat", "", "the red dog's cat and the dog on a photo of " * 20]


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    """A pipeline of random weights; its folder "sd", converted "weights", exported "one_step"."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    folder = tmp_path_factory.mktemp("parity")
    pipeline = made(folder, v2=False)
    return folder, pipeline


def made(folder, *, v2):
    pipeline = save_pipeline(folder / "sd", v2=v2)
    pipeline.set_progress_bar_config(disable=True)
    taesd = ("--taesd", folder / "sd" / "taesd")
    succeeds("convert", "diffusers", folder / "sd", folder / "weights", *taesd)
    succeeds("export", "diffusers", folder / "weights", folder / "one_step")
    z = np.random.default_rng(0).standard_normal((len(PROMPTS), 8, 8, 4)).astype(np.float32)
    np.save(folder / "z.npy", z)
    return pipeline


def ours(folder, *arguments):
    """Images [N, H, W, C] in [0, 1], by the command."""
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    latents = ("--latents", folder / "z.npy", "--out", folder / "x.npy")
    succeeds("sample", "--weights", folder / "weights", *prompts, *latents, *arguments)
    return np.clip(np.load(folder / "x.npy") / 2 + 0.5, 0, 1)


def theirs(folder, pipeline, scheduler, *, steps, guidance):
    import torch

    pipeline.scheduler = scheduler
    latents = torch.from_numpy(np.load(folder / "z.npy").transpose(0, 3, 1, 2).copy())
    return pipeline(
        PROMPTS,
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="np",
    ).images


def same(actual, expected):
    assert actual.shape == expected.shape == (len(PROMPTS), 64, 64, 3)
    assert np.mean((expected > 0) & (expected < 1)) > 0.4  # else clipping would hide much
    difference = 255 * np.abs(actual - expected).max()
    print(f"{difference:.5f} of 255")
    assert difference < 0.02


@pytest.mark.parametrize("sampler, steps", [("pndm", 50), ("ddim", 4), ("dpm++", 20), ("unipc", 8)])
def test_guided_images_are_the_pipelines(sd, sampler, steps):
    import diffusers

    folder, pipeline = sd
    # As a folder says it; the defaults of the class would clip x0 in DDIM.
    config = diffusers.PNDMScheduler.load_config(folder / "sd", subfolder="scheduler")
    kind, options = {
        "pndm": (diffusers.PNDMScheduler, {}),
        "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
        "dpm++": (diffusers.DPMSolverMultistepScheduler, {}),
        "unipc": (diffusers.UniPCMultistepScheduler, {}),
    }[sampler]
    scheduler = kind.from_config(config, **options)
    images = ours(folder, "--sampler", sampler, "--steps", steps, "--guidance", 7.5)
    same(images, theirs(folder, pipeline, scheduler, steps=steps, guidance=7.5))


@pytest.mark.parametrize("v2", [False, True])
def test_one_step_images_are_those_of_the_exported_unet(sd, v2, tmp_path):
    import diffusers

    folder, pipeline = sd
    if v2:  # v-prediction, linear projections, heads by level
        folder, pipeline = tmp_path, made(tmp_path, v2=True)
    one_step = folder / "one_step"
    pipeline.unet = diffusers.UNet2DConditionModel.from_pretrained(one_step, subfolder="unet")
    scheduler = diffusers.DDIMScheduler.from_pretrained(one_step, subfolder="scheduler")
    same(ours(folder), theirs(folder, pipeline, scheduler, steps=1, guidance=1.0))
    if not v2:
        vae, taesd = pipeline.vae, folder / "sd" / "taesd"
        pipeline.vae = diffusers.AutoencoderTiny.from_pretrained(taesd)
        expected = theirs(folder, pipeline, scheduler, steps=1, guidance=1.0)
        same(ours(folder, "--decoder", "taesd"), expected)
        pipeline.vae = vae


def test_the_readmes_lines_make_an_image_of_the_exported_unet(sd, tmp_path, monkeypatch):
    import torch

    folder, _ = sd
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "configs" / "README.md").read_text(), re.DOTALL
    )
    (lines,) = (block for block in blocks if "import DDIMScheduler" in block)
    # What is not here: the hub, and a trained generator.
    (hub_id,) = re.findall(r'"([\w-]+/[\w-]+)"', lines)
    (exported,) = re.findall(r'folder = "(\S+)"', lines)
    (prompt,) = re.findall(r'prompt = "(.+)"', lines)
    lines = lines.replace(hub_id, str(folder / "sd")).replace(exported, str(folder / "one_step"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(lines, "configs/README.md", "exec"), {})
    (path,) = tmp_path.glob("*.png")

    torch.manual_seed(3)
    np.save("z.npy", torch.randn(1, 4, 8, 8).numpy().transpose(0, 2, 3, 1))
    command = ("--prompt", prompt, "--latents", "z.npy", "--out", "ours")
    succeeds("sample", "--weights", folder / "weights", *command)
    with Image.open(path) as theirs_image, Image.open("ours/00000.png") as our_image:
        assert theirs_image.size == (64, 64)
        difference = np.asarray(theirs_image).astype(int) - np.asarray(our_image)
    assert np.abs(difference).max() <= 1
