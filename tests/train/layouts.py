"""Short training runs at many layouts, for tests that compare them."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train import build
from megatron_lite.train.engine_interface import Engine
from megatron_lite.train.step import train_step
from megatron_lite.train.trace import Trace, trace

VOCABULARY, LENGTH, BATCH = 101, 16, 4
GPT2: dict[str, Any] = {}
LLAMA: dict[str, Any] = {
    "num_query_groups": 2,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
}
QWEN3: dict[str, Any] = LLAMA | {
    "qk_layernorm": True,
    "kv_channels": 12,
    "add_qkv_bias": True,
    "use_rope_scaling": True,
    "rope_scaling_original_length": 8,
}
"""And what Qwen2 and Llama 3.1 have beside."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One layout and what else differs from the serial run."""

    tensor: int = 1
    data: int = 1
    zero: int = 0
    sequence_parallel: bool = False
    micro_batches: int = 1
    dtype: str = "fp32"
    llama: bool = False
    optimizer: str = "adamw"
    adam_eps: float = 1e-5
    recompute: str = "none"
    loss_chunk_size: int = 0
    steps: int = 5
    pipe: int = 1
    schedule: str | None = None
    virtual: int | None = None
    pipeline_layout: str | None = None
    layers: int = 2
    dropout: float = 0.0
    attention_dropout: float | None = None
    context: int = 1
    exchange: str = "p2p"
    backend: str = "auto"
    qwen3: bool = False
    batch: int = BATCH
    model: tuple[tuple[str, Any], ...] = ()
    """Fields of the model section that differ beside."""
    documents: bool = False
    """Attention and positions begin anew with each document."""
    pieces: int = 0
    """Tokens of a sequence at first, by a curriculum over three steps."""
    loss_scale: float = 2.0**20
    """Of fp16, to begin with; the first gradient overflows."""

    def __str__(self) -> str:
        changed = (f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self))
        return ",".join(
            text
            for text, f in zip(changed, dataclasses.fields(self), strict=True)
            if getattr(self, f.name) != f.default
        )


def config_of(case: Case, **sections: dict[str, Any]) -> RunConfig:
    """A two-layer model with more vocabulary rows than ids, trained on mock data."""
    fields: sources.Overrides = {
        "model": {
            "num_layers": case.layers,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "vocab_size": VOCABULARY,
            "make_vocab_size_divisible_by": 8,
            "hidden_dropout": case.dropout,
            "attention_dropout": case.dropout if case.attention_dropout is None else case.attention_dropout,
            **(QWEN3 if case.qwen3 else LLAMA if case.llama else GPT2),
            **dict(case.model),
        },
        "parallel": {
            "tensor_model_parallel_size": case.tensor,
            "sequence_parallel": case.sequence_parallel,
            "zero_stage": case.zero,
            "pipeline_model_parallel_size": case.pipe,
            "pipeline_schedule": case.schedule,
            "num_virtual_stages_per_pipeline_rank": case.virtual,
            "pipeline_model_parallel_layout": case.pipeline_layout,
            "context_parallel_size": case.context,
            "cp_comm_type": case.exchange,
        },
        "kernels": {"loss_chunk_size": case.loss_chunk_size, "attention_backend": case.backend},
        "precision": {
            "bf16": case.dtype == "bf16",
            "fp16": case.dtype == "fp16",
            "initial_loss_scale": case.loss_scale,
            "hysteresis": 1,
            "loss_scale_window": 3,
        },
        # A tiny epsilon would turn the rounding noise of zero gradients into steps.
        "optimizer": {"lr": 1e-2, "adam_eps": case.adam_eps, "optimizer": case.optimizer},
        "data": {
            "mock_data": True,
            "seq_length": LENGTH,
            "reset_attention_mask": case.documents,
            "reset_position_ids": case.documents,
        },
        "training": {
            "train_iters": case.steps,
            "micro_batch_size": case.batch // case.data // case.micro_batches,
            "global_batch_size": case.batch,
            "recompute_granularity": case.recompute,
        },
    }
    if case.pieces:
        lengths = {"min": case.pieces, "samples": 3 * case.batch, "step": 1}
        fields["data"] |= {f"curriculum_seq_length_{name}": value for name, value in lengths.items()}
    for section, values in sections.items():
        fields.setdefault(section, {}).update(values)
    return sources.override(RunConfig(), fields)


def run_cases(cases: list[Case]) -> list[Trace]:
    """Each case on the ranks that call; all of them fit the number of ranks."""
    # DeepSpeed counts the modules of a process, and in ZeRO 3 compares the counts of ranks, though not in a pipeline.
    found = {case: run_case(case) for case in sorted(cases, key=lambda case: case.pipe)}
    return [found[case] for case in cases]


def run_case(case: Case) -> Trace:
    """A case on the ranks that call."""
    if case.dtype == "fp16":
        pretend_fp16()
    mesh = ProcessMesh.create(MeshShape(case.pipe, case.data, case.context, tensor=case.tensor))
    return trace(config_of(case), mesh, VOCABULARY, steps=case.steps)


def curve_of(config: RunConfig, engine: Engine, mesh: ProcessMesh, steps: range) -> list[tuple[float, float]]:
    """Loss and gradient norm of those steps, trained at the peak learning rate without dropout or a pipeline."""
    loader = build.open_loader(config, build.open_stream(config, "train", VOCABULARY), mesh, VOCABULARY)
    curve = []
    for step in steps:
        result = train_step(
            engine,
            mesh,
            loader.step(step * BATCH, BATCH),
            target_tokens=BATCH * LENGTH,
            step=step + 1,
            seed=None,
            learning_rate=config.optimizer.lr,
        )
        curve.append((result.loss, result.outcome.grad_norm))
    return curve


def pretend_fp16() -> None:
    """Make this process take its CPU for one that is fit for fp16: arithmetic is slow there, but right."""
    from deepspeed.accelerator import get_accelerator

    from megatron_lite.config import check

    get_accelerator().is_fp16_supported = lambda: True
    check.precision_problems = lambda *_, **__: []
