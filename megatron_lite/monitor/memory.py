"""Memory of one rank as it is: what tensors hold, and the highest since a mark.

On a CPU there is no allocator to ask, so the process's resident set stands for it.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class MemoryMeter:
    """Bytes in use on `device`, and the growth of their peak since this meter was made.

    Made before the model is built, `peak_growth` is what the run itself took, without the
    interpreter and its libraries.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        import torch

        self._device = torch.device(device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._before = resident_bytes()

    def metrics(self) -> dict[str, int]:
        """`memory_allocated` and `memory_reserved` now, in bytes."""
        if self._device.type == "cuda":
            import torch

            return {
                "memory_allocated": torch.cuda.memory_allocated(self._device),
                "memory_reserved": torch.cuda.memory_reserved(self._device),
            }
        return {"memory_allocated": resident_bytes(), "memory_reserved": peak_resident_bytes()}

    def peak_growth(self) -> int:
        """Highest bytes in use so far, less what was in use when the meter was made."""
        if self._device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self._device) - self._before
        return peak_resident_bytes() - self._before


def resident_bytes() -> int:
    """The resident set of this process."""
    return _status_bytes("VmRSS") or _highest_ever()


def peak_resident_bytes() -> int:
    """The highest resident set of this process."""
    return _status_bytes("VmHWM") or _highest_ever()


def _status_bytes(field: str) -> int | None:
    """A kB field of Linux's /proc/self/status in bytes; None elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def _highest_ever() -> int:
    # getrusage counts a parent's peak on Linux after exec, so it is the second choice.
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024
