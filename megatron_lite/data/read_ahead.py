"""Samples read ahead by processes of their own, which hand them over in memory they share with the parent.

Processes, since reading is Python: threads would take turns with the training they are to keep fed. They get the
stream as a value and map its files again; torch is not loaded in them. They live as long as the parent's end
of their pipe, and no signal to the parent's group ends them while it still saves.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import functools
import itertools
import multiprocessing
import signal
from collections.abc import Iterator
from ctypes import Array
from typing import Protocol

import numpy as np

from megatron_lite.data.ordered_workers import Worker, WorkerLost, interrupts_ignored
from megatron_lite.data.sample import Sample
from megatron_lite.errors import DataError, SamplesLost


class Samples(Protocol):
    """Endless numbered samples."""

    def __getitem__(self, sample: int) -> Sample: ...


class SampleReader:
    """Runs of samples out of a stream, each sample checked against the vocabulary."""

    def __init__(self, stream: Samples, vocab_size: int):
        self._stream, self._vocab_size = stream, vocab_size

    def read(self, first: int, count: int) -> list[Sample]:
        """Samples `first` to `first` + `count`.

        Raises DataError, naming the sample, for one that is damaged or leaves the vocabulary, SamplesLost for one
        that its disk does not give.
        """
        return [self._sample(first + i) for i in range(count)]

    def _sample(self, number: int) -> Sample:
        try:
            sample = self._stream[number]
        except (DataError, OSError) as error:
            kind = DataError if isinstance(error, DataError) else SamplesLost
            raise kind(f"sample {number:,} cannot be read: {error}") from error
        except Exception as error:
            error.add_note(f"while sample {number} was read")
            raise
        # Without its sign a negative id is beyond any vocabulary: one pass finds both.
        unsigned = sample.tokens.view(np.dtype(f"u{sample.tokens.dtype.itemsize}"))
        if int(unsigned.max()) >= self._vocab_size:
            low, high = int(sample.tokens.min()), int(sample.tokens.max())
            raise DataError(
                f"sample {number:,} holds token id {low if low < 0 else high:,} and the vocabulary has ids 0 to "
                f"{self._vocab_size - 1:,}: the data were made with another tokenizer."
            )
        return sample


class _Places:
    """Places in shared memory, each for a run of `count` samples of `length` tokens."""

    def __init__(self, memory: Array, count: int, length: int):
        self._places = np.frombuffer(memory, self.dtype(count, length))

    @staticmethod
    def dtype(count: int, length: int) -> np.dtype:
        """What a place holds."""
        fields = [
            ("tokens", np.int64, (count, length)),
            ("starts", np.int64, (count, length)),
            ("counts", np.bool_, (count, length)),
            ("num_starts", np.int64, count),
            ("has_counts", np.bool_, count),
        ]
        return np.dtype(fields, align=True)

    def put(self, number: int, samples: list[Sample]) -> None:
        place = self._places[number]
        for i, sample in enumerate(samples):
            place["tokens"][i] = sample.tokens
            place["num_starts"][i] = len(sample.starts)
            place["starts"][i, : len(sample.starts)] = sample.starts
            place["has_counts"][i] = sample.counts is not None
            if sample.counts is not None:
                place["counts"][i] = sample.counts

    def get(self, number: int) -> list[Sample]:
        """The samples in a place, without a copy."""
        place = self._places[number]
        return [
            Sample(tokens, starts[:num_starts], counts if has_counts else None)
            for tokens, starts, num_starts, counts, has_counts in zip(
                *(place[name] for name in ("tokens", "starts", "num_starts", "counts", "has_counts")), strict=True
            )
        ]


class _Filling:
    """What a worker does: it reads the run of samples it is asked for into the place it is told."""

    def __init__(self, reader: SampleReader, memory: Array, count: int, length: int):
        # Launchers end a rank by a signal to its processes: it goes on to save, and closes its pipes when it ends.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._reader, self._count = reader, count
        self._places = _Places(memory, count, length)

    def __call__(self, asked: tuple[int, int]) -> None:
        place, first = asked
        self._places.put(place, self._reader.read(first, self._count))


class ReadAhead:
    """Runs of `count` samples of `length` tokens that `num_workers` processes read before they are wanted.

    `places` runs are held at most, (17 `length` + 9) `count` bytes each.
    """

    def __init__(self, reader: SampleReader, *, num_workers: int, count: int, length: int, places: int):
        self._count = count
        self.places = places
        memory = multiprocessing.get_context("spawn").RawArray("b", places * _Places.dtype(count, length).itemsize)
        self._places = _Places(memory, count, length)
        self._free = list(range(places))
        self._asked: collections.deque[tuple[int, int, Worker]] = collections.deque()
        self._workers: list[Worker] = []
        # At exit multiprocessing asks processes to end, which these do not heed, and waits.
        atexit.register(self.close)
        with interrupts_ignored():
            for _ in range(num_workers):
                self._workers.append(Worker(functools.partial(_Filling, reader, memory, count, length)))
        self._turns = itertools.cycle(self._workers)

    def ask(self, start: int, stride: int) -> None:
        """Have runs read, as many as there is room for: that from `start` on is the first, `stride` apart."""
        if self._asked and self._asked[0][0] != start:
            self.forget()
        for first in itertools.count(start + len(self._asked) * stride, stride):
            if not self._free:
                return
            worker = next(self._turns)
            with self._named(first):
                worker.send((self._free[-1], first))
            self._asked.append((first, self._free.pop(), worker))

    def holds(self, first: int) -> bool:
        """Whether the run from `first` on is the next of those asked for."""
        return bool(self._asked) and self._asked[0][0] == first

    @contextlib.contextmanager
    def take(self) -> Iterator[list[Sample]]:
        """The next run asked for; it may be written over once the `with` block is left.

        Raises what `SampleReader.read` raises, and SamplesLost where the process that reads is gone.
        """
        first, place, worker = self._asked.popleft()
        try:
            with self._named(first):
                worker.receive()
            yield self._places.get(place)
        finally:
            self._free.append(place)

    def forget(self) -> None:
        """Take what was asked for and leave it."""
        while self._asked:
            with contextlib.suppress(DataError, SamplesLost), self.take():
                pass

    @contextlib.contextmanager
    def _named(self, first: int) -> Iterator[None]:
        try:
            yield
        except WorkerLost as lost:
            how = "ended" if lost.signal_number is None else f"was killed by signal {lost.signal_number}"
            raise SamplesLost(
                f"the process that reads samples {first:,} to {first + self._count - 1:,} ahead (pid {lost.pid}) "
                f"{how}; if the machine ran out of memory, use fewer --num-workers, or none."
            ) from None

    def close(self) -> None:
        """End the processes."""
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.__exit__()
        self._workers.clear()
