"""A run says what its kernels are, refuses what --require-native-kernels forbids, and learns alike with either."""

from __future__ import annotations

import io
import re

import pytest
import torch
from ranks import run_on_ranks
from train.layouts import BATCH, LENGTH, VOCABULARY, Case, config_of

from megatron_lite import log
from megatron_lite.errors import UserError
from megatron_lite.kernels import extension
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train import build
from megatron_lite.train.step import train_step

STEPS = 20


def _prepare(forgone_by: int | None, require: bool, backend: str) -> tuple[str, str]:
    """What this rank says, and the error that ends it."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if rank == forgone_by:
        extension.forgo("cpu", "the test says so")
    log.configure(rank, size, stream := io.StringIO())
    config = config_of(Case(), kernels={"require_native_kernels": require, "norm_backend": backend})
    try:
        build.prepare_kernels(config, ProcessMesh.create(MeshShape(data=size)))
    except UserError as error:
        assert error.exit_code == 2
        return stream.getvalue(), str(error)
    return stream.getvalue(), ""


def test_rank_0_says_what_the_kernels_are():
    (first, _), (second, _) = run_on_ranks(_prepare, 2, None, True, "native")
    assert re.search(
        r"kernels: native \(cpu (baseline|avx2|avx512), 1 thread\); --norm-backend native, --attention-backend auto\n",
        first,
    )
    assert second == ""
    ((said, error),) = run_on_ranks(_prepare, 1, 0, False, "native")
    assert "kernels: plain torch (cpu)" in said and error == ""


def test_a_gap_on_one_rank_stops_all():
    for said, error in run_on_ranks(_prepare, 2, 1, True, "native"):
        assert said == "" and "rank 1" in error and "kernels for cpu are not native, since the test says so" in error
    for _, error in run_on_ranks(_prepare, 2, None, False, "apex"):
        assert "--norm-backend apex" in error and "leave --norm-backend at native" in error


def _curve(case: Case, attention_dropout: float, native: bool, kernels: dict[str, object]) -> list[float]:
    if not native:
        extension.forgo("cpu", "the reference is compared")
    mesh = ProcessMesh.create(MeshShape())
    model = {"hidden_dropout": 0.1, "attention_dropout": attention_dropout}
    config = config_of(case, model=model, kernels=kernels)
    engine = build.build_engine(config, build.build_model_to_train(config, mesh, VOCABULARY), mesh)
    loader = build.open_loader(config, build.open_stream(config, "train", VOCABULARY), mesh, VOCABULARY)
    losses = []
    for step in range(STEPS):
        batches = loader.step(step * BATCH, BATCH)
        target_tokens = BATCH * LENGTH
        result = train_step(
            engine, mesh, batches, target_tokens=target_tokens, step=step + 1, seed=3, learning_rate=1e-2
        )
        losses.append(result.loss)
    assert extension.load("cpu") is native
    return losses


@pytest.mark.parametrize("llama", [False, True], ids=["gpt2", "llama"])
@pytest.mark.parametrize(
    ("attention_dropout", "choices"),
    [
        (0.0, ({}, {"norm_backend": "torch", "attention_backend": "fused_softmax"})),
        # Each backend of attention draws masks of its own.
        (0.1, ({}, {"memory_efficient_layer_norm": True})),
    ],
)
def test_the_loss_curve_is_that_of_the_references(llama, attention_dropout, choices):
    case = Case(llama=llama, steps=STEPS)
    (reference,) = run_on_ranks(_curve, 1, case, attention_dropout, False, {})
    assert reference[-1] < reference[0] - 0.3, "nothing is learned, so nothing is compared"
    for kernels in choices:
        (ours,) = run_on_ranks(_curve, 1, case, attention_dropout, True, kernels)
        assert ours != reference, "the same code ran twice"
        assert max(abs(a - b) for a, b in zip(ours, reference, strict=True)) < 1e-4
