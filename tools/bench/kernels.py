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
import importlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F

from megatron_lite.kernels import extension
from megatron_lite.kernels.l2_norm import l2_norm
from megatron_lite.kernels.layer_norm import layer_norm, residual_layer_norm
from megatron_lite.kernels.rms_norm import residual_rms_norm, rms_norm

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
Contender = Callable[[], object]


@dataclass
class Case:
    """One thing to time: the bytes it moves through memory at least, and who does it; "ours" comes first."""

    operation: str
    size: str
    bytes: int
    contenders: dict[str, Contender]


@dataclass(frozen=True)
class Setting:
    """What every case of a run shares."""

    rows: int
    hidden: int
    dtype: torch.dtype
    device: torch.device
    compiled: bool

    def drawn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    @property
    def size(self) -> str:
        return f"[{self.rows}, {self.hidden}] {str(self.dtype).removeprefix('torch.')}"

    def case(self, operation: str, tensors: int, **contenders: Contender | None) -> Case:
        """A case that moves so many tensors of rows x hidden; contenders that are None are not installed."""
        bytes = tensors * self.rows * self.hidden * self.dtype.itemsize
        present = {name.replace("_", " "): run for name, run in contenders.items() if run}
        return Case(operation, self.size, bytes, present)


def peer(module: str, name: str) -> Any:
    """Something of another project, or None where that is not installed or does not run."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError):
        return None


def compiled(setting: Setting, function: Callable[..., Any]) -> Callable[..., Any] | None:
    return torch.compile(function, dynamic=False) if setting.compiled else None


def applied(function: Callable[..., Any] | None, *arguments: Any) -> Contender | None:
    return (lambda: function(*arguments)) if function else None


def backward(
    function: Callable[..., Any] | None, inputs: list[torch.Tensor], gradient: torch.Tensor
) -> Contender | None:
    """The gradient alone: the forward pass runs once, now."""
    if function is None:
        return None
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    return lambda: torch.autograd.grad(output, leaves, gradient, retain_graph=True)


def norms(setting: Setting) -> Iterator[Case]:
    """Layer and RMS norm. Forward reads and writes a tensor; backward reads two and writes one."""
    x, residual, dy = (setting.drawn(setting.rows, setting.hidden) for _ in range(3))
    weight, bias = setting.drawn(setting.hidden), setting.drawn(setting.hidden)
    shape = weight.shape

    def torch_layer(x, weight, bias):
        return F.layer_norm(x, shape, weight, bias, 1e-5)

    def torch_rms(x, weight):
        return F.rms_norm(x, shape, weight, 1e-5)

    def torch_residual_layer(x, residual, weight, bias):
        total = x + residual
        return F.layer_norm(total, shape, weight, bias, 1e-5), total

    def torch_residual_rms(x, residual, weight):
        total = x + residual
        return F.rms_norm(total, shape, weight, 1e-5), total

    on_gpu = setting.device.type == "cuda"
    liger_layer = peer("liger_kernel.ops.layer_norm", "LigerLayerNormFunction") if on_gpu else None
    liger_rms = peer("liger_kernel.ops.rms_norm", "LigerRMSNormFunction") if on_gpu else None
    quack_rms = peer("quack", "rmsnorm") if on_gpu else None
    for name, ours, theirs, arguments, peers in (
        (
            "layer_norm",
            layer_norm,
            torch_layer,
            [x, weight, bias],
            {"liger": liger_layer and (lambda x, w, b: liger_layer.apply(x, w, b, 1e-5))},
        ),
        (
            "rms_norm",
            rms_norm,
            torch_rms,
            [x, weight],
            {"liger": liger_rms and (lambda x, w: liger_rms.apply(x, w, 1e-5)), "quack": quack_rms},
        ),
    ):
        everyone = {"ours": ours, "torch": theirs, "torch_compiled": compiled(setting, theirs), **peers}
        forward = {who: applied(function, *arguments) for who, function in everyone.items()}
        with torch.no_grad():
            yield setting.case(name, 2, **forward)
        gradient = {who: backward(function, arguments, dy) for who, function in everyone.items()}
        yield setting.case(f"{name}_backward", 3, **gradient)
    for name, ours, theirs, arguments in (
        ("residual_layer_norm", residual_layer_norm, torch_residual_layer, [x, residual, weight, bias]),
        ("residual_rms_norm", residual_rms_norm, torch_residual_rms, [x, residual, weight]),
    ):
        everyone = {"ours": ours, "torch": theirs, "torch_compiled": compiled(setting, theirs)}
        with torch.no_grad():
            yield setting.case(name, 4, **{who: applied(function, *arguments) for who, function in everyone.items()})


def clipping(setting: Setting) -> Iterator[Case]:
    """The L2 norm of ten tensors, read once."""
    tensors = list(setting.drawn(setting.rows, setting.hidden).chunk(10))
    yield setting.case(
        "l2_norm",
        1,
        ours=lambda: l2_norm(tensors),
        torch=lambda: torch.nn.utils.get_total_norm(tensors),
    )


GROUPS = (norms, clipping)


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
    for run in contenders.values():
        for _ in range(3):
            run()
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
        f"{result['operation']:22} {result['size']:26} {result['seconds']['ours'] * 1e3:9.3f} ms "
        f"{result['gigabytes_per_second']['ours']:8.1f} GB/s {result['share_of_copy']['ours']:5.0%} of copy  {others}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
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
            for case in (case for group in GROUPS for case in group(setting)):
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
