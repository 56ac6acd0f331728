"""Configs of earlier versions: what goes on, and what is refused by name."""

import json

import pytest
from commands import ROOT, TINY

from dmd_jax.config import (
    flatten,
    lasting,
    load_config,
    resolve_config,
    save_config,
    value_of,
)
from dmd_jax.config.moved import place_of, with_places
from dmd_jax.errors import UserError
from dmd_jax.storage.seals import read_sealed, write_sealed
from dmd_jax.training.loop import _check_same_run


@pytest.fixture
def saved(tmp_path):
    """tensor -> a workdir whose config.json has that config.mesh.tensor."""

    def make(tensor):
        save_config(load_config(str(TINY), []), tmp_path, command="train")
        path = tmp_path / "config.json"
        content, _ = read_sealed(path, "a test's")
        content["config"]["mesh"]["tensor"] = tensor
        write_sealed(path, content)
        return tmp_path

    return make


@pytest.mark.parametrize("path", [None, str(TINY)], ids=["workdir alone", "with its config"])
def test_a_run_of_one_device_along_the_tensor_axis_goes_on(saved, path):
    config = resolve_config(path, ["--config.mesh.fsdp=2"], saved(1), command="train")
    assert config.mesh.to_dict() == {"data": -1, "fsdp": 2}
    assert config.batch_size == load_config(str(TINY), []).batch_size


@pytest.mark.parametrize("path", [None, str(TINY)], ids=["workdir alone", "with its config"])
def test_a_run_of_more_is_refused(saved, path):
    workdir = saved(2)
    message = f"{workdir}/config.json: config.mesh.tensor is 2; expected none, or 1: nothing is"
    with pytest.raises(UserError, match=message):
        resolve_config(path, [], workdir, command="train")


def test_a_config_file_may_say_one_and_no_more(tmp_path):
    path = tmp_path / "mine.py"
    source = (
        "from dmd_jax.config import default_config\n"
        "def get_config(tensor):\n"
        "    config = default_config()\n"
        "    config.mesh.tensor = int(tensor)\n"
        "    return config\n"
    )
    path.write_text(source)
    assert load_config(f"{path}:1", []).mesh.to_dict() == {"data": -1, "fsdp": 1}
    with pytest.raises(UserError, match="mine.py:2: config.mesh.tensor is 2; expected none, or 1"):
        load_config(f"{path}:2", [])
    with pytest.raises(UserError, match="the config has no key mesh.tensor"):
        load_config(str(TINY), ["--config.mesh.tensor=1"])


# The shipped configs by their dotted keys as they were before a config had parts.
FORMER = json.loads((ROOT / "tests" / "golden" / "configs_without_parts.json").read_text())
# What configs could not say then, and its value.
SILENT = {
    "objective.name": "dmd",
    "objective.use_fake_score": True,
    "teaching.optimizer.beta1": 0.9,
    "teaching.optimizer.beta2": 0.999,
    "teaching.optimizer.warmup_counts": "updates",
    "teaching.preview_steps": 18,
    "toy": None,
}


@pytest.mark.parametrize("name", FORMER)
def test_a_config_without_parts_says_what_the_one_with_parts_says(name):
    found = flatten(load_config(str(ROOT / "configs" / f"{name}.py"), []).to_dict())
    del found["teacher.weights"]  # a path of the machine
    former = with_places(FORMER[name])
    silent = {key: value for key, value in SILENT.items() if key in found}
    assert found == former | silent
    assert with_places(found) == found


def test_a_run_of_a_config_without_parts_goes_on(tmp_path):
    saved = {}
    for key, value in (FORMER["sd15_laion6"] | {"teacher.weights": "there"}).items():
        *parts, last = key.split(".")
        inner = saved
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[last] = value
    content = {"schema": 1, "command": "train", "config": saved}
    write_sealed(tmp_path / "config.json", content)
    config = resolve_config(None, ["--config.log_every=7"], tmp_path, command="train")
    expected = load_config(str(ROOT / "configs" / "sd15_laion6.py"), [])
    expected.log_every, expected.teacher.weights = 7, "there"
    assert flatten(config.to_dict()) == flatten(expected.to_dict())


def other(value):
    """A value of the same type that no config has."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return {"updates": "steps", "in_step": "ahead", "taesd": "vae"}.get(value, "elsewhere")
    return value / 2 + 0.001 if isinstance(value, float) else value + 3


MOVED = {
    key: other(value)
    for config in FORMER.values()
    for key, value in config.items()
    # What the distance and the weighting may be is not free, and a network's options are its own.
    if place_of(key) and not key.startswith(("text.text_encoder", "text.taesd", "text.vae"))
} | {"distance": "lpips", "weighting": "sigma_over_alpha", "ema_decay": 0.5}


@pytest.mark.parametrize("key", sorted(MOVED))
def test_an_override_that_has_moved_is_taken_at_its_place_and_said(key, capsys):
    override = f"--config.{key}={MOVED[key]}"
    path = str(ROOT / "configs" / "toy2d.py")
    before, config = load_config(path, []), load_config(path, [override])
    places = with_places({key: MOVED[key]})
    assert {place: value_of(config, place) for place in places} == places
    assert not places.items() <= flatten(before.to_dict()).items()
    said = " ".join(f"--config.{place}={value}" for place, value in places.items())
    assert capsys.readouterr().err == f"dmd-jax: {override} has moved: it is {said}\n"


def test_a_checkpoint_of_a_config_without_parts_is_of_the_run(tmp_path):
    """Its position has the config by the keys of then, without those that could change."""
    config = load_config(str(ROOT / "configs" / "digits.py"), [])
    recorded = {
        key: value
        for key, value in FORMER["digits"].items()
        if all(place in lasting(config) for place in with_places({key: value}))
    }
    assert "learning_rate" in recorded and "log_every" not in recorded
    position = {"identity": {}, "config": recorded}
    _check_same_run(position, {}, config, tmp_path)
    with pytest.raises(UserError, match=r"optimizer.generator.beta1 is 0.8 there, 0.9 here"):
        _check_same_run(position | {"config": recorded | {"beta1": 0.8}}, {}, config, tmp_path)


def test_a_damaged_list_of_stages_stays_as_it_is():
    for stages in (3, None, [3], ["ab"], [[1]], [{"until": 2, "max_index": 7}]):
        found = with_places({"stages": stages})["stages"]
        assert found == stages or found == [{"until": 2, "objective.max_index": 7}]


def test_a_file_that_sets_moved_keys_learns_of_all_places(tmp_path):
    path = tmp_path / "mine.py"
    lines = ("config.images = 'digits'", "config.learning_rate = 1e-3", "config.beta1 = 0.0")
    path.write_text(
        "from dmd_jax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        + "".join(f"    {line}\n" for line in lines)
        + "    return config\n"
    )
    with pytest.raises(UserError) as caught:
        load_config(str(path), [])
    assert str(caught.value) == (
        f"--config {path}: beta1 has moved: it is config.optimizer.generator.beta1 and "
        "config.optimizer.fake_score.beta1; images has moved: it is config.data.images; "
        "learning_rate has moved: it is config.optimizer.generator.learning_rate"
    )
    path.write_text(
        "from dmd_jax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.text.prompts = 'there'\n"
    )
    with pytest.raises(UserError, match="config.text has moved: it is in config.teacher and"):
        load_config(str(path), [])
