"""What a checkpoint needs of the ranks, and acting together so that a failure on one is known to all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

from megatron_lite.errors import MegatronLiteError

Value = TypeVar("Value")

_EXPLAINED = (MegatronLiteError, OSError, type(None))
_SHOWN = 4


class Ranks(Protocol):
    """All ranks seen from one of them; `parallel.process_mesh.ProcessMesh` is one."""

    @property
    def global_rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def gather_json(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank."""
        ...


class Failure(NamedTuple):
    """What went wrong on one rank."""

    rank: int
    text: str
    is_io: bool
    """The operating system refused (disk full, I/O error), rather than the program or its input."""
    is_explained: bool
    """A known error, rather than a mistake in the program."""


class RankFailures(Exception):
    """An action that failed on one or more ranks; raised on every rank with the same content."""

    def __init__(self, failures: list[Failure]):
        self.failures = failures
        ranks_by_text: dict[str, list[int]] = defaultdict(list)
        for failure in failures:
            ranks_by_text[failure.text].append(failure.rank)
        shown = [f"{_named(ranks)}: {text}" for text, ranks in ranks_by_text.items()]
        more = f"; and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        super().__init__("; ".join(shown[:_SHOWN]) + more)

    @property
    def is_io(self) -> bool:
        return all(failure.is_io for failure in self.failures)

    @property
    def is_explained(self) -> bool:
        return all(failure.is_explained for failure in self.failures)

    @property
    def unforeseen(self) -> BaseException | None:
        """The error of this rank, with its traceback, if it is one that nobody foresaw."""
        return None if isinstance(self.__cause__, _EXPLAINED) else self.__cause__


def _named(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:_SHOWN]))}" + (", ..." if len(ranks) > _SHOWN else "")


def together(ranks: Ranks, action: Callable[[], Value]) -> list[Value]:
    """What `action` returned (plain JSON) on every rank, in rank order.

    The exchange runs whether or not the action fails, so no rank waits for one that gave up.
    Raises RankFailures on every rank if any failed.
    """
    cause: Exception | None = None
    answer: list[Any]
    try:
        answer = [True, action()]
    except Exception as error:
        cause = error
        explained = isinstance(error, _EXPLAINED)
        text = str(error) if explained else f"{type(error).__name__}: {error}"
        answer = [False, text, isinstance(error, OSError), explained]
    try:
        answers = ranks.gather_json(answer)
        failures = [Failure(rank, *told) for rank, (done, *told) in enumerate(answers) if not done]
        if failures:
            raise RankFailures(failures) from cause
        return [value for _, value in answers]
    finally:
        # Its traceback holds this frame: as a cycle the two would keep all that the callers hold, a model maybe.
        del cause
