#!/usr/bin/env python
"""Each kernel beside torch, a plain copy of as many bytes, and the peers that are installed.

All contenders of a case run in turn within one process, a round each, in changing order, so that a busy machine
slows all of them; a time is the median over rounds. "GB/s" are the bytes the operation has to move, over its time.

    python tools/bench/kernels.py --threads 2 --output tools/bench/results/kernels-cpu.json
    python tools/bench/kernels.py --device cuda --rows 16384 --hidden 1024 4096 16384 --dtypes bfloat16 float32
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from kernel_cases.activations import activations
from kernel_cases.case import Case, Contender, Setting
from kernel_cases.cross_entropy import losses
from kernel_cases.dropout import dropouts
from kernel_cases.norms import clipping, norms
from kernel_cases.optimizers import optimizers
from kernel_cases.rotary import rotations
from kernel_cases.softmax import attention_softmaxes, softmaxes

from megatron_lite.kernels import extension

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
GROUPS = {
    "norms": norms,
    "clipping": clipping,
    "softmax": softmaxes,
    "attention": attention_softmaxes,
    "losses": losses,
    "activations": activations,
    "rotary": rotations,
    "dropout": dropouts,
    "optimizers": optimizers,
}
_OF_ONE_SIZE = ("attention", "losses", "optimizers")
"""Their sizes are their own: they run once a dtype, whatever the hidden sizes."""


def seconds(run: Contender, device: torch.device) -> float:
    """One call's time: by events on a GPU, whose queue is kept filled; else by the clock, of one thread its own.

    The processor time of a single thread is all its work and leaves out what other processes took.
    """
    if device.type == "cpu":
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        began = clock()
        run()
        return clock() - began
    calls = 10
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def measure(case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
    """Median seconds, GB/s, the share of a copy's speed, and how many times as fast as each other ours is."""
    source = torch.empty(case.bytes // 2, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    contenders = {**case.contenders, "copy": lambda: target.copy_(source)}
    for name, run in list(contenders.items()):
        try:
            for _ in range(3):
                run()
        except Exception as error:  # a peer that does not take this size or card raises whatever it likes
            if name in ("ours", "copy"):
                raise
            print(f"{case.operation} {case.size}: {name} is left out: {error}")
            del contenders[name]
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(seconds(contenders[name], device))
    median = {name: statistics.median(times[name]) for name in names}
    return {
        "operation": case.operation,
        "size": case.size,
        "megabytes": case.bytes / 1e6,
        "seconds": median,
        "gigabytes_per_second": {name: case.bytes / 1e9 / median[name] for name in names},
        "share_of_copy": {name: median["copy"] / median[name] for name in names},
        "ours_times_as_fast": {
            name: statistics.median(other / ours for other, ours in zip(times[name], times["ours"], strict=True))
            for name in names[1:]
        },
    }


def row(result: dict[str, Any]) -> str:
    others = ", ".join(
        f"{ratio:.2f} x {name}" for name, ratio in result["ours_times_as_fast"].items() if name != "copy"
    )
    return (
        f"{result['operation']:32} {result['size']:26} {result['seconds']['ours'] * 1e3:9.3f} ms "
        f"{result['gigabytes_per_second']['ours']:8.1f} GB/s {result['share_of_copy']['ours']:5.0%} of copy  {others}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--operations", nargs="+", help="only those whose name begins so")
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--compile", action="store_true", help="torch.compile beside it (always on a GPU)")
    parser.add_argument("--output", type=Path, help="write JSON here")
    options = parser.parse_args()

    if platform.libc_ver()[0] == "glibc":
        # Keep freed memory: else most of a large tensor's time goes into the pages the system clears for it anew.
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    extension.require_native(options.device)
    results = []
    for dtype in options.dtypes:
        for hidden in options.hidden:
            compiling = options.compile or options.device == "cuda"
            setting = Setting(options.rows, hidden, getattr(torch, dtype), device, compiling)
            groups = [group for group in options.groups if hidden == options.hidden[0] or group not in _OF_ONE_SIZE]
            for case in (case for group in groups for case in GROUPS[group](setting)):
                if not options.operations or case.operation.startswith(tuple(options.operations)):
                    results.append(measure(case, device, options.rounds))
                    print(row(results[-1]), flush=True)
    if options.output:
        name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
        about = {
            "device": name,
            "kernels": extension.instruction_set() if options.device == "cpu" else f"CUDA {torch.version.cuda}",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "rounds": options.rounds,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
