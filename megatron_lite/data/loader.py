"""The micro-batches of one data rank, read ahead; position is the number of samples consumed."""

from __future__ import annotations

import collections
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from megatron_lite.data.micro_batch import Assembly, MicroBatch
from megatron_lite.data.sample import Sample, whole
from megatron_lite.data.stream import SampleStream
from megatron_lite.errors import DataError


class BlankStream:
    """Samples of zeros, for ranks that need the number and the shape of micro-batches alone."""

    def __init__(self, seq_length: int):
        self._seq_length = seq_length

    def __getitem__(self, sample: int) -> Sample:
        return whole(np.zeros(self._seq_length + 1, np.int64))


class BatchLoader:
    """The micro-batches of one data rank out of a stream.

    Micro-batch j of data rank r in a step that begins at `consumed` samples holds the `micro_batch_size`
    samples from consumed + (j * data_size + r) * micro_batch_size on. With `num_workers` threads the next
    step's micro-batches are read while this one runs; what a step gets does not depend on it.
    """

    def __init__(
        self,
        stream: SampleStream | BlankStream,
        *,
        data_rank: int,
        data_size: int,
        micro_batch_size: int,
        vocab_size: int,
        num_workers: int = 0,
        assembly: Assembly | None = None,
    ):
        self._stream = stream
        self._data_rank, self._data_size = data_rank, data_size
        self._micro_batch_size = micro_batch_size
        self._vocab_size = vocab_size
        self._num_workers = num_workers
        self._assemble = assembly or Assembly()
        self._pool = ThreadPoolExecutor(num_workers, "read-ahead") if num_workers else None
        self._ahead: collections.deque[tuple[int, Future[list[Sample]]]] = collections.deque()

    def step(self, consumed_samples: int, global_batch_size: int) -> list[MicroBatch]:
        """This rank's micro-batches of the step that begins after `consumed_samples`.

        Raises DataError, naming the sample, for one that cannot be read or leaves the vocabulary.
        """
        stride = self._data_size * self._micro_batch_size
        if global_batch_size % stride:
            raise ValueError(f"a global batch of {global_batch_size} samples is no multiple of {stride}")
        first = consumed_samples + self._data_rank * self._micro_batch_size
        starts = range(first, first + global_batch_size, stride)
        batches = [
            self._assemble(
                self._take(start),
                first_sample=start,
                index=j * self._data_size + self._data_rank,
                consumed_samples=consumed_samples,
            )
            for j, start in enumerate(starts)
        ]
        self._read_ahead(starts.stop, stride, max(len(starts), self._num_workers))
        return batches

    def _take(self, start: int) -> list[Sample]:
        if self._ahead and self._ahead[0][0] == start:
            return self._ahead.popleft()[1].result()
        self._drop_ahead()
        return self._read(start)

    def _read_ahead(self, start: int, stride: int, count: int) -> None:
        # A rank's starts are `stride` apart within a step and across steps, whatever the batch size becomes.
        if self._pool is None:
            return
        for next_start in range(start + len(self._ahead) * stride, start + count * stride, stride):
            self._ahead.append((next_start, self._pool.submit(self._read, next_start)))

    def _read(self, start: int) -> list[Sample]:
        """Samples `start` to `start` + B."""
        return [self._sample(start + i) for i in range(self._micro_batch_size)]

    def _sample(self, number: int) -> Sample:
        try:
            sample = self._stream[number]
        except (DataError, OSError) as error:
            raise DataError(f"sample {number:,} cannot be read: {error}") from error
        except Exception as error:
            error.add_note(f"while sample {number} was read")
            raise
        low, high = int(sample.tokens.min()), int(sample.tokens.max())
        if low < 0 or high >= self._vocab_size:
            raise DataError(
                f"sample {number:,} holds token id {low if low < 0 else high:,} and the vocabulary has ids 0 to "
                f"{self._vocab_size - 1:,}: the data were made with another tokenizer."
            )
        return sample

    def _drop_ahead(self) -> None:
        while self._ahead:
            self._ahead.popleft()[1].cancel()

    def close(self) -> None:
        """Stop reading ahead."""
        self._drop_ahead()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
