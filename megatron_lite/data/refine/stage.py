"""What a stage of the refinery is: options in a frozen dataclass, and the function it opens into in a worker."""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megatron_lite.data.refine.document import Document, Drop
from megatron_lite.errors import DataError

Step = Callable[[Document], Drop | None]
"""Edits a document in place, or says why it is dropped."""


class Stage(abc.ABC):
    """A step of a recipe. Subclasses are frozen dataclasses: fields are options, the docstring describes them."""

    name: ClassVar[str]

    def problems(self) -> Iterator[str]:
        """What its options cannot be, one sentence each."""
        yield from ()


class DocumentStage(Stage):
    """A stage that looks at one document at a time."""

    def prepare(self, folder: Path) -> None:
        """Once, before any document: write what all workers need into `folder`. Raises DataError for a bad file."""

    @abc.abstractmethod
    def open(self, folder: Path) -> Step:
        """In each worker: load models, compile patterns. Raises DataError for what is missing."""


class CorpusStage(Stage):
    """A stage that compares all documents: each is signed, and when all are, signatures are resolved into verdicts.

    A signature is some rows of keys, and a verdict a byte for each row: KEPT or DROPPED.
    """

    edits: bool
    """Whether it shortens documents, so that what follows has to wait for it."""
    keys: int
    """How many keys a row has."""

    @abc.abstractmethod
    def sign(self, document: Document) -> np.ndarray:
        """uint64 [rows, keys] of a document."""

    @abc.abstractmethod
    def resolve(
        self, units: Sequence[Callable[[], np.ndarray]], verdicts: np.ndarray, folder: Path, memory: int
    ) -> None:
        """Mark DROPPED in `verdicts`, one a row in the order of documents, of which those not KEPT are left out.

        Each of `units` loads the rows of some documents. `folder` takes temporary files, `memory` is in bytes.
        """

    @abc.abstractmethod
    def apply(self, document: Document, verdicts: np.ndarray) -> Drop | None:
        """Act on the verdicts of a document's rows."""


KEPT, DROPPED, ABSENT = 0, 1, 2
"""Verdicts. ABSENT: the document was dropped before."""


def required(module: str, package: str, stage: str) -> Any:
    """An optional module that a stage needs. Raises DataError that names the package."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise DataError(
            f"the stage {stage} needs the package {package}: pip install {package}, or -e .[refine] for all that "
            "stages use"
        ) from None
