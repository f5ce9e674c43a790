"""What every layout is held to: the same training in one process, without ZeRO."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from ranks import run_on_ranks
from train.layouts import Case, Outcome, assemble, run_cases

TIGHT = 1e-5


class Reference(NamedTuple):
    """A serial run, and its tensors whole."""

    outcome: Outcome
    weights: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def serial_of(case: Case) -> Case:
    """One process, one micro-batch, no ZeRO; with dropout the same micro-batches, whose masks are their own."""
    kept = {}
    if case.dropout:
        kept = {"micro_batches": case.micro_batches * case.data, "dropout": case.dropout}
        kept["attention_dropout"] = case.attention_dropout
    shape = {"layers": case.layers, "llama": case.llama, "qwen3": case.qwen3}
    return Case(**shape, steps=case.steps, optimizer=case.optimizer, **kept)


def run_serially(cases: Iterable[Case]) -> dict[Case, Reference]:
    """The reference of each of `cases`, by `serial_of`."""
    wanted = sorted({serial_of(case) for case in cases}, key=str)
    (outcomes,) = run_on_ranks(run_cases, 1, wanted)
    return {
        case: Reference(outcome, assemble(outcome.pieces), assemble(outcome.gradients))
        for case, outcome in zip(wanted, outcomes, strict=True)
    }


def difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the reference's; absolute where the reference is zero (a key bias)."""
    size = reference.norm().item()
    return (ours - reference).norm().item() / (size if size > 1e-5 else 1.0)


def assert_equals_serial(ranks: int, cases: list[Case], serial: dict[Case, Reference]) -> None:
    """Run `cases` on `ranks` ranks; raise unless losses, gradient norms, gradients and weights are the references'."""
    by_rank = run_on_ranks(run_cases, ranks, cases, timeout=400)
    faults = []
    for i, case in enumerate(cases):
        reference = serial[serial_of(case)]
        outcomes = [outcomes[i] for outcomes in by_rank]
        assert all(outcome.curve == outcomes[0].curve for outcome in outcomes), f"{case}: ranks disagree"
        for step, (ours, theirs) in enumerate(zip(outcomes[0].curve, reference.outcome.curve, strict=True)):
            for what, a, b in zip(("loss", "gradient norm"), ours, theirs, strict=True):
                if abs(a - b) > TIGHT * abs(b):
                    faults.append(f"{case}: step {step + 1} {what} {a} against {b}")
        for what, ours, theirs in (
            ("gradient", assemble([p for o in outcomes for p in o.gradients]), reference.gradients),
            ("weight", assemble([p for o in outcomes for p in o.pieces]), reference.weights),
        ):
            assert ours.keys() == theirs.keys()
            for name in theirs:
                if (apart := difference(ours[name], theirs[name])) > TIGHT:
                    faults.append(f"{case}: {what} {name} differs by {apart:.1e}")
    assert not faults, "\n".join(faults)
