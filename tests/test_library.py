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
