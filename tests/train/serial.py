"""What every layout is held to: the same training in one process, without ZeRO."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from ranks import run_on_ranks
from train.layouts import Case, run_cases

from megatron_lite.train.compare import TOLERANCES, ZERO, assemble, differences

TIGHT = TOLERANCES["fp32"]


class Reference(NamedTuple):
    """A serial run, and its tensors whole."""

    curve: list[tuple[float, float]]
    tensors: dict[str, torch.Tensor]


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
        case: Reference(outcome.curve, assemble(outcome.pieces)) for case, outcome in zip(wanted, outcomes, strict=True)
    }


def assert_equals_serial(ranks: int, cases: list[Case], serial: dict[Case, Reference]) -> None:
    """Run `cases` on `ranks` ranks; raise unless losses, gradient norms and all tensors are the serial run's."""
    by_rank = run_on_ranks(run_cases, ranks, cases, timeout=400)
    faults = []
    for i, case in enumerate(cases):
        reference = serial[serial_of(case)]
        traces = [found[i] for found in by_rank]
        assert all(found.curve == traces[0].curve for found in traces), f"{case}: ranks disagree"
        for step, (ours, theirs) in enumerate(zip(traces[0].curve, reference.curve, strict=True)):
            for what, a, b in zip(("loss", "gradient norm"), ours, theirs, strict=True):
                if abs(a - b) > TIGHT * abs(b):
                    faults.append(f"{case}: step {step + 1} {what} {a} against {b}")
        whole = assemble(piece for found in traces for piece in found.pieces)
        faults += [
            f"{case}: {difference.name} differs by {difference.relative:.1e}"
            for difference in differences(whole, reference.tensors, ZERO["fp32"])
            if difference.relative > TIGHT
        ]
    assert not faults, "\n".join(faults)
