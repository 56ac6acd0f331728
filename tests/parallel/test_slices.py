"""Meshes over several TPU slices: data between them, fsdp inside of each."""

import json
import subprocess
import sys
from dataclasses import dataclass

import jax
import numpy as np
import pytest

from dmd_jax.errors import UserError
from dmd_jax.parallel.sharding import make_mesh


@dataclass(frozen=True)
class Chip:
    """A device as JAX describes it."""

    id: int
    platform: str
    device_kind: str
    coords: tuple[int, int, int]
    core_on_chip: int
    process_index: int
    slice_index: int


def devices(slices, side=4, platform="tpu"):
    """As many v5e slices of side x side chips, four chips a host."""
    chips = [(number, x, y) for number in range(slices) for y in range(side) for x in range(side)]
    return [
        Chip(
            id=100_000 * (number + 1) + x + side * y,
            platform=platform,
            device_kind="TPU v5 lite" if platform == "tpu" else "NVIDIA H100",
            coords=(x, y, 0),
            core_on_chip=0,
            process_index=number * side * side // 4 + y // 2 * side // 2 + x // 2,
            slice_index=number,
        )
        for number, x, y in chips
    ]


@pytest.mark.parametrize("sizes", [(-1, 8), (2, 16), (32, 1), (4, 8)])
def test_data_runs_over_the_slices_and_fsdp_stays_inside(sizes):
    mesh = make_mesh(*sizes, devices=devices(2))
    assert mesh.devices.size == len({chip.id for chip in mesh.devices.flat}) == 32
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    # One slice in each row of the data axis, the first half of the rows in slice 0.
    rows = slices.reshape(mesh.shape["data"], -1)
    assert (rows == rows[:, :1]).all()
    assert rows[:, 0].tolist() == sorted(rows[:, 0].tolist())


def test_fsdp_runs_along_neighbours():
    mesh = make_mesh(8, 4, devices=devices(2))
    for row in mesh.devices.reshape(8, 4):
        chips = np.array([chip.coords[:2] for chip in row])
        # Four chips in a line of the torus, in its order.
        assert np.abs(np.diff(chips, axis=0)).sum(axis=1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("sizes", [(1, 32), (3, -1)])
def test_an_fsdp_that_would_leave_its_slice_is_refused(sizes):
    with pytest.raises(UserError, match="mesh data="):
        make_mesh(*sizes, devices=devices(2))
    with pytest.raises(UserError, match="data=1 over 2 slices; expected a multiple of 2"):
        make_mesh(1, 32, devices=devices(2))


def test_gpu_hosts_may_share_an_axis():
    found = make_mesh(1, -1, devices=devices(2, platform="gpu")).devices.reshape(-1)
    assert [chip.id for chip in found] == [chip.id for chip in devices(2)]
    rows = make_mesh(4, 8, devices=devices(2, platform="gpu")).devices.reshape(4, 8)
    assert [{chip.slice_index for chip in row} for row in rows] == [{0}, {0}, {1}, {1}]


def test_devices_without_slices_are_laid_out_in_their_order():
    found = make_mesh(2, 4).devices
    assert found.flatten().tolist() == jax.devices()


@pytest.mark.tpu
def test_the_slices_of_the_tpu_compiler_are_laid_out_alike():
    script = """if True:
        import json
        from dmd_jax.performance.compilation.topology import devices_of
        from dmd_jax.parallel.sharding import make_mesh
        mesh = make_mesh(4, 8, devices=devices_of("v5e:4x4", 2))
        rows = mesh.devices.reshape(4, 8)
        print(json.dumps([[[chip.slice_index, *chip.coords] for chip in row] for row in rows]))
    """
    output = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    rows = make_mesh(4, 8, devices=devices(2)).devices.reshape(4, 8)
    expected = [[[chip.slice_index, *chip.coords] for chip in row] for row in rows]
    assert json.loads(output.splitlines()[-1]) == expected
