"""A task on a thread of its own, whose end is asked about."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Background(Generic[Result]):
    """`task` on a thread that ends with the process, even where a disk or another rank holds it up."""

    def __init__(self, name: str, task: Callable[[], Result]):
        self._task = task
        self._result: Result
        #: What the task raised.
        self.error: Exception | None = None
        #: When it was over, by time.perf_counter().
        self.ended: float | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._task()
        except Exception as error:
            self.error = error
        finally:
            self.ended = time.perf_counter()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, seconds: float) -> bool:
        """Whether it is done, after so many seconds at most."""
        self._thread.join(seconds)
        return self.is_done

    def result(self) -> Result:
        """What the task returned, once it is done; raises what it raised."""
        if self.error is not None:
            raise self.error
        return self._result
