"""Tokens that are context alone, by a mask beside the set."""

import numpy as np
import pytest

from megatron_lite.config.data import DataConfig
from megatron_lite.data.feed import build_stream
from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.data.loss_mask import mask_prefix
from megatron_lite.errors import DataError


def write(prefix, lengths, dtype, value):
    with IndexedWriter(prefix, dtype=dtype) as writer:
        for i, length in enumerate(lengths):
            writer.add_document(value(i, length))
    return str(prefix)


def every_third(i, length):
    return np.arange(length) % 3 == 0


@pytest.fixture
def prefix(tmp_path):
    prefix = write(tmp_path / "chat", [9] * 12, np.uint16, lambda i, length: np.arange(length) + 1)
    write(mask_prefix(prefix), [9] * 12, np.uint8, lambda i, length: every_third(i, length).astype(np.uint8))
    return prefix


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_only_tokens_of_the_mask_are_targets(prefix, packing):
    data = DataConfig(data_path=(prefix,), split="1", seq_length=17, data_packing=packing)
    stream = build_stream(data, seed=1, split="train", vocab_size=100)
    for number in range(stream.samples_per_epoch):
        sample = stream[number]
        assert sample.counts.dtype == bool
        counted = set(sample.tokens[sample.counts].tolist())
        assert counted == ({4, 7} if packing == "best_fit" else {1, 4, 7})
    assert "with a loss mask" in stream.describe()[0]


def test_another_mask_is_other_data(prefix, tmp_path):
    data = DataConfig(data_path=(prefix,), split="1", seq_length=17)
    masked = build_stream(data, seed=1, split="train", vocab_size=100).fingerprint
    write(mask_prefix(prefix), [9] * 12, np.uint8, lambda i, length: np.ones(length, np.uint8))
    assert build_stream(data, seed=1, split="train", vocab_size=100).fingerprint != masked


def test_a_mask_of_other_documents_is_refused(prefix):
    write(mask_prefix(prefix), [8, 10] + [9] * 10, np.uint8, lambda i, length: np.ones(length, np.uint8))
    with pytest.raises(DataError, match=r"chat.loss_mask is not the loss mask of .*chat: it has 12 documents of 108"):
        build_stream(DataConfig(data_path=(prefix,), seq_length=17), seed=1, split="train", vocab_size=100)
