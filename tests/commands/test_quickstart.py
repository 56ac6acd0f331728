"""The quickstart from end to end on a tiny network: every figure and file that it promises."""

import json

import numpy as np
import pytest
from commands import TINY, succeeds
from PIL import Image

from dmd_jax.commands import quickstart


@pytest.fixture
def small_config(tiny, tmp_path, monkeypatch):
    weights = next(a.partition("=")[2] for a in map(str, tiny) if "teacher.weights=" in a)
    path = tmp_path / "small.py"
    path.write_text(
        "import runpy\n"
        "def get_config():\n"
        f"    config = runpy.run_path({str(TINY)!r})['get_config']()\n"
        f"    config.teacher.weights = {weights!r}\n"
        "    return config\n"
    )
    monkeypatch.setattr(quickstart, "shipped_config", lambda name: path)
    monkeypatch.setattr(quickstart, "NUM_SAMPLES", 80)
    monkeypatch.setattr(quickstart, "TIMED_IMAGES", 80)


def test_quickstart_writes_its_figures_pictures_and_report(small_config, tmp_path, capsys):
    workdir = tmp_path / "run"
    succeeds("quickstart", "--workdir", workdir)
    results = json.loads((workdir / "results.json").read_text())
    assert results["fd"].keys() == {"teacher_heun18", "teacher_one_step", "generator"}
    for name in ("class_agreement", "seconds_per_image"):
        assert results[name].keys() == {"teacher_heun18", "generator"}
    figures = [value for name in ("fd", "seconds_per_image") for value in results[name].values()]
    assert all(np.isfinite(value) and value > 0 for value in figures)
    assert all(0 <= value <= 1 for value in results["class_agreement"].values())
    assert results["command"].startswith("dmd-jax") and "CPU cores" in results["machine"]
    with Image.open(workdir / "samples.png") as picture:
        assert picture.width > 3 * 8 * 32 and picture.height > 10 * 32
    report = (workdir / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 3 and "loss_fake_score" in report
    assert 'src="http' not in report and 'href="http' not in report
    assert "generator, one step" in capsys.readouterr().out
