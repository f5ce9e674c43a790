"""Shared sequences train as whole ones do: losses, gradient norms, gradients, weights, and validation."""

from __future__ import annotations

import pytest
import torch
from ranks import run_on_ranks
from train.layouts import BATCH, LENGTH, VOCABULARY, Case, Outcome, assemble, config_of, run_cases

from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train import build
from megatron_lite.train.step import validate

TIGHT = 1e-5

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


def serial_of(case: Case) -> Case:
    """One process, no ZeRO; with dropout the same micro-batches, whose masks are their own."""
    kept = {}
    if case.dropout:
        kept = {"micro_batches": case.micro_batches * case.data, "dropout": case.dropout, "attention_dropout": 0.0}
    return Case(layers=case.layers, llama=case.llama, **kept)


@pytest.fixture(scope="module")
def serial() -> dict[Case, tuple[Outcome, dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    cases = sorted({serial_of(case) for cases in CASES.values() for case in cases}, key=str)
    (outcomes,) = run_on_ranks(run_cases, 1, cases)
    return {
        case: (outcome, assemble(outcome.pieces), assemble(outcome.gradients))
        for case, outcome in zip(cases, outcomes, strict=True)
    }


def difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the reference's; absolute where the reference is zero (a key bias)."""
    size = reference.norm().item()
    return (ours - reference).norm().item() / (size if size > 1e-5 else 1.0)


@pytest.mark.parametrize("ranks", sorted(CASES))
def test_shared_sequences_equal_serial(ranks, serial):
    by_rank = run_on_ranks(run_cases, ranks, CASES[ranks], timeout=400)
    faults = []
    for i, case in enumerate(CASES[ranks]):
        reference, weights, gradients = serial[serial_of(case)]
        outcomes = [outcomes[i] for outcomes in by_rank]
        assert all(outcome.curve == outcomes[0].curve for outcome in outcomes), f"{case}: ranks disagree"
        for step, (ours, theirs) in enumerate(zip(outcomes[0].curve, reference.curve, strict=True)):
            for what, a, b in zip(("loss", "gradient norm"), ours, theirs, strict=True):
                if abs(a - b) > TIGHT * abs(b):
                    faults.append(f"{case}: step {step + 1} {what} {a} against {b}")
        for what, ours, theirs in (
            ("gradient", assemble([p for o in outcomes for p in o.gradients]), gradients),
            ("weight", assemble([p for o in outcomes for p in o.pieces]), weights),
        ):
            assert ours.keys() == theirs.keys()
            for name in theirs:
                if (apart := difference(ours[name], theirs[name])) > TIGHT:
                    faults.append(f"{case}: {what} {name} differs by {apart:.1e}")
    assert not faults, "\n".join(faults)


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
    reference = serial[Case()][0].curve
    for case, outcome in zip(cases, outcomes, strict=True):
        for ours, theirs in zip(outcome.curve, reference, strict=True):
            assert ours[0] == pytest.approx(theirs[0], rel=5e-3), case
            assert ours[1] == pytest.approx(theirs[1], rel=5e-2), case
