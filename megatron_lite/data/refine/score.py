"""The stage that scores texts by any function, and drops those of a low or high score."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from megatron_lite.data.refine.document import Document, Drop
from megatron_lite.data.refine.stage import DocumentStage, Step
from megatron_lite.errors import DataError


@dataclasses.dataclass(frozen=True)
class Score(DocumentStage):
    """Notes a score of each text in its metadata, and drops texts below or above a bound.

    `function` is MODULE:NAME, a function from a str to a float; or what makes one, a class or, where `arguments` are
    given, a function of them.
    """

    name: ClassVar[str] = "score"
    function: str = ""
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    min: float | None = None
    max: float | None = None
    field: str = "score"
    """Its name in the metadata."""

    def problems(self) -> Iterator[str]:
        if self.function.count(":") != 1 or not all(self.function.split(":")):
            yield (
                f"function {self.function or 'is not given'}: give MODULE:NAME, as "
                "megatron_lite.data.refine.importance:Importance."
            )
        if self.min is not None and self.max is not None and self.min > self.max:
            yield f"min {self.min} is above max {self.max}, which drops everything."

    def prepare(self, folder: Path) -> None:
        self._scorer()

    def _scorer(self) -> Callable[[str], float]:
        module, _, name = self.function.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise DataError(f"{self.name}: {self.function} cannot be loaded: {error}") from None
        try:
            scorer = function(**self.arguments) if self.arguments or isinstance(function, type) else function
        except TypeError as error:
            raise DataError(f"{self.name}: {self.function} does not take the arguments given: {error}") from None
        if not callable(scorer):
            raise DataError(f"{self.name}: {self.function} is no function, but gives {type(scorer).__name__}")
        return scorer

    def open(self, folder: Path) -> Step:
        score_of = self._scorer()

        def step(document: Document) -> Drop | None:
            score = float(score_of(document.text))
            if math.isnan(score):
                raise ValueError(f"{self.function} gives no number")
            document.metadata[self.field] = round(score, 6)
            if self.min is not None and score < self.min:
                return Drop("low score", f"{score:.4g} < {self.min:g}")
            if self.max is not None and score > self.max:
                return Drop("high score", f"{score:.4g} > {self.max:g}")
            return None

        return step
