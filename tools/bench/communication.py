#!/usr/bin/env python
"""The bytes that a rank sends in a step, counted call by call, beside the closed formula for each axis.

Ranks train a small model over gloo, and every collective and message is counted, DeepSpeed's too; a collective counts
as by a ring, whatever gloo makes of it. The third step counts: in the first two DeepSpeed looks around.

    python tools/bench/communication.py --output tools/bench/results/communication-cpu.json
    python tools/bench/communication.py --layouts tp=2,dp=2,zero=1 pp=4,schedule=GPipe
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from rank_cases.ranks import on_ranks, write

from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.monitor.traffic import Traffic
from megatron_lite.parallel.layout_line import parse_layout
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.plan.communication import Sent, by_axes, sent_in_a_step
from megatron_lite.train import build
from megatron_lite.train.engine import load_libraries
from megatron_lite.train.step import train_step

LAYOUTS = (
    "tp=2,zero=0", "tp=2,sp=1,zero=0", "tp=4,sp=1,zero=0", "dp=2,zero=0", "dp=4,zero=0", "dp=2,zero=1", "dp=4,zero=1",
    "dp=2,zero=2", "dp=4,zero=2", "dp=2,zero=3", "dp=4,zero=3", "cp=2,zero=0", "cp=4,zero=0", "cp=2,zero=0,cp-comm=a2a",
    "cp=4,zero=0,cp-comm=a2a", "pp=2,zero=0", "pp=4,zero=0", "pp=2,vpp=2,zero=0", "pp=2,zero=0,schedule=ZBVZeroBubble",
    "tp=2,dp=2,zero=1", "tp=2,pp=2,sp=1,zero=1", "tp=2,cp=2,zero=1", "pp=2,dp=2,zero=1", "pp=2,dp=2,zero=2",
    "pp=2,dp=2,zero=3", "pp=2,cp=2,zero=1", "cp=2,dp=2,zero=3", "tp=2,pp=2,dp=2,sp=1,zero=1",
)  # fmt: skip
VOCABULARY, LENGTH = 1000, 64
MODEL = {
    "num_layers": 4, "hidden_size": 320, "num_attention_heads": 4, "num_query_groups": 2, "vocab_size": VOCABULARY,
    "normalization": "RMSNorm", "position_embedding_type": "rope", "swiglu": True, "add_bias_linear": False,
    "hidden_dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip


def config_of(layout: str, dtype: str) -> RunConfig:
    """A LLaMA-like model with tied embeddings in a layout, of 4 micro-batches a step on each data rank."""
    parsed = parse_layout(layout)
    config = sources.override(
        RunConfig(),
        {
            "model": MODEL,
            "precision": {"bf16": dtype == "bf16"},
            "data": {"mock_data": True, "seq_length": LENGTH},
            "training": {"micro_batch_size": 1, "global_batch_size": 4 * parsed.shape.data, "train_iters": 1},
        },
    )
    return parsed.put_on(config)


def as_rank(rank: int, layout: str, dtype: str) -> dict[str, float]:
    """What this rank sends in the third step, by axes."""
    torch.set_num_threads(1)
    config, mesh = config_of(layout, dtype), ProcessMesh.create(parse_layout(layout).shape)
    engine = build.build_engine(config, build.build_model_to_train(config, mesh, VOCABULARY), mesh)
    pipeline = build.build_pipeline(config, engine.module, mesh)
    loader = build.open_loader(config, build.open_stream(config, "train", VOCABULARY), mesh, VOCABULARY)
    batch = 4 * mesh.size("data")
    for step in range(3):
        batches = loader.step(step * batch, batch)
        with Traffic() as traffic:
            options = {"target_tokens": batch * LENGTH, "seed": None, "learning_rate": 1e-3, "pipeline": pipeline}
            train_step(engine, mesh, batches, step=step + 1, **options)
    return {axes: float(sent) for axes, sent in traffic.by_axes().items()}


def measure(layout: str, dtype: str) -> list[dict[str, Any]]:
    """The places of a layout's pipeline, each with what its ranks send by count and by formula."""
    shape = parse_layout(layout).shape
    told = on_ranks(shape.world_size, as_rank, layout, dtype)
    found = []
    for place, ranks in itertools.groupby(range(shape.world_size), lambda rank: shape.coordinates(rank)["pipe"]):
        counted = [told[rank] for rank in ranks]
        options = {"data_size": shape.data, "vocab_size": VOCABULARY, "pipe_rank": place}
        planned = sent_in_a_step(config_of(layout, dtype), **options)
        formula = {axes: float(sent) for axes, sent in by_axes(planned).items()}
        found.append(
            {
                "layout": layout,
                "dtype": dtype,
                "pipe_rank": place,
                "counted": counted[0],
                "formula": formula,
                "by_purpose": {_name(entry): float(entry.bytes) for entry in planned},
                "equal": all(rank == formula for rank in counted),
            }
        )
    return found


def _name(entry: Sent) -> str:
    return f"{'+'.join(entry.axes)}: {entry.purpose}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, metavar="LAYOUT", help="as --layout takes them")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    load_libraries(RunConfig())
    found = []
    for layout, dtype in itertools.product(options.layouts, options.dtypes):
        if dtype == "bf16" and parse_layout(layout).zero == 0:
            continue
        for place in measure(layout, dtype):
            found.append(place)
            parts = []
            for axes, sent in place["formula"].items():
                counted = place["counted"].get(axes, 0)
                parts.append(f"{axes} {counted:,.0f}" + ("" if counted == sent else f" (formula {sent:,.0f})"))
            where = f" pipe rank {place['pipe_rank']}" if "pp=" in layout else ""
            print(f"{'equal' if place['equal'] else 'APART'}  {layout} {dtype}{where}: {', '.join(parts)}", flush=True)
    if options.output:
        write(options.output, {"benchmark": "communication", "model": MODEL, "seq_length": LENGTH, "cases": found})


if __name__ == "__main__":
    main()
