"""Configs of earlier versions: what goes on, and what is refused by name."""

import pytest
from commands import TINY

from dmd_jax.config import load_config, resolve_config, save_config
from dmd_jax.errors import UserError
from dmd_jax.seals import read_sealed, write_sealed


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
