import pytest

from dmd_jax.performance.benchmark.peaks import peak_flops


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
    ],
)
def test_known_devices(kind, teraflops):
    assert peak_flops(kind) == teraflops * 1e12


def test_unknown_devices_have_none():
    assert [peak_flops(kind) for kind in ("cpu", "NVIDIA L400", "TPU v99", "")] == [None] * 4
