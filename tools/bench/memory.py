#!/usr/bin/env python
"""The predicted memory peak of a rank beside the measured one, over layouts, stages, precisions and shapes.

Each case is a short run of the trainer over mock data, in processes of its own, forked from one that has
imported the libraries. CPU alone: on a GPU the end of any run says the same.

    python tools/bench/memory.py --output results.json
    python tools/bench/memory.py --only "gpt2 zero=1 dp=2" "llama zero=3 bf16"
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rank_cases.ranks import on_ranks, write

VOCABULARY = 8000
GPT2 = {"num_layers": 4, "hidden_size": 384, "num_attention_heads": 6, "hidden_dropout": 0.0, "attention_dropout": 0.0}
LLAMA = GPT2 | {
    "normalization": "RMSNorm", "position_embedding_type": "rope", "swiglu": True, "add_bias_linear": False,
    "num_query_groups": 2, "untie_embeddings_and_output_weights": True,
}  # fmt: skip
FAMILIES = {"gpt2": GPT2, "llama": LLAMA}
SCHEDULES = ("1F1B", "GPipe", "Interleaved1F1B", "ZBVZeroBubble")
SIZES = {"narrow": {"hidden_size": 192}, "wide": {"hidden_size": 1024, "num_attention_heads": 16}}


@dataclasses.dataclass(frozen=True)
class Case:
    """A run: a family, ZeRO stage and data size, then what differs from a small fp32 run without recompute."""

    family: str
    zero: int
    dp: int = 1
    tp: int = 1
    bf16: bool = False
    recompute: bool = False
    """Full recompute, over twice the batch."""
    size: str = ""
    pp: int = 1
    schedule: str = ""
    """Of a pipeline, whose steps have eight micro-batches."""

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp

    @property
    def name(self) -> str:
        words = [self.family, self.size, f"zero={self.zero}"]
        words += [f"{axis}=2" for axis in ("dp", "tp", "pp") if getattr(self, axis) > 1]
        words.append(self.schedule)
        return " ".join([*filter(None, words), *(word for word in ("bf16", "recompute") if getattr(self, word))])

    def sections(self, steps: int) -> dict[str, dict[str, Any]]:
        """The run's configuration."""
        micro_batch = 8 if self.recompute else 4
        count = 2 if self.pp == 1 else 8
        training = {"micro_batch_size": micro_batch, "global_batch_size": count * micro_batch * self.dp}
        if self.recompute:
            training["recompute_granularity"] = "full"
        return {
            "model": FAMILIES[self.family] | SIZES.get(self.size, {}) | {"vocab_size": VOCABULARY},
            "parallel": {
                "zero_stage": self.zero,
                "tensor_model_parallel_size": self.tp,
                "pipeline_model_parallel_size": self.pp,
                "pipeline_schedule": self.schedule or None,
                "num_virtual_stages_per_pipeline_rank": 2 if self.schedule.startswith("Interleaved") else None,
            },
            "precision": {"bf16": self.bf16},
            "data": {"mock_data": True, "seq_length": 128},
            "training": training | {"train_iters": steps, "eval_interval": 0},
        }


def cases() -> Iterator[Case]:
    """All that are measured."""
    for family, zero, (dp, tp), bf16 in itertools.product(FAMILIES, range(4), ((1, 1), (2, 1), (1, 2)), (False, True)):
        if zero or not bf16:
            yield Case(family, zero, dp, tp, bf16)
    for family, zero in itertools.product(FAMILIES, range(4)):
        yield Case(family, zero, recompute=True)
    for family, zero, size in itertools.product(FAMILIES, range(4), SIZES):
        yield Case(family, zero, size=size)
    for schedule, (zero, bf16) in itertools.product(SCHEDULES, ((0, False), (1, False), (1, True), (2, True))):
        yield Case("gpt2", zero, bf16=bf16, pp=2, schedule=schedule)
    for schedule in SCHEDULES[:2]:
        yield Case("gpt2", 2, bf16=True, pp=2, dp=2, schedule=schedule)
        yield Case("llama", 3, bf16=True, pp=2, dp=2, schedule=schedule)
        yield Case("llama", 1, pp=2, tp=2, schedule=schedule)


def as_rank(rank: int, case: Case, steps: int) -> dict[str, Any]:
    """Train on this rank, and tell its peak."""
    from megatron_lite.config import sources
    from megatron_lite.config.run import RunConfig
    from megatron_lite.parallel.launch import StopRequest
    from megatron_lite.parallel.mesh_shape import MeshShape
    from megatron_lite.parallel.process_mesh import ProcessMesh
    from megatron_lite.train.dry_run import planned_peak
    from megatron_lite.train.start import train_on

    mesh = ProcessMesh.create(MeshShape.of_world(case.ranks, tensor=case.tp, pipe=case.pp))
    run = train_on(mesh, sources.override(RunConfig(), case.sections(steps)), StopRequest(), "")
    planned, peak = planned_peak(run.config, mesh.size("data"), "cpu"), run.memory.peak()
    return {
        "predicted": planned.total,
        "moment": planned.name,
        "measured": peak.in_use,
        "process": peak.process,
        "parts": {part: value for part, value in dataclasses.asdict(planned).items() if part != "name"},
    }


def measure(case: Case, steps: int) -> dict[str, Any]:
    """What the rank with the highest peak tells. Raises SystemExit with the log of a rank that fails."""
    return max(on_ranks(case.ranks, as_rank, case, steps), key=lambda found: found["measured"])


def main() -> None:
    every = {case.name: case for case in cases()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=every, metavar="CASE", help="cases by name; default: all")
    parser.add_argument("--steps", type=int, default=4, help="steps of each run; the first two have the peak")
    parser.add_argument("--list", action="store_true", help="print the names of all cases")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    if options.list:
        print("\n".join(every))
        return
    import torch

    from megatron_lite.config.run import RunConfig
    from megatron_lite.train.engine import load_libraries

    torch.set_num_threads(1)
    load_libraries(RunConfig())
    found = {}
    print(f"{'case':36}{'predicted':>11}{'measured':>10} MiB {'ratio':>6}{'process':>9} MiB")
    for name in options.only or every:
        case = found[name] = measure(every[name], options.steps)
        case["ratio"] = round(case["predicted"] / case["measured"], 3)
        predicted, measured, process = (case[part] / 2**20 for part in ("predicted", "measured", "process"))
        line = f"{name:36}{predicted:11.1f}{measured:10.1f} {case['ratio']:10.3f}{process:9.1f}     {case['moment']}"
        print(line, flush=True)
    if options.output:
        write(options.output, {"benchmark": "memory", "cases": found})


if __name__ == "__main__":
    main()
