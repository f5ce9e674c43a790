"""What torch's CPU allocator holds, by its own account: every allocation, a kernel's temporaries too."""

from __future__ import annotations

import bisect
import itertools

from torch.profiler import ProfilerActivity, profile, record_function


class Allocations:
    """A context; `mark` names moments within it. Afterwards `alive` and `peak` tell bytes above the start.

    Frees by other threads (gloo's) are not seen.
    """

    def __enter__(self):
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def mark(self, name: str) -> None:
        with record_function(f"mark {name}"):
            pass

    def __exit__(self, *error):
        self._profile.__exit__(*error)
        events = self._profile.profiler.kineto_results.events()
        self._marks = {e.name().removeprefix("mark "): e.start_ns() for e in events if e.name().startswith("mark ")}
        memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        self._times = [time for time, _ in memory]
        self._bytes = [0, *itertools.accumulate(size for _, size in memory)]

    def alive(self, at: str) -> int:
        """Bytes alive at a mark."""
        return self._bytes[bisect.bisect(self._times, self._marks[at])]

    def peak(self, first: str, last: str) -> int:
        """Most bytes alive at once between two marks."""
        begin, end = (bisect.bisect(self._times, self._marks[name]) for name in (first, last))
        return max(self._bytes[begin : end + 1])
