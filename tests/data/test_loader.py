"""Which samples a step trains on follows from the samples consumed, and from nothing else."""

import threading
import time

import numpy as np
import pytest
import torch

from megatron_lite.config.data import DataConfig
from megatron_lite.data.loader import BatchLoader
from megatron_lite.data.sample import whole
from megatron_lite.data.stream import MockStream, build_stream
from megatron_lite.errors import DataError

SEQ = 6


class Numbered:
    """A stream whose sample k is k, k + 1, ...; `bad` raises, `slow` takes its time."""

    samples_per_epoch = 1000

    def __init__(self, bad=None, error=None, slow=()):
        self.bad, self.error, self.slow = bad, error, slow
        self.read = []

    def __getitem__(self, sample):
        self.read.append(sample)
        if sample in self.slow:
            time.sleep(0.02)
        if sample == self.bad:
            raise self.error
        return whole(np.arange(sample, sample + SEQ + 1))


def loader(stream, rank=0, size=1, micro=2, workers=0, vocab_size=10**6):
    return BatchLoader(
        stream, data_rank=rank, data_size=size, micro_batch_size=micro, vocab_size=vocab_size, num_workers=workers
    )


def tokens_of_step(loaders, consumed, batch):
    """All ranks' micro-batches of a step in the order of their global numbers."""
    micro = sorted((b for each in loaders for b in each.step(consumed, batch)), key=lambda b: b.index)
    assert [b.index for b in micro] == list(range(len(micro)))
    return torch.cat([torch.cat([b.tokens, b.labels[:, -1:]], 1) for b in micro])


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_step_has_the_same_samples_on_any_layout(size, micro, workers):
    stream = MockStream(SEQ, 100, "layout")
    loaders = [loader(stream, rank, size, micro, workers) for rank in range(size)]
    batches = [16, 16, 32, 32, 16]  # a growing and a shrinking batch
    consumed = 48
    for batch in batches:
        expected = torch.from_numpy(np.stack([stream[k].tokens for k in range(consumed, consumed + batch)]))
        assert torch.equal(tokens_of_step(loaders, consumed, batch), expected)
        consumed += batch
    for each in loaders:
        each.close()


def test_a_resumed_loader_goes_on_where_the_first_stopped(tmp_path):
    stream = build_stream(DataConfig(mock_data=True, seq_length=SEQ), seed=3, split="train", vocab_size=50)
    first, second = loader(stream, workers=2), loader(stream, micro=4)
    first.step(0, 8)
    assert torch.equal(tokens_of_step([first], 8, 8), tokens_of_step([second], 8, 8))
    first.close()


def test_a_micro_batch():
    batch = loader(Numbered(), rank=1, size=2).step(100, 8)[1]
    assert (batch.first_sample, batch.index) == (106, 3)
    assert batch.tokens.tolist() == [list(range(106, 112)), list(range(107, 113))]
    assert batch.labels.tolist() == [list(range(107, 113)), list(range(108, 114))]
    for field in (batch.tokens, batch.labels):
        assert field.dtype == torch.int64 and field.is_contiguous()
    assert batch.loss_mask.dtype == torch.bool and batch.loss_mask.shape == (2, SEQ) and batch.loss_mask.all()


def test_reading_ahead_reads_the_next_step_and_no_sample_twice():
    stream = Numbered()
    each = loader(stream, rank=1, size=2, workers=2)
    for step in range(4):
        each.step(step * 8, 8)
    each.close()
    assert len(stream.read) == len(set(stream.read))
    own = [k for k in range(0, 40) if k // 2 % 2 == 1]
    assert sorted(stream.read) == [k for k in own if k in set(stream.read)]
    assert set(own[:16]) <= set(stream.read)


def test_slow_samples_do_not_change_the_order():
    each = loader(Numbered(slow={8, 12}), micro=1, workers=4)
    firsts = [int(b.tokens[0, 0]) for step in range(4) for b in each.step(step * 8, 8)]
    assert firsts == list(range(32))
    each.close()


def test_going_back_reads_again_what_was_asked():
    each = loader(Numbered(), workers=1)
    each.step(0, 4)
    each.step(4, 4)
    assert each.step(0, 4)[0].tokens[0, 0] == 0
    assert each.step(40, 4)[1].first_sample == 42
    each.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [DataError("web.bin shrank"), OSError(5, "Input/output error")])
def test_a_sample_that_cannot_be_read_is_named_in_the_step_that_wants_it(error, workers):
    each = loader(Numbered(bad=13, error=error), workers=workers)
    each.step(0, 8)
    with pytest.raises(DataError, match=r"sample 13 cannot be read: .*(shrank|Input/output)"):
        each.step(8, 8)
    each.close()


def test_a_mistake_of_ours_keeps_its_type_and_names_the_sample():
    each = loader(Numbered(bad=3, error=ZeroDivisionError("division")), workers=1)
    with pytest.raises(ZeroDivisionError) as raised:
        each.step(0, 4)
    assert raised.value.__notes__ == ["while sample 3 was read"]
    each.close()


def test_an_id_beyond_the_vocabulary_is_named():
    with pytest.raises(DataError, match=r"sample 7 holds token id 13 and the vocabulary has ids 0 to 12"):
        loader(Numbered(), vocab_size=13).step(0, 8)


def test_close_ends_the_threads():
    before = threading.active_count()
    each = loader(Numbered(), workers=3)
    each.step(0, 8)
    assert threading.active_count() > before
    each.close()
    assert threading.active_count() == before


def test_a_batch_that_does_not_divide_is_a_programmers_mistake():
    with pytest.raises(ValueError, match="6 samples is no multiple of 4"):
        loader(Numbered(), size=2).step(0, 6)
