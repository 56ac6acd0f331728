"""Which captions an evaluation takes, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dmd_jax.errors import UserError
from dmd_jax.evaluation.coco import read_captions
from dmd_jax.evaluation.latency import WARM_UP, latency


def captions_file(folder, annotations):
    path = folder / "captions.json"
    path.write_text(json.dumps({"info": {}, "images": [], "annotations": annotations}))
    return path


def caption(image_id, number, text):
    return {"image_id": image_id, "id": number, "caption": text}


def test_one_caption_an_image_evenly_spread_over_the_images(tmp_path):
    rng = np.random.default_rng(0)
    images = [7, 10, 3, 500_000, 12, 44, 9]
    annotations = [
        caption(image, 100 * image + (number * 3 + 1) % 5, f"{image}, {(number * 3 + 1) % 5}")
        for image in images
        for number in range(5)
    ]
    path = captions_file(tmp_path, [annotations[index] for index in rng.permutation(35)])
    first = [f"{image}, 0" for image in sorted(images)]
    assert read_captions(path, 7) == first
    assert read_captions(path, 3) == [first[0], first[2], first[4]]  # 0, 7 / 3, 14 / 3
    with pytest.raises(UserError, match=r"has 7 captions \(one an image\); expected --num 8"):
        read_captions(path, 8)


def test_captions_are_taken_as_they_are(tmp_path):
    texts = ["", " A cat.\n", "é 😀", "x" * 2000]
    path = captions_file(tmp_path, [caption(i, 1, text) for i, text in enumerate(texts)])
    assert read_captions(path, 4) == texts


def test_lines_of_text_are_all_taken_in_order(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("one\ntwo\ntwo\nfour\nfive\n")
    assert read_captions(path, 5) == ["one", "two", "two", "four", "five"]
    assert read_captions(path, 2) == ["one", "two"]  # 0, 5 / 2
    with pytest.raises(UserError, match=r"captions.txt has 5 captions; expected --num 30,000 or"):
        read_captions(path, 30_000)
    path.write_bytes(b"one\n\n\xff\nfour\n")
    with pytest.raises(UserError, match=r"2 broken captions: .*line 2: .*; .*line 3: "):
        read_captions(path, 1)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "captions.json cannot be read"),
        ("[" * 100_000, "captions.json cannot be read"),
        ("[]", "has no list of annotations; expected COCO's captions as .json"),
        ('{"annotations": {}}', "has no list of annotations"),
        ('{"annotations": []}', r"has 0 captions \(one an image\); expected --num 2 or more"),
        ('{"annotations": [3, null]}', "2 broken captions: annotation 0 has no caption, image_id"),
        ('{"annotations": [{"caption": "a", "id": 1}]}', "1 broken captions: annotation 0"),
        ('{"annotations": [{"caption": 1, "id": 1, "image_id": 1}]}', "1 broken captions"),
        ('{"annotations": [{"caption": "a", "id": true, "image_id": 1}]}', "1 broken captions"),
        ('{"annotations": [1, 2, 3, 4]}', "4 broken captions: .*annotation 2 .*; …"),
    ],
)
def test_other_json_is_refused(tmp_path, content, message):
    path = tmp_path / "captions.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_captions(path, 2)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    for name, message in (
        ("none.json", "none.json: no such file"),
        ("none.txt", "none.txt"),
        ("captions.csv", "captions.csv: expected COCO's captions as .json, or a caption a line"),
    ):
        with pytest.raises(UserError, match=message):
            read_captions(tmp_path / name, 2)


def test_latency_leaves_the_warm_up_out(monkeypatch):
    seconds = [100.0] * WARM_UP + [3.0, 1.0, 2.0, 5.0, 4.0]
    clock, calls = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def make(index):
        calls.append(index)
        clock[0] += seconds[index]

    found = latency(make, 5)
    assert calls == list(range(WARM_UP + 5))
    assert found == {
        "seconds": {
            "p50": pytest.approx(3.0),
            "p90": pytest.approx(4.6),
            "p99": pytest.approx(4.96),
            "mean": pytest.approx(3.0),
        },
        "count": 5,
        "warm_up": WARM_UP,
    }
