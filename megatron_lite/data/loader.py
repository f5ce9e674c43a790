"""The micro-batches of one data rank, read ahead; position is the number of samples consumed."""

from __future__ import annotations

import numpy as np

from megatron_lite.data.micro_batch import Assembly, MicroBatch
from megatron_lite.data.read_ahead import ReadAhead, SampleReader, Samples
from megatron_lite.data.sample import Sample, whole


class BlankStream:
    """Samples of zeros, for ranks that need the number and the shape of micro-batches alone."""

    def __init__(self, seq_length: int):
        self._seq_length = seq_length

    def __getitem__(self, sample: int) -> Sample:
        return whole(np.zeros(self._seq_length + 1, np.int64))


class BatchLoader:
    """The micro-batches of one data rank out of a stream.

    Micro-batch j of data rank r in a step that begins at `consumed` samples holds the `micro_batch_size`
    samples from consumed + (j * data_size + r) * micro_batch_size on. With `num_workers` processes the next
    step's samples are read while this one runs; what a step gets does not depend on it. With `pin_memory`
    micro-batches lie where a GPU copies from while the CPU goes on.
    """

    def __init__(
        self,
        stream: Samples,
        *,
        data_rank: int,
        data_size: int,
        micro_batch_size: int,
        vocab_size: int,
        num_workers: int = 0,
        assembly: Assembly | None = None,
        pin_memory: bool = False,
    ):
        self._reader = SampleReader(stream, vocab_size)
        self._data_rank, self._data_size = data_rank, data_size
        self._micro_batch_size = micro_batch_size
        self._num_workers = num_workers
        self._assemble = assembly or Assembly()
        self._pin_memory = pin_memory
        self._ahead: ReadAhead | None = None

    def step(self, consumed_samples: int, global_batch_size: int) -> list[MicroBatch]:
        """This rank's micro-batches of the step that begins after `consumed_samples`.

        Raises DataError, naming the sample, for one that is damaged or leaves the vocabulary; SamplesLost for one that
        its disk does not give, and naming the process for one that reads ahead no more.
        """
        stride = self._data_size * self._micro_batch_size
        if global_batch_size % stride:
            raise ValueError(f"a global batch of {global_batch_size} samples is no multiple of {stride}")
        first = consumed_samples + self._data_rank * self._micro_batch_size
        starts = range(first, first + global_batch_size, stride)
        batches = [self._take(start, stride, consumed_samples) for start in starts]
        if self._num_workers:
            # A rank's starts are `stride` apart within a step and across steps, whatever the batch size becomes.
            self._read_ahead(len(starts), batches[0].tokens.shape[1] + 1).ask(starts.stop, stride)
        return batches

    def _take(self, start: int, stride: int, consumed_samples: int) -> MicroBatch:
        if self._ahead is not None and self._ahead.holds(start):
            with self._ahead.take() as samples:
                return self._batch(samples, start, consumed_samples)
        return self._batch(self._reader.read(start, self._micro_batch_size), start, consumed_samples)

    def _batch(self, samples: list[Sample], start: int, consumed_samples: int) -> MicroBatch:
        batch = self._assemble(
            samples,
            first_sample=start,
            index=(start - consumed_samples) // self._micro_batch_size,
            consumed_samples=consumed_samples,
        )
        return batch.pinned() if self._pin_memory else batch

    def _read_ahead(self, micro_batches: int, length: int) -> ReadAhead:
        """The processes, with room for a step of that many micro-batches and for two with each of them."""
        places = max(micro_batches, 2 * self._num_workers)
        if self._ahead is None or self._ahead.places < places:
            self.close()
            self._ahead = ReadAhead(
                self._reader,
                num_workers=self._num_workers,
                count=self._micro_batch_size,
                length=length,
                places=places,
            )
        return self._ahead

    def close(self) -> None:
        """End the processes that read ahead."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
