import pytest

from megatron_lite.plan.devices import PEAKS, dense_peak_flops

# What the datasheets print for sparse tensor cores; taking one of these halves every MFU.
SPARSE = {"H100": 1979, "H200": 1979, "H100 PCIe": 1513, "H100 NVL": 1671, "A100": 624, "L4": 242, "L40S": 733,
          "B200": 4500, "GB200": 5000, "A10G": 140, "RTX 3090": 142, "RTX 4090": 330.3, "RTX 5090": 419}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "fp16", 835.5),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-40GB", "fp32", 19.5),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("Tesla V100-PCIE-16GB", "fp16", 112),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_known_devices(name, dtype, teraflops):
    assert dense_peak_flops(name, dtype) == pytest.approx(teraflops * 1e12)


def test_tf32_only_where_it_is_allowed():
    assert dense_peak_flops("NVIDIA A100-SXM4-80GB", "fp32", allow_tf32=True) == 156e12
    assert dense_peak_flops("Tesla V100-SXM2-32GB", "fp32", allow_tf32=True) == 15.7e12


@pytest.mark.parametrize(
    "name",
    ["", "cpu", "NVIDIA L40", "NVIDIA A10", "NVIDIA H800", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA H100L",
     "NVIDIA GeForce RTX 5090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 D"],
)  # fmt: skip
def test_other_devices_are_not_guessed(name):
    assert dense_peak_flops(name, "bf16") is None


def test_a_mode_the_device_lacks_has_no_peak():
    assert dense_peak_flops("Tesla V100-SXM2-32GB", "bf16") is None


@pytest.mark.parametrize("name", SPARSE)
def test_no_peak_is_the_sparse_figure(name):
    assert PEAKS[name].bf16 == pytest.approx(SPARSE[name] / 2, rel=0.02)
