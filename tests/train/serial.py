"""What every layout is held to: the same training in one process, without ZeRO."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from ranks import run_on_ranks
from train.layouts import Case, run_cases

from megatron_lite.train.compare import TOLERANCES, WEIGHT, ZERO, assemble, differences

TIGHT = TOLERANCES["fp32"]
CODED = 1e-2
"""How far 8-bit optimizer state may take losses and gradient norms apart."""


class Reference(NamedTuple):
    """A serial run, and its tensors whole."""

    curve: list[tuple[float, float]]
    tensors: dict[str, torch.Tensor]


def serial_of(case: Case) -> Case:
    """One process, one micro-batch, no ZeRO where there need not be; with dropout the same micro-batches, whose masks
    are their own, and in fp16, where they overflow each by itself."""
    kept = {}
    if case.dropout or case.dtype == "fp16":
        kept = {"micro_batches": case.micro_batches * case.data, "dropout": case.dropout}
        kept["attention_dropout"] = case.attention_dropout
    for name in (
        *("layers", "llama", "qwen3", "model", "steps", "batch", "documents", "pieces"),
        *("optimizer", "adam_eps", "dtype", "loss_scale"),
    ):
        kept[name] = getattr(case, name)
    return Case(zero=0 if case.dtype == "fp32" else 1, **kept)


def run_serially(cases: Iterable[Case]) -> dict[Case, Reference]:
    """The reference of each of `cases`, by `serial_of`."""
    wanted = sorted({serial_of(case) for case in cases}, key=str)
    (outcomes,) = run_on_ranks(run_cases, 1, wanted)
    return {
        case: Reference(outcome.curve, assemble(outcome.pieces)) for case, outcome in zip(wanted, outcomes, strict=True)
    }


def assert_equals_serial(
    ranks: int, cases: list[Case], serial: dict[Case, Reference], *, adamw_weights: float | None = None
) -> None:
    """Run `cases` on `ranks` ranks; raise unless losses, gradient norms and all tensors are the serial run's.

    `adamw_weights` is how far weights may be apart after AdamW, where that is another bound than the dtype's.
    """
    by_rank = run_on_ranks(run_cases, ranks, cases, timeout=900)
    faults = []
    for i, case in enumerate(cases):
        reference = serial[serial_of(case)]
        traces = [found[i] for found in by_rank]
        assert all(found.curve == traces[0].curve for found in traces), f"{case}: ranks disagree"
        tight, zero = TOLERANCES[case.dtype], ZERO[case.dtype]
        # Blocks of 8-bit state end elsewhere in other layouts: what follows the first step is theirs alone.
        is_coded = case.optimizer == "adamw8bit"
        bound_of_weights = (adamw_weights if case.optimizer == "adamw" else None) or (math.inf if is_coded else tight)
        for step, (ours, theirs) in enumerate(zip(traces[0].curve, reference.curve, strict=True)):
            for what, a, b in zip(("loss", "gradient norm"), ours, theirs, strict=True):
                if a != b and not abs(a - b) <= (max(CODED, tight) if is_coded and step > 0 else tight) * abs(b):
                    faults.append(f"{case}: step {step + 1} {what} {a} against {b}")
        whole = assemble(piece for found in traces for piece in found.pieces)
        faults += [
            f"{case}: {difference.name} differs by {difference.relative:.1e}"
            for difference in differences(whole, reference.tensors, zero)
            if difference.relative > (bound_of_weights if difference.kind == WEIGHT else tight)
        ]
    assert not faults, "\n".join(faults)
