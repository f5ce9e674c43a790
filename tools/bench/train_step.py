#!/usr/bin/env python
"""Tokens a second of our training step beside transformers' model in a plain torch loop.

Both have the same shape, batch, process count and precision, and run in turn within one process, a
round each, so that a busy machine slows both. The ratio is the median over rounds.

    python tools/bench/train_step.py --output tools/bench/results/train_step-cpu.json
    torchrun --nproc_per_node 2 tools/bench/train_step.py
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.monitor.versions import versions
from megatron_lite.parallel import launch
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train import build
from megatron_lite.train.step import train_step

SHAPES = {
    # Of the quickstart's order of size, so that a CPU takes a step in tenths of a second.
    "gpt2-small-cpu": {"num_layers": 6, "hidden_size": 256, "num_attention_heads": 8, "vocab_size": 4096},
    "llama-small-cpu": {
        "num_layers": 6,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "ffn_hidden_size": 688,
        "vocab_size": 4096,
    },
    "gpt2-124m": {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "vocab_size": 50257},
    "llama-1b": {
        "num_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "ffn_hidden_size": 8192,
        "vocab_size": 128256,
    },
}
LLAMA = {
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
}
Step = Callable[[int], float]


def ours(config: RunConfig, mesh: ProcessMesh) -> Step:
    """Our step: loader, model, DeepSpeed ZeRO 1 and fused AdamW; returns the loss."""
    vocab_size = config.model.vocab_size
    engine = build.build_engine(config, build.build_model(config, mesh, vocab_size), mesh)
    loader = build.open_loader(config, build.open_stream(config, "train", vocab_size), mesh, vocab_size)
    batch = config.training.global_batch_size
    tokens = batch * config.data.seq_length

    def step(number: int) -> float:
        micro_batches = loader.step(number * batch, batch)
        return train_step(
            engine,
            mesh,
            micro_batches,
            target_tokens=tokens,
            step=number + 1,
            seed=None,
            learning_rate=config.optimizer.lr,
        ).loss

    return step


def theirs(config: RunConfig, mesh: ProcessMesh, *, compiled: bool = False) -> Step:
    """transformers' model of that shape with torch's fused AdamW, clipping, DDP over several ranks."""
    model = _transformers_model(config).to(mesh.device)
    model.train()
    bf16 = config.precision.bf16
    if mesh.world_size > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    called = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay, fused=True
    )
    vocab_size, batch = config.model.vocab_size, config.training.global_batch_size
    loader = build.open_loader(config, build.open_stream(config, "train", vocab_size), mesh, vocab_size)

    def step(number: int) -> float:
        total = 0.0
        micro_batches = loader.step(number * batch, batch)
        for micro_batch in micro_batches:
            tokens, labels = micro_batch.tokens.to(mesh.device), micro_batch.labels.to(mesh.device)
            with torch.autocast(mesh.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
                logits = called(tokens).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
            (loss / len(micro_batches)).backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total) / len(micro_batches)

    return step


def _transformers_model(config: RunConfig) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    model, length = config.model, config.data.seq_length
    torch.manual_seed(0)
    if model.swiglu:
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=model.vocab_size,
                hidden_size=model.hidden_size,
                intermediate_size=model.ffn_size,
                num_hidden_layers=model.num_layers,
                num_attention_heads=model.num_attention_heads,
                num_key_value_heads=model.kv_heads,
                max_position_embeddings=length,
                attn_implementation="sdpa",
                use_cache=False,
            )
        )
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=model.vocab_size,
            n_positions=length,
            n_embd=model.hidden_size,
            n_layer=model.num_layers,
            n_head=model.num_attention_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )


def run_config(shape: str, *, bf16: bool, seq_length: int, micro_batch: int, global_batch: int, zero: int) -> RunConfig:
    """The configuration of one comparison, dropout 0."""
    model = {**SHAPES[shape], "hidden_dropout": 0.0, "attention_dropout": 0.0}
    return sources.override(
        RunConfig(),
        {
            "model": model | (LLAMA if shape.startswith("llama") else {}),
            "parallel": {"zero_stage": zero},
            "precision": {"bf16": bf16},
            "data": {"mock_data": True, "seq_length": seq_length},
            "training": {"micro_batch_size": micro_batch, "global_batch_size": global_batch, "train_iters": 1},
        },
    )


def compare(config: RunConfig, mesh: ProcessMesh, *, rounds: int, steps: int, compiled: bool) -> dict[str, object]:
    """Median tokens a second of each, and the median of the rounds' ratios ours / theirs."""
    contenders: dict[str, Step] = {"ours": ours(config, mesh), "transformers": theirs(config, mesh)}
    if compiled:
        contenders["transformers, compiled"] = theirs(config, mesh, compiled=True)
    tokens = config.training.global_batch_size * config.data.seq_length * steps
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for name, step in contenders.items():
        for number in range(3):
            step(number)
    for turn in range(rounds):
        order = list(contenders.items())
        for name, step in order if turn % 2 == 0 else reversed(order):
            _settle(mesh)
            began = time.perf_counter()
            for number in range(steps):
                step(3 + turn * steps + number)
            _settle(mesh)
            speeds[name].append(tokens / (time.perf_counter() - began))
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(speeds["ours"], speeds[name], strict=True))
        for name in contenders
        if name != "ours"
    }
    return {"tokens_per_second": medians, "ratio_ours_over": ratios}


def _settle(mesh: ProcessMesh) -> None:
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()
    if mesh.world_size > 1:
        dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), help="default: by device")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="steps a round")
    parser.add_argument("--seq-length", type=int)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="default on a GPU")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()

    me = launch.Launch.from_environment()
    device = launch.start(me, 10)
    mesh = ProcessMesh.create(MeshShape(data=me.world_size), device)
    on_gpu = device.type == "cuda"
    shapes = options.shapes or (["gpt2-124m", "llama-1b"] if on_gpu else ["gpt2-small-cpu", "llama-small-cpu"])
    results = {}
    for shape in shapes:
        config = run_config(
            shape,
            bf16=options.bf16 or on_gpu,
            seq_length=options.seq_length or (1024 if on_gpu else 256),
            micro_batch=options.micro_batch_size,
            global_batch=options.micro_batch_size * options.micro_batches * me.world_size,
            zero=options.zero_stage,
        )
        compiled = on_gpu and not options.no_compile
        results[shape] = compare(config, mesh, rounds=options.rounds, steps=options.steps, compiled=compiled)
        if me.rank == 0:
            for name, speed in results[shape]["tokens_per_second"].items():
                print(f"{shape:18} {name:24} {speed:12,.0f} tokens/s")
            for name, ratio in results[shape]["ratio_ours_over"].items():
                print(f"{shape:18} ours / {name:17} {ratio:12.2f}")
    if me.rank == 0 and options.output:
        record = {
            "benchmark": "train_step",
            "device": torch.cuda.get_device_name() if on_gpu else f"CPU {platform.machine()}",
            "processes": me.world_size,
            "threads": torch.get_num_threads(),
            "precision": "bf16" if options.bf16 or on_gpu else "fp32",
            "zero_stage": options.zero_stage,
            "results": results,
            "versions": versions(),
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n")
    build.close_ranks()


if __name__ == "__main__":
    main()
