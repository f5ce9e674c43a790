"""One sequence to train on."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One sequence to train on: `seq_length` + 1 tokens, the last of them only a target.

    The arrays may be views of a mapped file: read them, do not write.
    """

    tokens: np.ndarray
    """[seq_length + 1], of any integer dtype."""
    starts: np.ndarray
    """int64 [documents], ascending from 0: where each document, or the rest of one, begins in `tokens`."""
    counts: np.ndarray | None = None
    """bool [seq_length + 1]: which tokens count as targets; None if all do. The first is never a target."""


def whole(tokens: np.ndarray) -> Sample:
    """Tokens [seq_length + 1] that no boundary divides."""
    return Sample(tokens, np.zeros(1, np.int64))
