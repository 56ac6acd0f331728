"""What `import dmd_jax` gives, and what it does not cost."""

import ast
import subprocess
import sys

import pytest

import dmd_jax

HEAVY = ("flax", "orbax", "tensorstore", "grain", "transformers", "diffusers", "ml_collections")


def imported_by(statement):
    """The HEAVY packages that a fresh Python has after a statement."""
    code = f"import sys\n{statement}\nprint([name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ast.literal_eval(run.stdout)


def test_every_public_name_is_there_and_no_other():
    assert len(set(dmd_jax.__all__)) == len(dmd_jax.__all__) >= 27
    for name in dmd_jax.__all__:
        assert callable(getattr(dmd_jax, name)), name
    assert set(dmd_jax.__all__) <= set(dir(dmd_jax))
    with pytest.raises(AttributeError, match="has no attribute 'generator'"):
        _ = dmd_jax.generator


def test_the_library_imports_no_framework():
    assert imported_by("import flax") == ["flax"]  # so it would be seen
    assert imported_by("import dmd_jax\nassert 'jax' not in sys.modules") == []
    assert imported_by("from dmd_jax import *") == []


def test_modules_are_found_by_their_former_names_with_a_warning():
    program = (
        "import sys, warnings\n"
        "warnings.simplefilter('error')\n"
        "import dmd_jax\n"
        "warnings.simplefilter('always')\n"
        "from dmd_jax.former import _PLACES\n"
        "from importlib import import_module\n"
        "for name, place in _PLACES.items():\n"
        "    with warnings.catch_warnings(record=True) as caught:\n"
        "        former = import_module(f'dmd_jax.{name}')\n"
        "    found = [str(w.message) for w in caught if w.category is DeprecationWarning]\n"
        "    assert f'dmd_jax.{name} is dmd_jax.{place}' in found, found\n"
        "    today = vars(import_module(f'dmd_jax.{place}'))\n"
        "    names = [key for key in today if not key.startswith('__')]\n"
        "    assert names and all(getattr(former, key) is today[key] for key in names)\n"
        "from dmd_jax.weights import packaged\n"
        "try: import dmd_jax.no_such\n"
        "except ModuleNotFoundError: print('done')\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "done\n", run.stderr
