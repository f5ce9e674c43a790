"""Memory of one rank as it is: what is in use, and the highest since a mark.

On a GPU torch's allocator tells both. On a CPU there is no allocator to ask, so the process's anonymous
memory stands for it: tensors, Python's objects, what libraries allocate (packed matrices, compiled
primitives, send buffers) and thread stacks; not code, token files or other mapped files, which the
system takes back when it needs the room.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

EXACT_STEPS = 2
"""Steps in which freed memory is given back at once: libraries allocate in the first, the second is as all others."""


@dataclasses.dataclass(frozen=True)
class PeakMemory:
    """The most bytes a rank took since training began, beyond what it held when its `MemoryMeter` was made."""

    in_use: int
    """At once, by tensors and libraries; on a CPU in the first `EXACT_STEPS` steps."""
    process: int
    """Over all of the training, with what the allocator kept for reuse."""


class MemoryMeter:
    """Bytes in use on `device`, and the growth of their peak beyond what was there when this meter was made.

    Made before the model is built, `peak` is what the run itself took, without the interpreter and
    the libraries loaded by then, and from `begin` on, without what building and loading took. glibc's
    malloc keeps freed blocks of up to 32 MiB, in all a tenth to a quarter of what is in use, and
    cannot be asked for a peak. So it is told to keep none until the second step is over: to that
    moment the highest anonymous memory is the highest memory in use. From then on blocks are kept,
    since fetching them anew costs a tenth of a step's time.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        import torch

        self._device = torch.device(device)
        self._steps = 0
        self._in_use: int | None = None
        if self._device.type == "cuda":
            self._before = torch.cuda.memory_allocated(self._device)
            self._reserved_before = torch.cuda.memory_reserved(self._device)
        else:
            _keep_freed_blocks(False)
            self._before, self._highest = process_memory()
        self.begin()

    def begin(self) -> None:
        """Tell the meter that training begins: peaks count from here."""
        if self._device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            # Where that is refused, an earlier peak counts as this run's until it is passed.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
            self._highest = process_memory()[1]

    def note_step(self) -> None:
        """Tell the meter that a training step is over."""
        self._steps += 1
        if self._device.type != "cuda":
            self._look()
            if self._steps == EXACT_STEPS:
                self._in_use = self._highest
                _keep_freed_blocks(True)

    def metrics(self) -> dict[str, int]:
        """`memory_allocated` and `memory_reserved` now, in bytes."""
        if self._device.type == "cuda":
            import torch

            return {
                "memory_allocated": torch.cuda.memory_allocated(self._device),
                "memory_reserved": torch.cuda.memory_reserved(self._device),
            }
        return {"memory_allocated": self._look(), "memory_reserved": self._highest}

    def peak(self) -> PeakMemory:
        """The highest growth so far."""
        if self._device.type == "cuda":
            import torch

            in_use = torch.cuda.max_memory_allocated(self._device) - self._before
            return PeakMemory(in_use, torch.cuda.max_memory_reserved(self._device) - self._reserved_before)
        self._look()
        in_use = self._highest if self._in_use is None else self._in_use
        return PeakMemory(in_use - self._before, self._highest - self._before)

    def _look(self) -> int:
        now, highest = process_memory()
        self._highest = max(self._highest, highest)
        return now


def process_memory() -> tuple[int, int]:
    """(anonymous memory of this process in bytes, the most it had).

    Linux counts the peak of all resident memory. While files stay mapped, their pages only come in, so
    the peak less what is mapped now is at most the peak of the rest, and close to it when asked often.
    Elsewhere both are the largest resident set.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    entries = (line.partition(":") for line in lines)
    fields = {name: int(value.split()[0]) * 1024 for name, _, value in entries if name in _FIELDS}
    if len(fields) < len(_FIELDS):
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return highest, highest
    anonymous = fields["RssAnon"]
    return anonymous, max(anonymous, fields["VmHWM"] - fields["RssFile"] - fields["RssShmem"])


_FIELDS = ("VmHWM", "RssAnon", "RssFile", "RssShmem")


def _keep_freed_blocks(keep: bool) -> None:
    """Whether glibc's malloc keeps freed blocks for reuse, or gives those of 128 KiB and more back at once.

    128 KiB is where glibc begins, and 32 MiB how far it goes by itself. Without glibc nothing changes.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return
    block = 32 * 2**20 if keep else 128 * 2**10
    library.mallopt(_M_MMAP_THRESHOLD, block)
    library.mallopt(_M_TRIM_THRESHOLD, 2 * block if keep else block)
    if not keep:
        library.malloc_trim(0)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
