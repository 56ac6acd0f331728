"""The README's library example runs as it is printed."""

import re

from commands import ROOT


def test_library_example_trains(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = (block for block in blocks if "import dmd_jax" in block)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["0", "1", "2", "3", "4"]
    assert 0 < float(names["loss"]) < 100 and float(names["fake_loss"]) > 0
    assert "flax" not in example
