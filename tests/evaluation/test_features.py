"""Raw pixels, and feature functions of the user's own."""

import numpy as np
import pytest

from dmd_jax.errors import UserError
from dmd_jax.evaluation.features import feature_extractor

IMAGES = np.arange(2 * 2 * 3 * 1, dtype=np.float32).reshape(2, 2, 3, 1)

PLUG = """
import numpy as np

def mean_and_peak(images):
    assert images.dtype == np.float32
    flat = images.reshape(len(images), -1).astype(np.float64)
    return np.stack([flat.mean(1), flat.max(1)], 1)

def one_row(images):
    return np.zeros((1, 4))

def no_matrix(images):
    return np.zeros(len(images))

def words(images):
    return [["a", "b"]] * len(images)

constant = 3
"""


@pytest.fixture
def plug(tmp_path, monkeypatch):
    (tmp_path / "own_features.py").write_text(PLUG)
    (tmp_path / "broken_features.py").write_text("raise RuntimeError('no weights here')")
    monkeypatch.syspath_prepend(tmp_path)


def test_pixels_are_the_flattened_images():
    features = feature_extractor("pixels")(IMAGES)
    np.testing.assert_array_equal(features, [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]])
    assert features.dtype == np.float32


def test_a_function_of_the_users_own_is_imported(plug):
    features = feature_extractor("own_features:mean_and_peak")(IMAGES)
    np.testing.assert_array_equal(features, [[2.5, 5.0], [8.5, 11.0]])
    assert features.dtype == np.float64


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inception", 'features "inception": unknown, expected "pixels" or'),
        ("", 'features "": unknown'),
        (":function", "unknown"),
        ("module:", "unknown"),
        ("no_such_module:f", "no_such_module cannot be imported .ModuleNotFoundError"),
        ("broken_features:f", "cannot be imported .RuntimeError: no weights here"),
        ("own_features:missing", 'own_features has no function "missing"'),
        ("own_features:constant", 'no function "constant"'),
    ],
)
def test_a_name_that_leads_to_no_function_is_refused(plug, name, message):
    with pytest.raises(UserError, match=message):
        feature_extractor(name)


@pytest.mark.parametrize(
    ("function", "shape"),
    [("one_row", r"\(1, 4\)"), ("no_matrix", r"\(2,\)"), ("words", r"\(2, 2\)")],
)
def test_features_of_another_shape_are_refused(plug, function, shape):
    extract = feature_extractor(f"own_features:{function}")
    with pytest.raises(UserError, match=rf"{function}.*shape {shape}.*for 2 images"):
        extract(IMAGES)
