#!/usr/bin/env python
"""What a step gains where ranks send while they compute: gradients, keys and values of a ring, hidden states.

Ranks of one machine talk over a slow link (a token bucket on the loopback of a network of their own, shared by all
ranks, which needs root), and layers are stretched by sleeping, so that sending and computing take about as long and
neither wants a core. Each case runs with and without overlap, in turns:

    gradients, ZeRO 0 and 1     --overlap-grad-reduce, and without
    ring attention              as it is; each passing waited for before the block that it could be hidden behind
    pipeline, both 1F1B         as it is; each message waited for where it is ordered

    python tools/bench/overlap.py --output tools/bench/results/overlap-cpu.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from rank_cases.ranks import link_of, on_ranks, write
from torch import distributed as dist
from torch.distributed.pipelining import schedules as torch_schedules

from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.parallel import ring_attention
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.pipeline.rules import pipeline_plan
from megatron_lite.parallel.pipeline.runner import Pipeline
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train import build
from megatron_lite.train.engine import load_libraries
from megatron_lite.train.step import train_step

VOCABULARY, LENGTH = 64, 16
LAYERS, WIDTH, BUCKET = 12, 128, 250_000
"""Of the model whose gradients are summed; elements of a bucket."""
HIDDEN = 8192


def _config(model: dict[str, Any], parallel: dict[str, Any], batch: int) -> RunConfig:
    shape = {"num_attention_heads": 2, "vocab_size": VOCABULARY, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    return sources.override(
        RunConfig(),
        {
            "model": shape | model,
            "parallel": parallel,
            "data": {"mock_data": True, "seq_length": LENGTH},
            "training": {"micro_batch_size": 1, "global_batch_size": batch, "train_iters": 1},
        },
    )


def _timed(steps: int, act: Callable[[], None]) -> list[float]:
    """Seconds of each of `steps` calls on all ranks together, after one that does not count."""
    found = []
    for _ in range(steps + 1):
        dist.barrier()
        start = time.monotonic()
        act()
        dist.barrier()
        found.append(time.monotonic() - start)
    return found[1:]


def gradients(rank: int, overlaps: bool, steps: int, unit: float, zero: int) -> list[float]:
    """Training steps of two data ranks; a layer's backward takes one unit."""
    torch.set_num_threads(1)
    parallel = {"zero_stage": zero, "overlap_grad_reduce": overlaps, "ddp_bucket_size": BUCKET}
    config = _config({"num_layers": LAYERS, "hidden_size": WIDTH}, parallel, 2)
    mesh = ProcessMesh.create(MeshShape(data=2))
    engine = build.build_engine(config, build.build_model_to_train(config, mesh, VOCABULARY), mesh)
    for layer in engine.module.layers.values():
        layer.register_full_backward_hook(lambda *_: time.sleep(unit))
    batches = build.open_loader(config, build.open_stream(config, "train", VOCABULARY), mesh, VOCABULARY).step(0, 2)
    options = {"target_tokens": 2 * LENGTH, "step": 1, "seed": None, "learning_rate": 0.0}
    return _timed(steps, lambda: train_step(engine, mesh, batches, **options))


class _Slow(ring_attention.CpuFlashBlock):
    """Attention of a block in one unit, and its backward in two."""

    unit = 0.0

    def forward(self, *arguments):
        time.sleep(self.unit)
        return super().forward(*arguments)

    def backward(self, *arguments):
        time.sleep(2 * self.unit)
        return super().backward(*arguments)


