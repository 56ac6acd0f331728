"""The package's rooms: who may import whom, and how large files and functions may be."""

import ast
import sys
from pathlib import Path

import pytest
from commands import ROOT

PACKAGE = ROOT / "dmd_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
# A room imports from those after it alone.
ORDER = (
    *("commands", "performance", "convert", "distillation", "evaluation", "training", "sampling"),
    *("data", "config", "reporting", "objectives", "teachers", "storage", "models", "method"),
    *("parallel", "options", "progress", "errors", "former"),
)
# Public functions of the method, whose knobs are the method's.
MANY_ARGUMENTS = {
    *("method/samplers.py:heun", "method/samplers.py:euler"),
    *(f"method/discrete_samplers.py:{name}" for name in ("ddim", "pndm", "dpm_solver_pp", "unipc")),
    "objectives/matching.py:generator_loss",
}


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it, without "dmd_jax."."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        assert getattr(node, "level", 0) == 0, f"{path}: a relative import"
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "dmd_jax":
            inner = node.module.removeprefix("dmd_jax").removeprefix(".")
            found |= {inner} if inner else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            found |= {name.removeprefix("dmd_jax.") for name in names if "dmd_jax." in name}
    return found


def test_imports_run_one_way():
    others = {"README.md", "py.typed", "__pycache__", "assets"}
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()} - others
    assert rooms == {*ORDER, "__init__", "__main__"}
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for path in FILES
        if (room := path.relative_to(PACKAGE).parts[0].removesuffix(".py")) in ORDER
        for module in imported(path)
        if (other := module.partition(".")[0]) != room and ORDER.index(other) <= ORDER.index(room)
    ]
    assert wrong == []


@pytest.mark.parametrize("room", ["method", "options", "errors"])
def test_the_method_needs_jax_and_numpy_alone(room):
    taken = {"jax", "numpy", "dmd_jax"}
    for path in FILES:
        if path.relative_to(PACKAGE).parts[0].removesuffix(".py") == room:
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module]
                foreign = {name.partition(".")[0] for name in names} - taken
                assert foreign <= sys.stdlib_module_names, f"{path}: {foreign}"


def test_the_top_is_small():
    assert len(list(PACKAGE.glob("*.py"))) <= 6
    assert len([path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]) <= 17


def test_files_and_functions_are_small():
    wrong = []
    for path in FILES:
        name, text = path.relative_to(PACKAGE).as_posix(), path.read_text()
        if len(text.splitlines()) > 400:
            wrong.append(f"{name} has {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = node.end_lineno - node.lineno + 1
            taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([one for one in taken if one.arg not in ("self", "cls")])
            if lines > 80:
                wrong.append(f"{name}:{node.name} has {lines} lines")
            if count > 8 and f"{name}:{node.name}" not in MANY_ARGUMENTS:
                wrong.append(f"{name}:{node.name} takes {count} arguments")
    assert wrong == []
