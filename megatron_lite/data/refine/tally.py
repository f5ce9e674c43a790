"""What a stage did: counts by reason, sizes, time, and samples of what it dropped or failed on."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import heapq
from collections.abc import Mapping
from typing import Any

SAMPLES = 5
"""Kept for each reason, drawn by a hash of where a document was read: the same ones whatever the workers."""
_EXCERPT = 400
FAILED = "the stage failed"
"""What samples of documents that were set aside stand under."""


@dataclasses.dataclass
class StageTally:
    """Counts over some documents; tallies of parts add up to that of the whole."""

    documents: int = 0
    characters: int = 0
    kept: int = 0
    kept_characters: int = 0
    edited: int = 0
    quarantined: int = 0
    seconds: float = 0.0
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    dropped_characters: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    samples: dict[str, list[tuple[str, str, str, str]]] = dataclasses.field(default_factory=dict)
    """By reason: (rank, place, detail, beginning of the text), least rank first."""

    def drop(self, reason: str, detail: str, place: str, text: str) -> None:
        """Count a dropped document, and keep it as a sample if its rank is among the least."""
        self.dropped[reason] += 1
        self.dropped_characters[reason] += len(text)
        self._sample(reason, detail, place, text)

    def set_aside(self, error: str, place: str, text: str) -> None:
        """Count a document that the stage failed on, and keep it as a sample likewise."""
        self.quarantined += 1
        self._sample(FAILED, error, place, text)

    def _sample(self, reason: str, detail: str, place: str, text: str) -> None:
        rank = hashlib.blake2b(place.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        samples = self.samples.setdefault(reason, [])
        if len(samples) < SAMPLES or rank < samples[-1][0]:
            self.samples[reason] = heapq.nsmallest(SAMPLES, [*samples, (rank, place, detail, text[:_EXCERPT])])

    def add(self, other: Mapping[str, Any]) -> None:
        """Add another tally, as `plain` gives it."""
        for name in ("documents", "characters", "kept", "kept_characters", "edited", "quarantined", "seconds"):
            setattr(self, name, getattr(self, name) + other[name])
        self.dropped.update(other["dropped"])
        self.dropped_characters.update(other["dropped_characters"])
        for reason, samples in other["samples"].items():
            mine = self.samples.get(reason, [])
            self.samples[reason] = heapq.nsmallest(SAMPLES, [*mine, *map(tuple, samples)])

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
