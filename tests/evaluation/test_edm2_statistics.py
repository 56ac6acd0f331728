"""EDM2's .pkl of reference statistics: read, never run, and refused by name."""

import pickle

import numpy as np
import pytest

from dmd_jax.errors import UserError
from dmd_jax.evaluation.features import Features
from dmd_jax.evaluation.reference import open_reference

SHAPE = (8, 8, 3)


def features(name="inception", preprocessing="tensorflow"):
    return Features(name, None, None, lambda shape: 4, {"preprocessing": preprocessing})


def moments(dimensions, seed=0):
    root = np.random.default_rng(seed).standard_normal((dimensions, dimensions))
    return {"mu": np.arange(dimensions) / 7, "sigma": root @ root.T}


def write(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol))
    return str(path)


def opened(path, *given):
    return open_reference(path, SHAPE, list(given) or [features()])


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("count", [None, 50_000])
def test_statistics_are_those_of_the_pickle(tmp_path, protocol, count):
    content = {"fid": moments(4), "fd_dinov2": moments(6, seed=1)}
    content |= {} if count is None else {"num_images": count}
    found = opened(write(tmp_path / "img512.pkl", content, protocol))
    assert found.images is None and found.count == count
    np.testing.assert_array_equal(found.statistics.mean, content["fid"]["mu"])
    np.testing.assert_array_equal(found.statistics.covariance, content["fid"]["sigma"])


def test_features_it_does_not_hold_are_refused(tmp_path):
    path = write(tmp_path / "r.pkl", {"fid": moments(4), "fd_dinov2": moments(6)})
    with pytest.raises(UserError, match=r"r\.pkl holds fid, fd_dinov2, but no statistics of vgg16"):
        opened(path, features("vgg16"))
    with pytest.raises(UserError, match="of NVIDIA's detector; expected --protocol edm, or .*te"):
        opened(path, features(preprocessing="pytorch_fid"))
    path = write(tmp_path / "d.pkl", {"fd_dinov2": moments(6)})
    with pytest.raises(UserError, match=r"d\.pkl holds fd_dinov2; expected fid"):
        opened(path)
    with pytest.raises(UserError, match="--num-reference 9: .* holds no images"):
        open_reference(path, SHAPE, [features()], 9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds a list; expected EDM2's dict"),
        ({}, "holds nothing; expected fid"),
        ({"fid": 3}, "fid has no array mu"),
        ({"fid": {"mu": np.zeros(4)}}, "fid has no array sigma"),
        ({"fid": {"mu": [0.0] * 4, "sigma": np.eye(4)}}, "fid has no array mu"),
        ({"fid": moments(5)}, r"another dimension: mu \(5,\)"),
        ({"fid": moments(4) | {"mu": np.full(4, np.nan)}}, "not finite"),
        ({"fid": moments(4) | {"mu": np.zeros(4, bool)}}, "mu is bool, expected floating point"),
        ({"fid": moments(4) | {"sigma": np.triu(np.ones((4, 4)))}}, "sigma is not symmetric"),
        ({"fid": moments(4), "num_images": "many"}, "num_images is many; expected a whole"),
        ({"fid": moments(4), "num_images": 0}, "count is 0"),
    ],
)
def test_statistics_that_are_none_are_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        opened(write(tmp_path / "r.pkl", content))


class Hostile:
    """A pickle of it makes a file where it is run."""

    def __init__(self, victim):
        self.victim = str(victim)

    def __reduce__(self):
        return open, (self.victim, "w")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_that_calls_is_refused_and_calls_nothing(tmp_path, protocol):
    victim = tmp_path / "victim"
    content = {"fid": moments(4) if protocol > 2 else {}, "more": Hostile(victim)}
    path = write(tmp_path / "r.pkl", content, protocol)
    with pytest.raises(UserError, match=r"asks for _?io\.open, .*; nothing was run"):
        opened(path)
    assert not victim.exists()
    pickle.loads((tmp_path / "r.pkl").read_bytes())["more"].close()
    assert victim.exists()  # plain pickle would have run it


def test_files_that_are_no_pickles_are_refused(tmp_path):
    path = tmp_path / "r.pkl"
    whole = pickle.dumps({"fid": moments(4)}, 4)
    for content, message in (
        (b"", "is empty; expected EDM2's statistics"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (whole[:-20], "not a whole pickle"),
        (b"PK\x03\x04" + whole, "not a whole pickle"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"r\.pkl: {message}"):
            opened(str(path))
    (tmp_path / "folder.pkl").mkdir()
    for name, message in (("folder", "is a folder"), ("missing", "no such file")):
        with pytest.raises(UserError, match=rf"{name}\.pkl: {message}"):
            opened(str(tmp_path / f"{name}.pkl"))


def test_the_home_folder_is_found(tmp_path, monkeypatch):
    """Of both kinds of statistics: ~ stays as it is after an = in a shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "r.pkl", {"fid": moments(4)})
    np.savez(tmp_path / "r.npz", **moments(4))
    for name in ("r.pkl", "r.npz"):
        assert opened(f"~/{name}").statistics.mean.size == 4
