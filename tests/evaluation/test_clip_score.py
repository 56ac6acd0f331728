"""The CLIP score: against transformers' CLIPModel and its image processor, and its definition."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from clip_folder import PREPROCESSOR, TEXT, VISION, WIDTH, save_clip, write_clip
from commands import succeeds
from PIL import Image
from small_tokenizer import VOCAB_SIZE

from dmd_jax.errors import UserError
from dmd_jax.evaluation import features
from dmd_jax.evaluation.clip_folder import Preparation, load_clip
from dmd_jax.evaluation.clip_score import ClipScore, prepare, resized, score
from dmd_jax.evaluation.protocols import PREFIX
from dmd_jax.storage.seals import read_sealed, write_sealed

TOLERANCE = 5e-5  # of cosines, which are at most 1
TEXTS = ["a cat on the red photo", "", "THE DOG'S  photo", "dog " * 100, "é 😀"]
MEAN, STD = PREPROCESSOR["image_mean"], PREPROCESSOR["image_std"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    write_clip(path / "clip")
    succeeds("convert", "clip", path / "clip", path / "out")
    return path / "out"


def drawn_images(*shape):
    """Bytes, smooth enough that resizing them is no matter of chance."""
    rng = np.random.default_rng(3)
    waves = rng.standard_normal((shape[0], 4, 4, shape[-1]))
    coarse = np.uint8(np.clip(waves * 60 + 128, 0, 255))
    return resized(coarse, shape[1:3], Image.Resampling.BILINEAR)


# OpenCLIP's ViT-g-14 but for widths and depths: heads of 88 channels, a perceptron 4.3637 times as
# wide, patches of 14, the exact GELU, and a text tower of heads of 64 channels.
SMALL = (TEXT, VISION, WIDTH)
LIKE_VIT_G = (
    TEXT
    | {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "hidden_act": "gelu"},
    {
        "hidden_size": 176,
        "intermediate_size": int(176 * 4.3637),
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
    128,
)


@pytest.mark.torch
@pytest.mark.parametrize("shape", [SMALL, LIKE_VIT_G], ids=["small", "like ViT-g"])
def test_cosines_are_those_of_transformers(tmp_path, shape):
    import torch
    from transformers import CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = save_clip(tmp_path / "clip", *shape)
    succeeds("convert", "clip", tmp_path / "clip", tmp_path / "out")
    clip, images = ClipScore(tmp_path / "out"), drawn_images(len(TEXTS), 20, 20, 3)
    ours = clip.cosines(images, clip.features_of_texts(clip.tokens(TEXTS)))

    processor = CLIPImageProcessorPil.from_pretrained(tmp_path / "clip")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "clip")
    pixels = processor(images=list(images), return_tensors="pt")
    tokens = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(
            input_ids=tokens["input_ids"], pixel_values=pixels["pixel_values"]
        ).logits_per_image
        expected = (expected / model.logit_scale.exp()).diagonal().numpy()
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE)
    assert np.ptp(ours) > 100 * TOLERANCE  # the pairs are told apart
    crossed = clip.cosines(images, clip.features_of_texts(clip.tokens(TEXTS[::-1])))
    assert np.abs(crossed - ours).max() > 100 * TOLERANCE


@pytest.mark.torch
@pytest.mark.parametrize("shape", [(31, 31), (224, 224), (17, 40), (41, 18)])
def test_images_are_prepared_as_by_transformers(shape):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = drawn_images(2, *shape, 3)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=13)
    expected = processor(images=list(images), return_tensors="np")["pixel_values"]
    ours = prepare(images, Preparation(16, 13, MEAN, STD))
    np.testing.assert_allclose(ours, np.moveaxis(expected, 1, -1), atol=1e-6)


def test_preparation_is_pil_crop_and_statistics():
    images = drawn_images(2, 30, 20, 3)
    ours = prepare(images, Preparation(16, 12, [0.5, 0.25, 0.0], [0.5, 1.0, 2.0]))
    assert ours.dtype == np.float32
    for image, found in zip(images, ours):
        # 16 wide, 24 high; the middle 12 of both.
        picture = Image.fromarray(image).resize((16, 24), Image.Resampling.BICUBIC)
        middle = np.asarray(picture.crop((2, 6, 14, 18)), np.float64) / 255
        expected = (middle - [0.5, 0.25, 0.0]) / [0.5, 1.0, 2.0]
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_prefix_of_text_is_the_published_prefix_of_tokens(folder):
    """The published code puts the prefix's tokens behind the first, and cuts what is then too long,
    with the end where the last was no padding."""
    clip = ClipScore(folder)
    tokens, prefix = clip.tokens(TEXTS), clip.tokens([PREFIX])[0]
    end, padding = VOCAB_SIZE - 1, clip.tokens([""])[0, -1]
    own = prefix[1 : list(prefix).index(end)]
    assert len(own) >= 3
    expected = np.concatenate(
        [tokens[:, :1], np.tile(own, (len(TEXTS), 1)), tokens[:, 1:]], axis=1
    )[:, :77]
    cut = expected[:, -1] != padding
    expected[cut, -1] = end
    np.testing.assert_array_equal(clip.tokens([PREFIX + text for text in TEXTS]), expected)
    assert cut.sum() == 1


def test_the_score_is_a_mean_of_cosines():
    found = score(np.array([0.5, -0.25, 0.125]))
    assert found["cosine"] == pytest.approx(0.125)
    assert found["clip_score"] == pytest.approx(100 * (0.5 + 0.125) / 3)  # below 0 counts as 0


def test_cosines_are_of_each_pair_whatever_is_beside_it(folder):
    clip, images = ClipScore(folder), drawn_images(len(TEXTS), 16, 16, 3)
    tokens = clip.tokens(TEXTS)
    whole = clip.cosines(images, clip.features_of_texts(tokens))
    for index in range(len(TEXTS)):
        text = clip.features_of_texts(tokens[index : index + 1])
        one = clip.cosines(images[index : index + 1], text)
        np.testing.assert_allclose(one[0], whole[index], atol=1e-6)
    assert (np.abs(whole) <= 1).all()


def test_towers_are_on_the_devices_one_after_the_other(folder, monkeypatch):
    def shapes(params):
        return {x.shape for x in jax.tree.leaves(params)}

    def there(shapes):
        """Whether arrays of these shapes live that did not before the test."""
        return any(id(x) not in before and x.shape in shapes for x in jax.live_arrays())

    def watched(*arguments):
        seen.append((there(text), there(vision)))
        return pad_rows(*arguments)

    clip, pad_rows = load_clip(folder), features.pad_rows
    text, vision = shapes(clip.text.params), shapes(clip.vision.params)
    text, vision = text - vision, vision - text
    held, seen = jax.live_arrays(), []  # held, so that no other array gets their ids
    before = {id(x) for x in held}
    monkeypatch.setattr(features, "pad_rows", watched)
    score = ClipScore(folder)
    texts = score.features_of_texts(score.tokens(TEXTS))
    assert not there(text)
    score.cosines(drawn_images(len(TEXTS), 16, 16, 3), texts)
    assert seen == [(True, False), (False, True)]


def test_origin_is_that_of_the_conversion(folder):
    origin = ClipScore(folder).origin
    assert origin["file"] == "clip" and len(origin["sha256"]) == 64


def test_folders_that_are_refused(folder, tmp_path):
    def refused(path, change):
        """The message of a copy of the folder after `change` of one of its JSON files."""
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        content, _ = read_sealed(copy / path, "a test's")
        change(content)
        write_sealed(copy / path, content)
        with pytest.raises(UserError) as raised:
            load_clip(copy)
        return str(raised.value)

    with pytest.raises(UserError, match=r"no clip.json in it; expected a folder that"):
        load_clip(tmp_path)
    clip, config = "clip.json", "config.json"
    assert "cannot be read: mean is 'x'" in refused(clip, lambda c: c.update(mean="x"))
    assert "std is [1, 1, inf]" in refused(clip, lambda c: c.update(std=[1, 1, float("inf")]))
    assert "holds no sizes, mean and std" in refused(clip, lambda c: c.pop("crop_size"))
    assert "crop_size is 13; expected 14" in refused(clip, lambda c: c.update(crop_size=13))
    assert "has no source; expected what" in refused(config, lambda c: c.pop("source"))
    assert "makes 78 tokens; expected at most 77" in refused(
        "tokenizer/tokenizer_config.json", lambda c: c.update(model_max_length=78)
    )
    shutil.rmtree(tmp_path / "copy")
    shutil.copytree(folder, tmp_path / "copy")
    shutil.copytree(folder / "text_encoder", tmp_path / "copy", dirs_exist_ok=True)
    with pytest.raises(UserError, match="is of network clip_text; expected clip_vision"):
        load_clip(tmp_path / "copy")


def test_impossible_preparations_are_refused():
    good = Preparation(16, 14, MEAN, STD)
    for name, value in (
        ("crop_size", 17),
        ("crop_size", 0),
        ("shortest_edge", 16.0),
        ("shortest_edge", 8193),
        ("mean", MEAN[:2]),
        ("mean", [0, 0, float("nan")]),
        ("std", [1, 1, 0]),
        ("std", [True, True, True]),
    ):
        with pytest.raises(UserError, match=name):
            dataclasses.replace(good, **{name: value})
