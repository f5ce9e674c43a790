#!/usr/bin/env python
"""Tokens a second of our training step beside transformers' model in a plain torch loop.

All contenders have the same shape, batch, process count and precision, and take turns within one
process, a few steps each, so that a busy machine slows all of them. A ratio is the median over the
turns. On a CPU the ratio of CPU seconds stands beside it: waiting for a core is not in it.

    python tools/bench/train_step.py --output results.json
    torchrun --nproc-per-node 2 tools/bench/train_step.py
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from step_cases.ours import SHAPES, Step, device_name, ours, run_config

from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.monitor.versions import versions
from megatron_lite.parallel import launch
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.plan.devices import dense_peak_flops
from megatron_lite.plan.flops import flops_per_token
from megatron_lite.train import build


def theirs(config: RunConfig, mesh: ProcessMesh, *, compiled: bool) -> dict[str, Step]:
    """transformers' model with torch's fused AdamW and clipping, DDP over several ranks, autocast in bf16.

    Eager and, if wanted, compiled: two ways to call one model.
    """
    model = transformers_model(config).to(mesh.device).train()
    if mesh.world_size > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    options = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=options.lr,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_eps,
        weight_decay=options.weight_decay,
        fused=True,
    )
    vocab_size, batch = config.model.vocab_size, config.training.global_batch_size
    loader = build.open_loader(config, build.open_stream(config, "train", vocab_size), mesh, vocab_size)

    def step(called: Callable, number: int) -> float:
        total = torch.zeros((), device=mesh.device)
        micro_batches = loader.step(number * batch, batch)
        for position, micro_batch in enumerate(micro_batches):
            tokens, labels = micro_batch.tokens.to(mesh.device), micro_batch.labels.to(mesh.device)
            more_to_come = mesh.world_size > 1 and position < len(micro_batches) - 1
            with model.no_sync() if more_to_come else contextlib.nullcontext():
                with torch.autocast(mesh.device.type, torch.bfloat16, enabled=config.precision.bf16):
                    logits = called(tokens).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
                (loss / len(micro_batches)).backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item() / len(micro_batches)

    contenders: dict[str, Step] = {"transformers": lambda number: step(model, number)}
    if compiled:
        quick = torch.compile(model)
        contenders["transformers, compiled"] = lambda number: step(quick, number)
    return contenders


def transformers_model(config: RunConfig) -> torch.nn.Module:
    """transformers' GPT-2 or LLaMA of the configured shape, without dropout, attention by torch's kernels."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    model, length = config.model, config.data.seq_length
    shared = {
        "vocab_size": model.vocab_size,
        "attn_implementation": "sdpa",
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    if model.swiglu:
        return LlamaForCausalLM(
            LlamaConfig(
                **shared,
                hidden_size=model.hidden_size,
                intermediate_size=model.ffn_size,
                num_hidden_layers=model.num_layers,
                num_attention_heads=model.num_attention_heads,
                num_key_value_heads=model.kv_heads,
                max_position_embeddings=length,
            )
        )
    return GPT2LMHeadModel(
        GPT2Config(
            **shared,
            n_positions=length,
            n_embd=model.hidden_size,
            n_layer=model.num_layers,
            n_head=model.num_attention_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def compare(
    config: RunConfig, mesh: ProcessMesh, *, zero_stages: list[int], turns: int, steps: int, compiled: bool
) -> dict[str, Any]:
    """Each contender's median speed, and the medians over turns of the first of ours over the others."""
    contenders = {
        f"ours, ZeRO {zero}": ours(sources.override(config, {"parallel": {"zero_stage": zero}}), mesh)
        for zero in zero_stages
    } | theirs(config, mesh, compiled=compiled)
    warm_up = 3
    for step in contenders.values():
        for number in range(warm_up):
            step(number)
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    processor: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns):
        order = list(contenders.items())
        for name, step in order if turn % 2 == 0 else reversed(order):
            _settle(mesh)
            began, used = time.perf_counter(), time.process_time()
            for number in range(steps):
                step(warm_up + turn * steps + number)
            _settle(mesh)
            wall[name].append(time.perf_counter() - began)
            processor[name].append(time.process_time() - used)

    tokens = config.training.global_batch_size * config.data.seq_length * steps
    ahead = f"ours, ZeRO {zero_stages[0]}"
    speeds = {name: tokens / statistics.median(seconds) for name, seconds in wall.items()}
    found: dict[str, Any] = {
        "tokens_per_second": speeds,
        "speed_ratio": {f"{ahead} / {name}": _ratio(wall[name], wall[ahead]) for name in contenders if name != ahead},
    }
    if mesh.device.type == "cpu":
        found["cpu_seconds_a_step"] = {name: statistics.median(used) / steps for name, used in processor.items()}
        found["cpu_seconds_ratio"] = {
            f"{name} / {ahead}": _ratio(processor[name], processor[ahead]) for name in contenders if name != ahead
        }
        return found
    flops = flops_per_token(config.model, vocab_size=config.model.vocab_size, seq_length=config.data.seq_length)
    peak = dense_peak_flops(torch.cuda.get_device_name(mesh.device), config.precision.dtype)
    if peak is not None:
        found["mfu"] = {name: speed * flops / (peak * mesh.world_size) for name, speed in speeds.items()}
    return found


def _ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _settle(mesh: ProcessMesh) -> None:
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()
    if mesh.world_size > 1:
        dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="default: by device")
    parser.add_argument("--zero-stages", nargs="+", type=int, help="default: 1, and 0 in fp32")
    parser.add_argument("--turns", type=int, default=9, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--micro-batches", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--micro-batch-size", type=int, help="default: the shape's")
    parser.add_argument("--bf16", action="store_true", help="default on a GPU")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out on a GPU")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()

    me = launch.Launch.from_environment()
    device = launch.start(me, 10)
    mesh = ProcessMesh.create(MeshShape(data=me.world_size), device)
    on_gpu = device.type == "cuda"
    bf16 = options.bf16 or on_gpu
    zero_stages = options.zero_stages or ([1] if bf16 else [1, 0])
    results = {}
    for name in options.shapes or (["gpt2-124m", "llama-1.5b"] if on_gpu else ["gpt2-7m", "llama-6m"]):
        shape = SHAPES[name]
        if options.micro_batch_size:
            shape = dataclasses.replace(shape, micro_batch=options.micro_batch_size)
        config = run_config(
            shape, bf16=bf16, micro_batches=options.micro_batches, data_size=me.world_size, zero=zero_stages[0]
        )
        found = compare(
            config,
            mesh,
            zero_stages=zero_stages,
            turns=options.turns,
            steps=options.steps,
            compiled=on_gpu and not options.no_compile,
        )
        results[name] = {"tokens_a_step": config.training.global_batch_size * config.data.seq_length, **found}
        if me.rank == 0:
            for what, values in found.items():
                for which, value in values.items():
                    print(f"{name:10} {what:18} {which:40} {value:14,.3f}", flush=True)
    if me.rank == 0 and options.output:
        record = {
            "benchmark": "train_step",
            "device": device_name(device),
            "processes": me.world_size,
            "threads_a_process": torch.get_num_threads(),
            "precision": "bf16" if bf16 else "fp32",
            "results": results,
            "versions": {**versions(), "transformers": sys.modules["transformers"].__version__},
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n")
    build.close_ranks()


if __name__ == "__main__":
    main()
