"""The report as a browser would read it."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from dmd_jax.reporting.pictures import png_bytes
from dmd_jax.reporting.report import write_report

RESULTS = {
    "fd": {"teacher_heun18": 0.08, "teacher_one_step": 4.4988, "generator": 0.1304},
    "class_agreement": {"teacher_heun18": 0.9863, "generator": 0.98114},
    "seconds_per_image": {"teacher_heun18": 0.00702, "generator": 0.0002},
}
PICTURES = {
    "Teacher, 18 steps": png_bytes(np.full((4, 6), 10, np.uint8)),
    "Teacher, one step": np.full((4, 6, 3), 20, np.uint8),
    "Something else": np.full((4, 6, 1), 30, np.uint8),
}
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Text, attributes and table of a page; fails where a tag is not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.texts, self.rows = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append([])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1].append(data)

    def values(self, name):
        return [attributes[name] for _, attributes in self.tags if name in attributes]


def report(folder, results=RESULTS, pictures=PICTURES, curves=None, command="run", machine="here"):
    path = write_report(folder, results, pictures, curves or {}, command, machine)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    return Page(text), text


def test_table_holds_the_numbers(tmp_path):
    page, _ = report(tmp_path)
    assert page.rows == [
        [["Model"], ["Fréchet distance"], ["Class agreement"], ["Time per image"]],
        [["Teacher, 18 steps", "35 evaluations"], ["0.0800"], ["98.6%"], ["7.0 ms"]],
        [
            ["Teacher, one step", "1 evaluation"],
            ["4.50", "56× the teacher’s"],
            ["–"],
            ["–"],
        ],
        [
            ["Generator, one step", "1 evaluation"],
            ["0.130", "1.6× the teacher’s"],
            ["98.1%"],
            ["0.20 ms", "35× as fast"],
        ],
    ]


def test_the_summary_says_both_sides(tmp_path):
    page, _ = report(tmp_path)
    text = " ".join("".join(page.texts).split())
    assert "35× as fast, at 1.6× the teacher’s Fréchet distance to the real digits." in text


def test_pictures_are_embedded_whole_and_in_order(tmp_path):
    page, text = report(tmp_path)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [image["alt"] for image in images] == [f"{caption}: samples" for caption in PICTURES]
    for image, picture in zip(images, PICTURES.values(), strict=True):
        kind, _, content = image["src"].partition(",")
        assert kind == "data:image/png;base64"
        png = picture if isinstance(picture, bytes) else png_bytes(picture)
        assert base64.b64decode(content) == png
    captions = re.findall("<figcaption>(.*)</figcaption>", text)
    assert captions == [
        "Teacher, 18 steps <small>35 evaluations</small>",
        "Teacher, one step <small>1 evaluation</small>",
        "Something else",
    ]


def test_nothing_is_loaded_from_outside(tmp_path):
    page, text = report(tmp_path, curves={"loss": ([0, 1], [1.0, 0.5])})
    assert all(source.startswith("data:") for source in page.values("src"))
    assert page.values("href") == []
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert re.search(r"url\(|@import|https?://", text) is None


def test_light_and_dark_and_narrow_are_cared_for(tmp_path):
    page, text = report(tmp_path)
    metas = {attributes.get("name"): attributes for tag, attributes in page.tags if tag == "meta"}
    assert metas["color-scheme"]["content"] == "light dark"
    assert metas["viewport"]["content"] == "width=device-width, initial-scale=1"
    assert "@media (prefers-color-scheme: dark)" in text


def test_text_from_outside_is_escaped(tmp_path):
    nasty = "<script>alert('x')</script> & \"quotes\""
    page, text = report(
        tmp_path,
        pictures={nasty: np.zeros((2, 2), np.uint8)},
        curves={nasty: ([0], [1.0])},
        command=nasty,
        machine=nasty,
    )
    assert "script" not in [tag for tag, _ in page.tags]
    assert "<script" not in text.lower()
    # The command, the machine, the captions of the curve and of the picture.
    assert sum(nasty in part for part in page.texts) == 4
    assert f"{nasty} over steps" in page.values("aria-label")


@pytest.mark.parametrize("results", [{}, {"fd": {"generator": 0.5}}])
def test_what_was_not_measured_shows_as_a_dash(tmp_path, results):
    page, _ = report(tmp_path, results=results, pictures={})
    cells = [cell for row in page.rows[1:] for cell in row[1:]]
    assert cells.count(["–"]) == 9 - len(results)
    assert "as fast" not in "".join(page.texts)


def test_a_report_is_replaced_as_a_whole(tmp_path):
    report(tmp_path)
    report(tmp_path, command="another")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
