import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dmd_jax.errors import UserError
from dmd_jax.parallel.sharding import make_mesh
from dmd_jax.performance.benchmark.random_arrays import in_host_memory, random_batch, random_weights


def test_weights_are_of_ordinary_size_and_where_they_belong():
    mesh = make_mesh(fsdp=2, data=4)
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())

    def leaf(shape, sharding=whole):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    abstract = {
        "a": {"kernel": leaf((400, 64), split), "bias": leaf((64,)), "scale": leaf((8,))},
        "b": {"kernel": leaf((400, 64), split)},
    }
    found = random_weights(abstract)
    kernel = found["a"]["kernel"]
    assert kernel.sharding == split
    np.testing.assert_allclose(np.std(kernel), 1 / 20, rtol=0.05)
    np.testing.assert_array_equal(found["a"]["bias"], 0)
    np.testing.assert_array_equal(found["a"]["scale"], 1)
    assert not np.any(np.asarray(kernel) == np.asarray(found["b"]["kernel"]))
    jax.tree.map(np.testing.assert_array_equal, found, random_weights(abstract))


def test_the_same_weights_in_the_hosts_memory(monkeypatch):
    split = NamedSharding(make_mesh(), PartitionSpec("data"))
    abstract = {"kernel": jax.ShapeDtypeStruct((400, 64), jnp.float32, sharding=split)}
    kernel = random_weights(in_host_memory(abstract))["kernel"]
    assert kernel.devices() == {jax.devices("cpu")[0]}
    np.testing.assert_array_equal(kernel, random_weights(abstract)["kernel"])

    def without_cpu(platform):
        raise RuntimeError(f"Unknown backend {platform}")

    monkeypatch.setattr(jax, "devices", without_cpu)
    with pytest.raises(UserError, match="leaves out the CPU; expected JAX_PLATFORMS=.*,cpu"):
        in_host_memory(abstract)


def test_batch():
    sharding = NamedSharding(make_mesh(), PartitionSpec("data"))
    abstract = {
        "z_ref": jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=sharding),
        "label": jax.ShapeDtypeStruct((64,), jnp.int32, sharding=sharding),
    }
    found = random_batch(abstract, {"label": 3})
    assert set(np.asarray(found["label"])) == {0, 1, 2}
    assert found["label"].dtype == jnp.int32
    np.testing.assert_allclose(np.std(found["z_ref"]), 1, rtol=0.05)
    assert found["z_ref"].sharding == found["label"].sharding == sharding
