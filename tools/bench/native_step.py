#!/usr/bin/env python
"""Our whole training step with native kernels beside the same step with torch's own functions.

Two processes, one of each, take turns of a few steps, never both at once, so that a busy machine slows both. The one
without native kernels takes the references in plain torch, torch's norms and attention, and its fused AdamW.

    OMP_NUM_THREADS=2 python tools/bench/native_step.py --output tools/bench/results/native_step-cpu-1x2.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from step_cases.ours import SHAPES, device_name, ours, run_config

from megatron_lite.config import sources
from megatron_lite.kernels import extension
from megatron_lite.monitor.versions import versions
from megatron_lite.parallel import launch
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh

WARM_UP = 3


def serve(shape: str, bf16: bool, native: bool) -> None:
    """Train as many steps as each line of standard input asks for, and answer with their wall and CPU seconds."""
    device = launch.start(launch.Launch.from_environment(), 10)
    mesh = ProcessMesh.create(MeshShape(), device)
    config = run_config(SHAPES[shape], bf16=bf16, micro_batches=1, data_size=1, zero=1)
    if native:
        extension.require_native(device.type)
    else:
        extension.forgo(device.type, "this process measures the step without it")
        config = sources.override(config, {"kernels": {"norm_backend": "torch", "attention_backend": "sdpa"}})
    step = ours(config, mesh)
    number = 0
    for line in sys.stdin:
        began, used = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            step(number)
            number += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(f"seconds {time.perf_counter() - began} {time.process_time() - used}", flush=True)


class Contender:
    """A process that trains when asked to."""

    def __init__(self, shape: str, bf16: bool, native: bool):
        command = [sys.executable, __file__, "--serve", shape, *["--bf16"] * bf16, *["--native"] * native]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def train(self, steps: int) -> tuple[float, float]:
        """Wall and CPU seconds of `steps` steps."""
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("seconds"):
                wall, processor = map(float, line.split()[1:])
                return wall, processor
        raise SystemExit("a contender ended; what it said stands above")

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def compare(shape: str, bf16: bool, turns: int, steps: int) -> dict[str, float]:
    """Seconds a step of both, and how many times as fast the native one is: medians over the turns."""
    contenders = {name: Contender(shape, bf16, name == "native") for name in ("native", "torch")}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender.train(WARM_UP)
    for turn in range(turns):
        for name in sorted(contenders, reverse=turn % 2 == 1):
            times[name].append(contenders[name].train(steps))
    for contender in contenders.values():
        contender.end()
    found = {}
    for place, what in enumerate(("wall", "cpu")):
        of = {name: [seconds[place] for seconds in measured] for name, measured in times.items()}
        found |= {f"{what}_seconds_a_step, {name}": statistics.median(of[name]) / steps for name in contenders}
        ratios = [slow / quick for slow, quick in zip(of["torch"], of["native"], strict=True)]
        found[f"{what}_ratio, torch / native"] = statistics.median(ratios)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="default: by device")
    parser.add_argument("--turns", type=int, default=11, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--serve", metavar="SHAPE", help=argparse.SUPPRESS)
    parser.add_argument("--bf16", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--native", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.bf16, options.native)
        return
    on_gpu = torch.cuda.is_available()
    results: dict[str, dict[str, float]] = {}
    for shape in options.shapes or (["gpt2-124m", "llama-1.5b"] if on_gpu else ["gpt2-7m", "llama-6m"]):
        for precision in options.precisions:
            name = f"{shape}, {precision}"
            results[name] = compare(shape, precision == "bf16", options.turns, options.steps)
            for what, value in results[name].items():
                print(f"{name:18} {what:34} {value:10.3f}", flush=True)
    if options.output:
        record = {
            "benchmark": "native_step",
            "device": device_name(torch.device("cuda" if on_gpu else "cpu")),
            "threads": torch.get_num_threads(),
            "turns": options.turns,
            "steps_a_turn": options.steps,
            "results": results,
            "versions": versions(),
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
