"""The data of a run as training opens them: checked once, before the first step."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from tiny_run import TOKENIZER, tiny_config, write_token_set

from megatron_lite.config import sources
from megatron_lite.data.documents import TokenWindows
from megatron_lite.data.indexed import IndexedReader
from megatron_lite.data.provenance import Provenance, write_provenance
from megatron_lite.errors import DataError
from megatron_lite.train.start import _open_data


def opened_by(rank: int, prefix, **training):
    config = tiny_config(data_path=(str(prefix),), split="1,1,0")
    config = sources.override(config, {"training": {"train_iters": 1, "eval_iters": 1, **training}})
    return _open_data(config, SimpleNamespace(global_rank=rank, size=lambda axis: 1))


def test_training_refuses_data_of_another_tokenizer(tmp_path):
    prefix = write_token_set(tmp_path / "set")
    tokens = IndexedReader(prefix).num_tokens
    facts = Provenance(
        "ByteTokenizer", TOKENIZER.fingerprint, TOKENIZER.vocab_size, True, 12, tokens, tokens, 1.0, {}, "a test"
    )
    write_provenance(prefix, facts)
    assert opened_by(0, prefix).vocab_size == TOKENIZER.vocab_size
    write_provenance(prefix, dataclasses.replace(facts, tokenizer_fingerprint="of another"))
    with pytest.raises(DataError, match="made with another tokenizer"):
        opened_by(0, prefix)


def test_one_rank_looks_through_the_tokens_for_all(tmp_path, monkeypatch):
    prefix = write_token_set(tmp_path / "set")
    scanned = []
    monkeypatch.setattr(TokenWindows, "check_vocabulary", lambda windows, size: scanned.append(windows.documents))
    assert opened_by(1, prefix).train_stream.fingerprint == opened_by(0, prefix).train_stream.fingerprint
    assert scanned == [(0, 6), (6, 12)], "train and valid, by rank 0 alone"