class _Awaited(ring_attention._Passing):
    """Keys and values that have arrived before anything else is done."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        super().wait()

    def wait(self):
        return self._received


def ring(rank: int, overlaps: bool, steps: int, unit: float) -> list[float]:
    """Forward and backward of attention over a ring of all ranks."""
    torch.set_num_threads(1)
    _Slow.unit = unit
    ring_attention.block_for = lambda *_: _Slow()
    if not overlaps:
        ring_attention._Passing = _Awaited
    query, key, value = (torch.randn(1, 4, 512, 64, requires_grad=True) for _ in range(3))

    def step() -> None:
        ring_attention.ring_attention(query, key, value, dist.group.WORLD, "auto").sum().backward()

    return _timed(steps, step)


class _Stretch(torch.autograd.Function):
    """A product that takes one unit, and two in backward."""

    @staticmethod
    def forward(ctx, tensor, weight, unit):
        ctx.save_for_backward(tensor, weight)
        ctx.unit = unit
        time.sleep(unit)
        return tensor * weight

    @staticmethod
    def backward(ctx, gradient):
        tensor, weight = ctx.saved_tensors
        time.sleep(2 * ctx.unit)
        return gradient * weight, (gradient * tensor).sum().reshape(1), None


class _Stage(torch.nn.Module):
    """A stage of `count`, from token ids in the first to a scalar out of the last."""

    def __init__(self, index: int, count: int, unit: float):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self._is_first, self._is_last, self._unit = index == 0, index == count - 1, unit

    def forward(self, received, labels=None, loss_mask=None):
        hidden = received.new_ones(LENGTH, 1, HIDDEN, dtype=torch.float32) if self._is_first else received
        made = _Stretch.apply(hidden, self.weight, self._unit)
        return made.mean() if self._is_last else made


def pipeline(rank: int, overlaps: bool, steps: int, unit: float, stages: int) -> list[float]:
    """Eight micro-batches through four ranks of so many stages each."""
    torch.set_num_threads(1)
    if not overlaps:
        torch_schedules._batch_p2p = _exchanged
    virtual = {"num_virtual_stages_per_pipeline_rank": stages} if stages > 1 else {}
    parallel = {"pipeline_model_parallel_size": 4, "zero_stage": 0, **virtual}
    plan = pipeline_plan(_config({"num_layers": 8}, parallel, 8))
    running = Pipeline(
        {index: _Stage(index, plan.stages, unit) for index in plan.held_by(rank)},
        plan,
        ProcessMesh.create(MeshShape(pipe=4)),
        batch_shape=(1, LENGTH),
        hidden_shape=(LENGTH, 1, HIDDEN),
        dtype=torch.float32,
    )
    tokens, masks = [torch.zeros(1, LENGTH, dtype=torch.int64)] * 8, [torch.ones(1, LENGTH)] * 8
    options = {"told": {}, "share": lambda loss: loss, "take_gradients": None}
    return _timed(steps, lambda: running.run(tokens, tokens, masks, None, **options))


_batch_p2p = torch_schedules._batch_p2p


def _exchanged(operations, desc=None):
    for work in _batch_p2p(operations, desc):
        work.wait()
    return []


CASES: dict[str, tuple[int, float, float, Callable[..., list[float]], tuple[Any, ...]]] = {
    "gradients, ZeRO 0": (2, 100, 0.12, gradients, (0,)),
    "gradients, ZeRO 1": (2, 100, 0.12, gradients, (1,)),
    "ring attention": (4, 200, 0.2, ring, ()),
    "pipeline, 1F1B": (4, 200, 0.12, pipeline, (1,)),
    "pipeline, Interleaved1F1B": (4, 200, 0.06, pipeline, (2,)),
}
"""Ranks, Mbit/s of the link, seconds of a unit, what runs, and what it is given."""


def measure(name: str, turns: int, steps: int) -> dict[str, Any]:
    """Seconds of a step without and with overlap, and without anything to send over a slow link."""
    ranks, megabits, unit, act, arguments = CASES[name]
    seconds: dict[str, list[float]] = {"off": [], "on": []}
    for _ in range(turns):
        for mode, found in seconds.items():
            with link_of(megabits):
                told = on_ranks(ranks, act, mode == "on", steps, unit, *arguments)
            found += [max(step) for step in zip(*told, strict=True)]
    fast = on_ranks(ranks, act, True, steps, unit, *arguments)
    off, on = (statistics.median(seconds[mode]) for mode in ("off", "on"))
    alone = statistics.median(max(step) for step in zip(*fast, strict=True))
    return {
        "ranks": ranks,
        "link_megabits": megabits,
        "unit_seconds": unit,
        "seconds_off": round(off, 3),
        "seconds_on": round(on, 3),
        "seconds_fast_link": round(alone, 3),
        "ratio": round(off / on, 3),
        "hidden": round((off - on) / (off - alone), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--turns", type=int, default=3, help="runs with and without")
    parser.add_argument("--steps", type=int, default=3, help="steps of a run; the median of all counts")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    load_libraries(RunConfig())
    found = {}
    print(f"{'case':28}{'off':>8}{'on':>8}{'fast link':>11} s {'ratio':>7}{'hidden':>8} of what sending adds")
    for name in options.only:
        case = found[name] = measure(name, options.turns, options.steps)
        print(
            f"{name:28}{case['seconds_off']:8.2f}{case['seconds_on']:8.2f}{case['seconds_fast_link']:11.2f}   "
            f"{case['ratio']:7.2f}{case['hidden']:8.0%}",
            flush=True,
        )
    if options.output:
        write(options.output, {"benchmark": "overlap", "cases": found})


if __name__ == "__main__":
    main()
