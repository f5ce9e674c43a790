"""When each action of a pipeline's schedule runs, by what it waits for. No torch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Action(NamedTuple):
    """What a rank does with a micro-batch in a stage.

    `kind` is F for forward, B for backward, or for its halves I, the gradients of inputs, and W, those of weights.
    """

    stage: int
    kind: str
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


Orders = Sequence[Sequence[Action]]
"""The actions of each pipe rank, in the order in which it does them."""
UNIT_TIMES: Mapping[str, float] = {"F": 1.0, "I": 1.0, "W": 1.0, "B": 2.0}
"""As a stage of matrix products has them: backward takes two products for each of forward."""


@dataclasses.dataclass(frozen=True)
class Span:
    """An action and the time it takes, from `start` to `stop`."""

    action: Action
    start: float
    stop: float


def timeline(orders: Orders, times: Mapping[str, float] = UNIT_TIMES) -> list[list[Span]]:
    """The spans of each rank where all actions begin as soon as they can, and sending takes no time.

    Raises ValueError, naming the actions that wait, for an order in which ranks wait for one another.
    """
    last_stage = max(action.stage for order in orders for action in order)
    ended: dict[Action, float] = {}
    spans: list[list[Span]] = [[] for _ in orders]
    while any([_advance(order, done, ended, last_stage, times) for order, done in zip(orders, spans, strict=True)]):
        pass
    stuck = [order[len(done)] for order, done in zip(orders, spans, strict=True) if len(done) < len(order)]
    if stuck:
        raise ValueError(f"no rank can go on: {', '.join(map(str, stuck))} wait for what comes after one of them")
    return spans


def _advance(
    order: Sequence[Action], done: list[Span], ended: dict[Action, float], last_stage: int, times: Mapping[str, float]
) -> bool:
    """Run a rank as far as it goes; whether that is any further."""
    before = len(done)
    for action in order[before:]:
        if (needed := _needs(action, last_stage)) is not None and needed not in ended:
            break
        start = max(done[-1].stop if done else 0.0, 0.0 if needed is None else ended[needed])
        done.append(Span(action, start, start + times[action.kind]))
        # The gradients of inputs are what others wait for, made alone or with those of weights.
        ended[action._replace(kind="I") if action.kind == "B" else action] = done[-1].stop
    return len(done) > before


def _needs(action: Action, last_stage: int) -> Action | None:
    """What must have ended before an action, I standing for B too."""
    if action.kind == "F":
        return action._replace(stage=action.stage - 1) if action.stage else None
    if action.kind == "W":
        return action._replace(kind="I")
    if action.stage == last_stage:
        return action._replace(kind="F")
    return action._replace(stage=action.stage + 1, kind="I")


def bubble_share(spans: Sequence[Sequence[Span]]) -> float:
    """The part of all ranks' time, from the first action anywhere to the last, in which they do nothing."""
    every = list(itertools.chain(*spans))
    length = max(span.stop for span in every) - min(span.start for span in every)
    return 1.0 - sum(span.stop - span.start for span in every) / (length * len(spans))


def most_in_flight(order: Sequence[Action]) -> int:
    """Stages times micro-batches that a rank holds activations of at once, at most."""
    change = {"F": 1, "I": 0, "B": -1, "W": -1}
    return max(itertools.accumulate(change[action.kind] for action in order))
