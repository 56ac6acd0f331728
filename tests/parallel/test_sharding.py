"""Meshes and rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dmd_jax.errors import UserError
from dmd_jax.parallel import sharding


def spec_of(shape, mesh, rules=sharding.DEFAULT_RULES):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    return sharding.infer_shardings({"block": {"kernel": leaf}}, mesh, rules)["block"][
        "kernel"
    ].spec


def test_fsdp_takes_the_largest_dimension_that_divides():
    mesh = sharding.make_mesh(2, 4)
    assert spec_of((3, 3, 64, 128), mesh) == PartitionSpec(None, None, None, "fsdp")
    assert spec_of((3, 3, 64, 130), mesh) == PartitionSpec(None, None, "fsdp")
    assert spec_of((4096,), mesh) == PartitionSpec("fsdp")
    assert spec_of((1027, 3), mesh) == PartitionSpec()
    assert spec_of((16, 16), mesh) == PartitionSpec()
    assert spec_of((4096,), sharding.make_mesh(8, 1)) == PartitionSpec()


def test_the_first_rule_that_matches_decides():
    mesh = sharding.make_mesh(1, 8)
    rules = (("block/kernel", "replicate"), (".*", "fsdp"))
    assert spec_of((4096,), mesh, rules) == PartitionSpec()
    with pytest.raises(UserError, match="block/kernel is 'zero'"):
        spec_of((4096,), mesh, (("kernel", "zero"),))


def test_mesh_takes_the_devices_left():
    assert dict(sharding.make_mesh(-1, 4).shape) == {"data": 2, "fsdp": 4}
    assert dict(sharding.make_mesh(1, -1).shape) == {"data": 1, "fsdp": 8}


@pytest.mark.parametrize("sizes", [(3, 1), (-1, 3), (-1, -1), (0, 8), (-1, 16)])
def test_mesh_that_does_not_fit_the_devices_is_refused(sizes):
    with pytest.raises(UserError, match="mesh data="):
        sharding.make_mesh(*sizes)


def test_batch_that_does_not_divide_is_refused():
    mesh = sharding.make_mesh(2, 4)
    sharding.check_batch_size(16, mesh, accumulation=2, name="config.batch_size")
    with pytest.raises(UserError, match="config.batch_size=12 does not divide over 8 devices"):
        sharding.check_batch_size(12, mesh, name="config.batch_size")
    with pytest.raises(UserError, match="expected a multiple of 16"):
        sharding.check_batch_size(8, mesh, accumulation=2, name="config.batch_size")


def test_rows_are_over_all_devices_or_over_data_alone():
    mesh = sharding.make_mesh(2, 4)
    assert sharding.rows_sharding(mesh, 16).spec == PartitionSpec(("data", "fsdp"))
    assert sharding.rows_sharding(mesh, 12).spec == PartitionSpec("data")
    rows = {"z_ref": np.arange(24.0).reshape(12, 2), "label": np.arange(16)}
    whole = sharding.on_rows(rows, mesh)
    for name, expected in rows.items():
        np.testing.assert_array_equal(sharding.own_rows(mesh, len(expected)), range(len(expected)))
        joined = sharding.to_mesh(rows, whole)[name]
        assert joined.sharding == whole[name].sharding
        np.testing.assert_array_equal(joined, expected)


def test_a_process_gives_the_rows_of_its_devices(monkeypatch):
    """Of the mesh data=2, fsdp=4: a process with the devices 5 and 4, in that order."""
    mesh = sharding.make_mesh(2, 4)
    own = [mesh.devices.flat[5], mesh.devices.flat[4]]
    monkeypatch.setattr(
        NamedSharding,
        "addressable_devices_indices_map",
        lambda self, shape: {one: self.devices_indices_map(shape)[one] for one in own},
    )
    np.testing.assert_array_equal(sharding.own_rows(mesh, 16), [8, 9, 10, 11])
    np.testing.assert_array_equal(sharding.own_rows(mesh, 12), [6, 7, 8, 9, 10, 11])
