"""Shared sequences train as whole ones do: losses, gradient norms, gradients, weights, and validation."""

from __future__ import annotations

import pytest
import torch
from ranks import run_on_ranks
from train.layouts import BATCH, LENGTH, VOCABULARY, Case, config_of, run_cases
from train.serial import Reference, assert_equals_serial, run_serially

from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train import build
from megatron_lite.train.step import validate

CASES = {
    2: [
        Case(context=2, zero=0),
        Case(context=2, zero=1, llama=True, micro_batches=2, exchange="a2a"),
        Case(context=2, zero=2, llama=True, micro_batches=2, backend="fused_softmax"),
        Case(context=2, zero=3, recompute="full"),
        Case(context=2, zero=1, recompute="selective", loss_chunk_size=20, llama=True),
        Case(context=2, zero=3, exchange="a2a", recompute="selective", backend="fused_softmax"),
        # Masks of dropout are those of the whole sequence; probabilities have none, whose masks follow the rank.
        Case(context=2, zero=1, dropout=0.1, attention_dropout=0.0),
        Case(context=2, zero=2, dropout=0.1, attention_dropout=0.0, exchange="a2a", micro_batches=2),
    ],
    4: [
        Case(context=4, zero=1),
        Case(context=2, data=2, zero=0, llama=True),
        Case(context=2, data=2, zero=2, llama=True, micro_batches=2),
        Case(context=2, data=2, zero=3, micro_batches=2),
        Case(context=2, tensor=2, zero=0, sequence_parallel=True),
        Case(context=2, tensor=2, zero=2, sequence_parallel=True, llama=True, exchange="a2a"),
        Case(context=2, tensor=2, zero=3, sequence_parallel=True, micro_batches=2),
        Case(context=2, tensor=2, zero=1, sequence_parallel=True, dropout=0.1, attention_dropout=0.0),
        Case(context=2, pipe=2, layers=4, micro_batches=2, zero=1, llama=True),
        Case(context=2, pipe=2, layers=4, micro_batches=4, zero=2, exchange="a2a", dropout=0.1, attention_dropout=0.0),
        Case(context=2, pipe=2, layers=4, schedule="ZBVZeroBubble", micro_batches=4, zero=1),
        Case(context=2, pipe=2, layers=4, virtual=2, micro_batches=2, zero=3, recompute="full"),
    ],
    8: [
        Case(context=2, data=2, tensor=2, zero=1, sequence_parallel=True, llama=True),
        Case(context=2, data=2, tensor=2, zero=3, sequence_parallel=True, exchange="a2a"),
        Case(context=2, tensor=2, pipe=2, layers=4, sequence_parallel=True, micro_batches=2, zero=2),
        Case(context=4, data=2, zero=2, llama=True),
    ],
}


@pytest.fixture(scope="module")
def serial() -> dict[Case, Reference]:
    return run_serially(case for cases in CASES.values() for case in cases)


@pytest.mark.parametrize("ranks", sorted(CASES))
def test_shared_sequences_equal_serial(ranks, serial):
    assert_equals_serial(ranks, CASES[ranks], serial)


def _judged(exchange: str, pipe: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Token losses, guesses and logits of a length that is shared out, and of one that cannot be."""
    context = torch.distributed.get_world_size() // pipe
    case = Case(pipe=pipe, context=context, exchange=exchange, llama=True)
    mesh = ProcessMesh.create(MeshShape(pipe, context=context))
    model = build.build_model(config_of(case), mesh, VOCABULARY).eval()
    found = []
    for length in (LENGTH, LENGTH - 3):
        tokens = torch.randint(VOCABULARY, (3, length), generator=torch.Generator().manual_seed(length))
        found.append((*model.token_losses(tokens, tokens.roll(-1, 1)), model.logits(tokens)))
    return found


@pytest.mark.parametrize(("exchange", "pipe"), [("p2p", 1), ("a2a", 2)])
def test_every_rank_judges_whole_sequences(exchange, pipe):
    (whole,) = run_on_ranks(_judged, 1, exchange, 1)
    for found in run_on_ranks(_judged, 2 * pipe, exchange, pipe):
        for ours, theirs in zip(found, whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def _validate() -> float:
    context = torch.distributed.get_world_size()
    mesh = ProcessMesh.create(MeshShape(context=context))
    config = config_of(Case(context=context, zero=3, dropout=0.1, attention_dropout=0.0))
    engine = build.build_engine(config, build.build_model_to_train(config, mesh, VOCABULARY), mesh)
    loader = build.open_loader(config, build.open_stream(config, "valid", VOCABULARY), mesh, VOCABULARY)
    return validate(engine, mesh, loader, 2, BATCH, lambda: False)


def test_validation_counts_each_token_once():
    (whole,) = run_on_ranks(_validate, 1)
    assert run_on_ranks(_validate, 2) == [pytest.approx(whole, rel=1e-6)] * 2


def _drop_probabilities() -> None:
    mesh = ProcessMesh.create(MeshShape(context=2))
    model = build.build_model(config_of(Case(context=2, dropout=0.1)), mesh, VOCABULARY)
    tokens = torch.zeros(1, LENGTH, dtype=torch.int64)
    with pytest.raises(ValueError, match="no probabilities to drop"):
        model(tokens, tokens, torch.ones_like(tokens), dropout_seed=1)
    with pytest.raises(ValueError, match="sequence of 10 cannot be cut into 2 x 2 chunks"):
        model(tokens[:, :10], tokens[:, :10], torch.ones_like(tokens[:, :10]))


def test_what_cannot_work_is_refused_by_the_model_too():
    run_on_ranks(_drop_probabilities, 2)


def test_bf16_follows_fp32(serial):
    cases = [
        Case(context=2, zero=1, dtype="bf16"),
        Case(context=2, zero=3, dtype="bf16", exchange="a2a"),
        Case(context=2, zero=2, dtype="bf16", backend="fused_softmax"),
    ]
    outcomes, _ = run_on_ranks(run_cases, 2, cases, timeout=200)
    reference = serial[Case()].curve
    for case, outcome in zip(cases, outcomes, strict=True):
        for ours, theirs in zip(outcome.curve, reference, strict=True):
            assert ours[0] == pytest.approx(theirs[0], rel=5e-3), case
            assert ours[1] == pytest.approx(theirs[1], rel=5e-2), case
