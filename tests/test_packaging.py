"""The wheel, what it asks for, and the pins."""

import ast
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dmd_jax"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the checkout, as building leaves files beside setup.py."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("dmd_jax", "configs", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "dmd_jax" / "assets" / "a" / "b").mkdir(parents=True)
    (source / "dmd_jax" / "assets" / "a" / "b" / "probe.safetensors").write_bytes(b"weights")
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(out), str(source)], check=True)
    (path,) = out.iterdir()
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel):
    return Parser().parsestr(wheel.read("dmd_jax-0.1.0.dist-info/METADATA").decode())


def required(metadata) -> dict[str, list[Requirement]]:
    """Requirements by extra; those of everybody under ""."""
    found = {"": []}
    for extra in metadata.get_all("Provides-Extra"):
        found[extra] = []
    for line in metadata.get_all("Requires-Dist"):
        requirement = Requirement(line)
        extras = [
            extra
            for extra in found
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        ]
        found[extras[0]].append(requirement)
    return found


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    entries = [line for line in lines if line and not line.startswith("#")]
    assert all(line.count("==") == 1 for line in entries), "every line is NAME==VERSION"
    found = {canonicalize_name(name): version for name, version in map(pin_parts, entries)}
    assert len(found) == len(entries), "no name twice"
    return found


def pin_parts(line: str) -> tuple[str, str]:
    requirement = Requirement(line)
    assert requirement.url is None
    (specifier,) = requirement.specifier
    return requirement.name, specifier.version


def imported_distributions(root: Path) -> set[str]:
    """The distributions that the modules below `root` import anywhere, by canonical name."""
    names = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module)
    modules = {name.partition(".")[0] for name in names}
    modules -= set(sys.stdlib_module_names) | {"dmd_jax"}
    known = packages_distributions()
    # PyTorch need not be there.
    return {canonicalize_name(known.get(module, [module])[0]) for module in modules}


def test_wheel_holds_the_package_its_data_and_the_configs(wheel):
    names = set(wheel.namelist())
    modules = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    assert {name for name in names if name.endswith(".py") and ".data" not in name} == modules
    assert "dmd_jax/assets/a/b/probe.safetensors" in names
    for path in (PACKAGE / "assets").rglob("*"):
        assert path.is_dir() or str(path.relative_to(ROOT)) in names
    for path in (ROOT / "configs").rglob("*.py"):
        name = path.relative_to(ROOT / "configs")
        assert f"dmd_jax-0.1.0.data/data/share/dmd_jax/configs/{name}" in names
    assert "dmd_jax-0.1.0.dist-info/licenses/LICENSE" in names


def test_wheel_metadata(wheel, metadata):
    assert (metadata["Name"], metadata["Version"]) == ("dmd_jax", "0.1.0")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    scripts = wheel.read("dmd_jax-0.1.0.dist-info/entry_points.txt").decode()
    assert scripts.split("\n")[:2] == ["[console_scripts]", "dmd-jax = dmd_jax.commands.cli:main"]


def test_what_is_imported_is_what_is_required(metadata):
    requirements = required(metadata)
    names = {
        canonicalize_name(requirement.name)
        for extra in ("", "gcs", "text", "tfds")
        for requirement in requirements[extra]
    }
    assert imported_distributions(PACKAGE) == names
    torch = {canonicalize_name(requirement.name) for requirement in requirements["torch"]}
    assert imported_distributions(ROOT / "tests" / "torch_peer") <= names | torch


def test_pins_satisfy_what_is_required(metadata):
    requirements = required(metadata)
    pinned = pins("requirements.txt")
    oracle = pins("tests/requirements-torch.txt")
    for extra in ("", "gcs", "lpips", "text", "tfds", "test"):
        for requirement in requirements[extra]:
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])
    for requirement in requirements["torch"]:
        pin = (pinned | oracle)[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin)
    assert not pinned.keys() & oracle.keys()


def test_torch_is_the_release_without_cuda():
    # The exact line matters: a range or a later release installs gigabytes.
    assert "torch==2.13.0" in (ROOT / "tests" / "requirements-torch.txt").read_text().split("\n")
    assert not {"torch", "torchvision"} & pins("requirements.txt").keys()
    assert "torchvision" not in pins("tests/requirements-torch.txt")
