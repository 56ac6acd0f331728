"""The READMEs: links lead somewhere, commands are ones that there are, and the example runs."""

import importlib
import re
import shlex

import pytest
from commands import ROOT

from dmd_jax.commands.cli import COMMANDS, Parser
from dmd_jax.config import load_config

READMES = [
    ROOT / folder / "README.md"
    for folder in (".", "configs", "launch", "dmd_jax", "dmd_jax/performance")
]


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def commands(path):
    """Each `dmd-jax` command of a README's blocks, as the words after it."""
    for block in blocks(path, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.partition(" # ")[0].strip().removesuffix("&")
            if line.startswith("dmd-jax "):
                yield shlex.split(line)[1:]


def heading(text):
    """A heading's name in a link."""
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def test_library_example_trains(capsys):
    (example,) = (block for block in blocks(READMES[0], "python") if "import dmd_jax" in block)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["0", "1", "2", "3", "4"]
    assert 0 < float(names["loss"]) < 100 and float(names["fake_loss"]) > 0
    assert "flax" not in example


def test_the_first_is_short():
    assert len(READMES[0].read_text().splitlines()) <= 220


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    for link in links:
        target, _, place = link.partition("#")
        if target.startswith("http"):
            continue
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), link
        if place:
            headings = re.findall(r"(?m)^#+ (.*)$", found.read_text())
            assert place in [heading(text) for text in headings], link
    assert links or path.parent.name == "launch"


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_ones_that_there_are(path, monkeypatch):
    """Their arguments parse, and their overrides are of keys of the config that they name."""
    monkeypatch.chdir(ROOT)
    found = list(commands(path))
    for name, *arguments in found:
        assert name in COMMANDS
        parser = Parser(prog=name)
        importlib.import_module(f"dmd_jax.commands.{name}").add_arguments(parser)
        arguments = [argument.replace("BUCKET", "bucket") for argument in arguments]
        given, overrides = parser.parse_known_args(arguments)
        if "…" in arguments:
            continue
        if overrides or getattr(given, "config", None):
            config = given.config or "configs/digits.py"
            load_config(config, overrides)
    assert found or path.parent.name == "launch"


def test_every_config_is_of_a_readme():
    text = (ROOT / "configs" / "README.md").read_text()
    for path in (ROOT / "configs").glob("*.py"):
        assert path.name in text or path.stem in text, path
