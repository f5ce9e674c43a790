#!/usr/bin/env python
"""What document boundaries cost: attention that ends with documents beside attention that does not.

Samples of 2,048 tokens hold documents of one length, or of mixed lengths (log-normal, as web pages have). Measured are
attention's core alone, forward and backward, also under a dense mask; and a whole training step with
--reset-attention-mask and --reset-position-ids, and without. A length curriculum's steps are those of documents of its
length. Contenders take turns; a ratio is the median over the turns, above 1 where boundaries save time.

    OMP_NUM_THREADS=1 python tools/bench/documents.py --output tools/bench/results/documents-cpu.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F
from step_cases.ours import SHAPES, Shape, device_name, run_config

from megatron_lite.data.micro_batch import Assembly, MicroBatch
from megatron_lite.data.sample import Sample
from megatron_lite.model.attention import ATTENTION_BACKENDS
from megatron_lite.model.documents import Documents, attend_by_lengths, attend_in_blocks
from megatron_lite.monitor.versions import versions
from megatron_lite.parallel import launch
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.parallel.ring_attention import has_gpu_flash
from megatron_lite.train import build
from megatron_lite.train.step import train_step

LENGTH = 2048
MIXED = "mixed"


def micro_batch(documents: str, batch: int, vocab_size: int, *, resets: bool) -> MicroBatch:
    """Random tokens in documents of so many tokens each, or of mixed lengths."""
    source = np.random.default_rng(0)
    samples = []
    for _ in range(batch):
        if documents == MIXED:
            lengths = np.maximum(1, source.lognormal(np.log(300), 1.0, LENGTH)).astype(np.int64)
            starts = np.concatenate(([0], lengths.cumsum()))
        else:
            starts = np.arange(0, LENGTH, int(documents))
        tokens = source.integers(0, vocab_size, LENGTH + 1)
        samples.append(Sample(tokens, starts[starts < LENGTH]))
    return Assembly(resets, resets)(samples, first_sample=0, index=0, consumed_samples=0)


def in_turns(contenders: dict[str, Callable[[], None]], turns: int, device: torch.device) -> dict[str, float]:
    """Wall and CPU seconds of each contender, and the ratios of all to the first: medians over the turns."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(-1, turns):
        for name in sorted(contenders, reverse=turn % 2 == 1):
            began, used = time.perf_counter(), time.process_time()
            contenders[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:
                times[name].append((time.perf_counter() - began, time.process_time() - used))
    first, *others = contenders
    found = {}
    for place, what in enumerate(("wall", "cpu")):
        of = {name: [seconds[place] for seconds in measured] for name, measured in times.items()}
        found |= {f"{what}_seconds, {name}": statistics.median(of[name]) for name in contenders}
        for other in others:
            ratios = [slow / quick for slow, quick in zip(of[other], of[first], strict=True)]
            found[f"{what}_ratio, {other} / {first}"] = statistics.median(ratios)
    return found


def attention(documents: str, shape: Shape, dtype: torch.dtype, turns: int, device: torch.device) -> dict[str, float]:
    """The core of one layer, forward and backward: within documents, without boundaries, under a dense mask."""
    heads, groups = shape.model["num_attention_heads"], shape.model["num_query_groups"]
    width = shape.model["hidden_size"] // heads
    batch = micro_batch(documents, shape.micro_batch, 100, resets=True)
    inputs = [
        torch.randn(LENGTH, shape.micro_batch, count, width, device=device, dtype=dtype)
        .permute(1, 2, 0, 3)
        .requires_grad_()
        for count in (heads, groups, groups)
    ]
    numbers = batch.begins.cumsum(1).to(device)
    mask = (numbers[:, None, :, None] == numbers[:, None, None, :]).tril()
    gradient = torch.randn_like(inputs[0])

    def within() -> torch.Tensor:
        laid_out = Documents(batch.begins, device)
        if not laid_out.is_divided:
            return ATTENTION_BACKENDS["auto"](*inputs, None, 0.0, None)
        if has_gpu_flash(inputs[0]):
            return attend_by_lengths(*inputs, laid_out, 0.0, None)
        return attend_in_blocks(ATTENTION_BACKENDS["auto"], *inputs, laid_out, 0.0, None)

    ways = {
        "documents": within,
        "no boundaries": lambda: ATTENTION_BACKENDS["auto"](*inputs, None, 0.0, None),
        "dense mask": lambda: F.scaled_dot_product_attention(*inputs, attn_mask=mask, enable_gqa=True),
    }
    return in_turns(
        {name: lambda way=way: torch.autograd.grad(way(), inputs, gradient) for name, way in ways.items()},
        turns,
        device,
    )


def whole_step(documents: str, shape: Shape, bf16: bool, turns: int, mesh: ProcessMesh) -> dict[str, float]:
    """A training step on samples that hold such documents, with the flags and without."""
    config = run_config(shape, bf16=bf16, micro_batches=1, data_size=1, zero=int(bf16))
    vocab_size = config.model.vocab_size
    engine = build.build_engine(config, build.build_model(config, mesh, vocab_size), mesh)

    def step(resets: bool) -> None:
        batch = micro_batch(documents, shape.micro_batch, vocab_size, resets=resets)
        tokens = batch.loss_mask.sum().item()
        train_step(engine, mesh, [batch], target_tokens=tokens, step=1, seed=None, learning_rate=1e-4)

    contenders = {"documents": lambda: step(True), "no boundaries": lambda: step(False)}
    return in_turns(contenders, turns, mesh.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", nargs="+", default=["2048", "1024", "256", "64", "16", MIXED])
    parser.add_argument("--turns", type=int, default=7, help="turns of each contender")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    device = launch.start(launch.Launch.from_environment(), 10)
    mesh = ProcessMesh.create(MeshShape(), device)
    known = SHAPES["llama-1.5b" if device.type == "cuda" else "llama-6m"]
    shape = Shape(known.model, LENGTH, micro_batch=2)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    results = {}
    for documents in options.documents:
        for what, found in (
            ("attention", attention(documents, shape, dtype, options.turns, device)),
            ("step", whole_step(documents, shape, options.bf16, options.turns, mesh)),
        ):
            results[name := f"{what}, documents of {documents} tokens"] = found
            for measure, value in found.items():
                print(f"{name:36} {measure:40} {value:10.4f}", flush=True)
    if options.output:
        record = {
            "benchmark": "documents",
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "dtype": str(dtype).removeprefix("torch."),
            "turns": options.turns,
            "seq_length": LENGTH,
            "micro_batch_size": shape.micro_batch,
            "model": shape.model,
            "results": results,
            "versions": versions(),
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
