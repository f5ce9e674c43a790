"""What a CPU's meter counts, and what it does not: each in a process of its own, for memory has a history."""

import numpy
import torch
from ranks import run_on_ranks

from megatron_lite.monitor.memory import EXACT_STEPS, MemoryMeter, process_memory
from megatron_lite.monitor.metrics import METRICS

MIB = 2**20


def use_and_free(sizes, count=8):
    """Hold `count` blocks of each size in MiB, one size after the other."""
    for size in sizes:
        held = [torch.ones(size * MIB // 4) for _ in range(count)]
        del held


def test_the_peak_grows_with_what_is_allocated():
    run_on_ranks(_grows, 1)


def _grows():
    meter = MemoryMeter("cpu")
    held = torch.ones(64 * MIB // 4)
    now, highest = process_memory()
    assert highest >= now >= held.nbytes
    used = meter.metrics()
    # Torch's own threads allocate and free a little at any moment.
    assert set(used) <= set(METRICS) and abs(used["memory_allocated"] - now) < MIB
    del held
    assert 63 < meter.peak().in_use / MIB < 66
    assert meter.metrics()["memory_allocated"] < now - 62 * MIB
    meter.begin()
    assert meter.peak().in_use < 2 * MIB


def test_freed_memory_is_not_in_use_though_it_is_kept_later():
    run_on_ranks(_is_given_back_and_then_kept, 1)


def _is_given_back_and_then_kept():
    meter = MemoryMeter("cpu")
    use_and_free((8, 9, 10, 11))
    for _ in range(EXACT_STEPS):
        meter.note_step()
    exact = meter.peak()
    assert exact.in_use == exact.process
    assert 87 < exact.in_use / MIB < 90
    use_and_free((8, 9, 10, 11))
    use_and_free((12,), 16)
    meter.note_step()
    assert meter.peak().in_use == exact.in_use
    assert meter.peak().process > 190 * MIB


def test_mapped_files_are_no_memory_of_the_run(tmp_path):
    path = tmp_path / "tokens.bin"
    path.write_bytes(bytes(32 * MIB))
    run_on_ranks(_mapped_is_not_counted, 1, path)


def _mapped_is_not_counted(path):
    meter = MemoryMeter("cpu")
    tokens = numpy.memmap(path, dtype=numpy.uint8, mode="r")
    assert tokens.sum() == 0
    assert meter.peak().in_use < 2 * MIB
