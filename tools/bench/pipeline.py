#!/usr/bin/env python
"""The bubble of each pipeline schedule, measured, beside its theory; and what each rank holds meanwhile.

Ranks run the trainer's own pipeline of a tiny GPT over gloo. Each forward, backward of inputs and backward of weights
is stretched by sleeping to one length, a whole backward to two, so that ranks can share cores, and time is lost to
waiting and to Python alone. What is in flight is counted by the graphs of forward passes that are alive.

    python tools/bench/pipeline.py --output tools/bench/results/pipeline-cpu.json
    python tools/bench/pipeline.py --schedules 1F1B ZBVZeroBubble --ranks 4 --micro-batches 8
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
import weakref
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from rank_cases.ranks import on_ranks, write
from torch import distributed as dist

from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.pipeline import runner
from megatron_lite.parallel.pipeline.timeline import Action, Span, bubble_share, timeline
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.plan.stages import chunks_in_flight, idle_and_busy
from megatron_lite.train import build
from megatron_lite.train.step import train_step

SCHEDULES = {
    "GPipe": 1, "1F1B": 1, "Interleaved1F1B": 2, "LoopedBFS": 2, "InterleavedZeroBubble": 2, "ZBVZeroBubble": 2,
    "DualPipeV": 2,
}  # fmt: skip
"""Stages that a rank holds, by schedule."""
DRAWN = (4, 8)
"""Ranks and micro-batches of the step whose spans are kept for the picture."""
VOCABULARY, LENGTH = 64, 16


@dataclasses.dataclass(frozen=True)
class Case:
    """A schedule on so many ranks, with so many micro-batches a step."""

    schedule: str
    ranks: int
    micro_batches: int

    @property
    def held(self) -> int:
        return SCHEDULES[self.schedule]

    @property
    def is_possible(self) -> bool:
        """1F1B and DualPipeV take as many micro-batches as stages."""
        return self.schedule not in ("1F1B", "DualPipeV") or self.micro_batches >= self.ranks * self.held

    def config(self) -> RunConfig:
        """A GPT of one tiny layer a stage."""
        model = {"num_layers": self.ranks * self.held, "hidden_size": 16, "num_attention_heads": 2}
        model |= {"vocab_size": VOCABULARY, "hidden_dropout": 0.0, "attention_dropout": 0.0}
        layout = "|".join(["Et", *["t"] * (self.ranks * self.held - 2), "tL"])
        return sources.override(
            RunConfig(),
            {
                "model": model,
                "parallel": {
                    "pipeline_model_parallel_size": self.ranks,
                    "pipeline_schedule": self.schedule,
                    "pipeline_model_parallel_layout": layout,
                    "zero_stage": 0,
                },
                "data": {"mock_data": True, "seq_length": LENGTH},
                "training": {"micro_batch_size": 1, "global_batch_size": self.micro_batches, "train_iters": 1},
            },
        )


class Watch:
    """The actions of this rank, stretched to multiples of `unit` seconds, and the forward passes that are alive."""

    def __init__(self, unit: float):
        self.unit = unit
        self.spans: list[Span] = []
        self.alive = self.most_alive = 0

    def act(self, action: Action, units: int, function, *arguments, **options):
        start = time.monotonic()
        found = function(*arguments, **options)
        time.sleep(max(0.0, start + units * self.unit - time.monotonic()))
        self.spans.append(Span(action, start, time.monotonic()))
        return found

    def forward(self, function, *arguments, **options):
        """`function(...)`, counted until nothing that its backward needs is held any more."""
        mark = _Mark()
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(mark, self._end)
        # Detached: what a node saves of its own output would hold the node.
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (tensor.detach(), mark), lambda kept: kept[0]):
            return function(*arguments, **options)

    def _end(self) -> None:
        self.alive -= 1


class _Mark:
    """What all that a forward pass has saved holds on to."""


def watched_stage(watch: Watch) -> type:
    """The pipeline's stage, each of its actions seen by `watch`."""

    class Stage(runner._Stage):
        def forward_one_chunk(self, number, *arguments, **options):
            forward = super().forward_one_chunk
            action = Action(self.stage_index, "F", number)
            return watch.act(action, 1, watch.forward, forward, number, *arguments, **options)

        def backward_one_chunk(self, number, *arguments, full_backward=True, **options):
            action = Action(self.stage_index, "B" if full_backward else "I", number)
            options["full_backward"] = full_backward
            return watch.act(
                action, 2 if full_backward else 1, super().backward_one_chunk, number, *arguments, **options
            )

        def backward_weight_one_chunk(self, number, *arguments, **options):
            action = Action(self.stage_index, "W", number)
            return watch.act(action, 1, super().backward_weight_one_chunk, number, *arguments, **options)

    return Stage


