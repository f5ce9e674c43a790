"""The models that whole steps are measured on, and our step of one."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable
from typing import Any

import torch

from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train import build
from megatron_lite.train.step import train_step

LLAMA = {
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and its micro-batch, of which a step takes a part of a second on the device it is meant for."""

    model: dict[str, Any]
    seq_length: int
    micro_batch: int


SHAPES = {
    "gpt2-tiny": Shape(
        {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512}, seq_length=32, micro_batch=2
    ),
    "gpt2-7m": Shape(
        {"num_layers": 6, "hidden_size": 256, "num_attention_heads": 8, "vocab_size": 4096},
        seq_length=256,
        micro_batch=4,
    ),
    "llama-6m": Shape(
        {
            "num_layers": 6,
            "hidden_size": 256,
            "num_attention_heads": 8,
            "num_query_groups": 4,
            "ffn_hidden_size": 688,
            "vocab_size": 4096,
            **LLAMA,
        },
        seq_length=256,
        micro_batch=4,
    ),
    "gpt2-124m": Shape(
        {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "vocab_size": 50257},
        seq_length=1024,
        micro_batch=16,
    ),
    "llama-1.5b": Shape(
        {
            "num_layers": 16,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_query_groups": 8,
            "ffn_hidden_size": 8192,
            "vocab_size": 128256,
            **LLAMA,
        },
        seq_length=2048,
        micro_batch=2,
    ),
}
Step = Callable[[int], float]
"""A training step by its number; returns the loss."""


def ours(config: RunConfig, mesh: ProcessMesh) -> Step:
    """Our step: loader, model, fused AdamW, and DeepSpeed from ZeRO 1 on."""
    vocab_size = config.model.vocab_size
    engine = build.build_engine(config, build.build_model(config, mesh, vocab_size), mesh)
    loader = build.open_loader(config, build.open_stream(config, "train", vocab_size), mesh, vocab_size)
    batch = config.training.global_batch_size

    def step(number: int) -> float:
        return train_step(
            engine,
            mesh,
            loader.step(number * batch, batch),
            target_tokens=batch * config.data.seq_length,
            step=number + 1,
            seed=None,
            learning_rate=config.optimizer.lr,
        ).loss

    return step


def run_config(shape: Shape, *, bf16: bool, micro_batches: int, data_size: int, zero: int) -> RunConfig:
    """The configuration of one contender, dropout 0."""
    batch = shape.micro_batch * micro_batches * data_size
    return sources.override(
        RunConfig(),
        {
            "model": {**shape.model, "hidden_dropout": 0.0, "attention_dropout": 0.0},
            "parallel": {"zero_stage": zero},
            "precision": {"bf16": bf16},
            "data": {"mock_data": True, "seq_length": shape.seq_length},
            "training": {"micro_batch_size": shape.micro_batch, "global_batch_size": batch, "train_iters": 1},
        },
    )


def device_name(device: torch.device) -> str:
    """The device as results name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine().replace('_', '-')}, {os.cpu_count()} cores"
