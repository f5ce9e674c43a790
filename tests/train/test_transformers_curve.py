"""The right curve: 50 steps give the losses of `transformers`' model in a plain torch loop."""

from __future__ import annotations

import pytest
import torch
from ranks import run_on_ranks
from transformers_models import gpt2, llama, load_serial, serial

from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.data.feed import build_stream
from megatron_lite.optim.schedule import schedule
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train import build
from megatron_lite.train.step import train_step

STEPS, BATCH, LENGTH, VOCABULARY = 50, 4, 32, 101
LR, MIN_LR, WARMUP, DECAY = 3e-3, 0.0, 5, 0.1


def _models(kind: str):
    torch.manual_seed(0)
    make = {"gpt2": gpt2, "llama": lambda *sizes: llama(*sizes, kv_heads=2)}[kind]
    return make(VOCABULARY, LENGTH)


def _config(kind: str, tensor: int) -> RunConfig:
    _, model = _models(kind)
    config = RunConfig(model=model)
    return sources.override(
        config,
        {
            "model": {"vocab_size": VOCABULARY},
            "parallel": {"tensor_model_parallel_size": tensor, "zero_stage": 1},
            "optimizer": {"lr": LR, "min_lr": MIN_LR, "lr_warmup_iters": WARMUP, "weight_decay": DECAY},
            "data": {"mock_data": True, "seq_length": LENGTH},
            "training": {"micro_batch_size": 2, "global_batch_size": BATCH, "train_iters": STEPS},
        },
    )


def _stream(config: RunConfig):
    return build_stream(config.data, seed=config.training.seed, split="train", vocab_size=VOCABULARY)


def _plain_loop(kind: str) -> list[float]:
    """Nobody here wrote model, optimizer or schedule; the loop is what a tutorial has."""
    from transformers import get_cosine_schedule_with_warmup

    model, _ = _models(kind)
    stream = _stream(_config(kind, 1))
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8)
    curve = get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    losses = []
    for step in range(STEPS):
        samples = torch.stack([torch.from_numpy(stream[step * BATCH + i].tokens) for i in range(BATCH)])
        logits = model(samples[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        curve.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _our_loop(kind: str, tensor: int) -> list[float]:
    config = _config(kind, tensor)
    mesh = ProcessMesh.create(MeshShape.of_world(torch.distributed.get_world_size(), tensor=tensor))
    model = build.build_model(config, mesh, VOCABULARY)
    load_serial(model, serial(_models(kind)[0]))
    engine = build.build_engine(config, model, mesh)
    loader = build.open_loader(config, _stream(config), mesh, VOCABULARY)
    curve = schedule(config.optimizer, STEPS, STEPS * BATCH, config.model.hidden_size)
    losses = []
    for step in range(STEPS):
        result = train_step(
            engine,
            mesh,
            loader.step(step * BATCH, BATCH),
            target_tokens=BATCH * LENGTH,
            step=step + 1,
            seed=None,
            learning_rate=curve.learning_rate(step, step * BATCH),
        )
        losses.append(result.loss)
    return losses


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_fifty_steps_equal_transformers_in_a_plain_loop(kind):
    theirs = _plain_loop(kind)
    assert theirs[-1] < theirs[0] - 0.3, "nothing is learned, so nothing is compared"
    for tensor in (1, 2):
        for ours in run_on_ranks(_our_loop, tensor, kind, tensor):
            assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4