def as_rank(rank: int, case: Case, unit: float, steps: int) -> list[dict[str, Any]]:
    """What this rank did in each of `steps` steps, after one that is not stretched."""
    torch.set_num_threads(1)
    watch = Watch(0.0)
    runner._Stage = watched_stage(watch)
    config, mesh = case.config(), ProcessMesh.create(MeshShape(pipe=case.ranks))
    engine = build.build_engine(config, build.build_model_to_train(config, mesh, VOCABULARY), mesh)
    pipeline = build.build_pipeline(config, engine.module, mesh)
    stream = build.open_stream(config, "train", VOCABULARY)
    batches = build.open_loader(config, stream, mesh, VOCABULARY).step(0, case.micro_batches)
    found = []
    for step in range(steps + 1):
        watch.spans, watch.most_alive = [], 0
        watch.unit = unit if step else 0.0
        dist.barrier()
        tokens = case.micro_batches * LENGTH
        train_step(
            engine, mesh, batches, target_tokens=tokens, step=step + 1, seed=None, learning_rate=0.0, pipeline=pipeline
        )
        spans = [(*span.action, span.start, span.stop) for span in watch.spans]
        found.append({"spans": spans, "in_flight": watch.most_alive})
    return found[1:]


def measure(case: Case, unit: float, steps: int) -> dict[str, Any]:
    """A case's bubble as measured, as its actions have it in unit times, and by the closed formula."""
    told = on_ranks(case.ranks, as_rank, case, unit, steps)
    by_step = [
        [[Span(Action(*span[:3]), *span[3:]) for span in rank[step]["spans"]] for rank in told] for step in range(steps)
    ]
    shares = [bubble_share(spans) for spans in by_step]
    # What else the machine does adds to a bubble, and takes nothing away.
    quietest = by_step[shares.index(min(shares))]
    planned = timeline([[span.action for span in rank] for rank in quietest])
    idle, busy = idle_and_busy(case.config(), case.micro_batches)
    found = {
        **dataclasses.asdict(case),
        "stages_on_a_rank": case.held,
        "theory": round(idle / (idle + busy), 4),
        "simulated": round(bubble_share(planned), 4),
        "measured": round(min(shares), 4),
        "measured_each_step": [round(share, 4) for share in shares],
        "in_flight": [max(step["in_flight"] for step in rank) for rank in told],
        "in_flight_planned": [chunks_in_flight(case.config(), case.micro_batches, rank) for rank in range(case.ranks)],
    }
    if (case.ranks, case.micro_batches) == DRAWN:
        start = min(span.start for rank in quietest for span in rank)
        found["spans"] = [
            " ".join(
                f"{span.action}@{(span.start - start) / unit:.2f}-{(span.stop - start) / unit:.2f}" for span in rank
            )
            for rank in quietest
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--unit", type=float, default=0.08, help="seconds of a forward pass through a stage")
    parser.add_argument("--steps", type=int, default=3, help="steps measured, of which the quietest counts")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    cases = itertools.starmap(Case, itertools.product(options.schedules, options.ranks, options.micro_batches))
    found = []
    print(f"{'schedule':24}{'ranks':>6}{'micro-batches':>15}{'theory':>9}{'measured':>10}{'apart':>8}  held (planned)")
    for case in filter(lambda case: case.is_possible, cases):
        result = measure(case, options.unit, options.steps)
        found.append(result)
        flight = "/".join(map(str, result["in_flight"])) + f" ({'/'.join(map(str, result['in_flight_planned']))})"
        apart = 100 * (result["measured"] - result["theory"])
        print(
            f"{case.schedule:24}{case.ranks:6}{case.micro_batches:15}{result['theory']:9.1%}{result['measured']:10.1%}"
            f"{apart:+8.1f}  {flight}",
            flush=True,
        )
    if options.output:
        record = {"benchmark": "pipeline", "unit_seconds": options.unit, "steps": options.steps, "cases": found}
        write(options.output, record)


if __name__ == "__main__":
    main()
