"""Shared sequences train as whole ones do: losses, gradient norms, gradients, weights, and validation."""

from __future__ import annotations

import pytest
import torch
from ranks import run_on_ranks
from train.layouts import Case, Outcome, assemble, run_cases

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
