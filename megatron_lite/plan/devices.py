"""Dense peaks of accelerators, for MFU: the makers' datasheet figures without structured sparsity.

NVIDIA's data centre sheets give tensor-core rates with a factor 2 for sparsity; half of them stands
here. GeForce rates are those with fp32 accumulation, as training runs. AMD's MI250X is two devices to
torch, so its sheet is halved too.
"""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class DensePeak:
    """TFLOP/s of one device without sparsity. None: the device has no such mode."""

    fp16: float
    bf16: float | None
    tf32: float | None
    fp32: float


#: By words of torch.cuda.get_device_name(); the first entry whose words stand together in it counts.
PEAKS: dict[str, DensePeak] = {
    "GB200": DensePeak(2500.0, 2500.0, 1250.0, 80.0),
    "B200": DensePeak(2250.0, 2250.0, 1125.0, 75.0),
    "GH200": DensePeak(989.4, 989.4, 494.7, 67.0),
    "H200 NVL": DensePeak(835.5, 835.5, 417.5, 60.0),
    "H200": DensePeak(989.4, 989.4, 494.7, 67.0),
    "H100 NVL": DensePeak(835.5, 835.5, 417.5, 60.0),
    "H100 PCIe": DensePeak(756.0, 756.0, 378.0, 51.0),
    "H100": DensePeak(989.4, 989.4, 494.7, 67.0),
    "A100": DensePeak(312.0, 312.0, 156.0, 19.5),
    "A10G": DensePeak(70.0, 70.0, 35.0, 35.0),
    "L40S": DensePeak(362.05, 362.05, 183.0, 91.6),
    "L4": DensePeak(121.0, 121.0, 60.0, 30.3),
    "V100-PCIE": DensePeak(112.0, None, None, 14.0),
    "V100": DensePeak(125.0, None, None, 15.7),
    "RTX 5090": DensePeak(209.5, 209.5, 104.8, 104.8),
    "RTX 4090": DensePeak(165.2, 165.2, 82.6, 82.6),
    "RTX 3090": DensePeak(71.0, 71.0, 35.6, 35.6),
    "MI300X": DensePeak(1307.4, 1307.4, 653.7, 163.4),
    "MI250X": DensePeak(191.5, 191.5, None, 23.9),
}
#: Cut-down cards and slices of a card that bear a full card's name.
OTHER_CARDS = {"mig", "laptop", "mobile", "ti", "d", "super"}


def dense_peak_flops(
    device_name: str, dtype: Literal["fp32", "bf16", "fp16"], *, allow_tf32: bool = False
) -> float | None:
    """The dense peak of one device in FLOP/s; None for a device or mode that is not known.

    `device_name` is torch's. fp32 is the plain rate unless `allow_tf32`.
    """
    words = _words(device_name)
    if OTHER_CARDS & set(words):
        return None
    for name, peak in PEAKS.items():
        part = _words(name)
        if any(words[i : i + len(part)] == part for i in range(len(words))):
            fp32 = peak.tf32 if allow_tf32 and peak.tf32 else peak.fp32
            rate = {"bf16": peak.bf16, "fp16": peak.fp16, "fp32": fp32}[dtype]
            return None if rate is None else rate * 1e12
    return None


def _words(name: str) -> list[str]:
    return name.lower().replace("-", " ").split()
