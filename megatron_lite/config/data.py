"""The data: token files, their order, and the tokenizer they were made with."""

from __future__ import annotations

import dataclasses

from megatron_lite.config.tokenizer import TokenizerFiles, TokenizerType


@dataclasses.dataclass(frozen=True)
class DataConfig(TokenizerFiles):
    """Which tokens are read, in what order, and what text they stand for."""

    data_path: tuple[str, ...] = ()
    """Prefix of a .bin/.idx pair, or weights and prefixes in turn: 0.7 data/web 0.3 data/code."""
    train_data_path: tuple[str, ...] = ()
    """As data_path, for training alone; then --split is not used."""
    valid_data_path: tuple[str, ...] = ()
    """As data_path, for validation alone."""
    test_data_path: tuple[str, ...] = ()
    """As data_path, for testing alone."""
    split: str = "969,30,1"
    """Weights of train, validation and test, by documents."""
    seq_length: int = 1024
    """Tokens a sample predicts."""
    sample_stride: int | None = None
    """Tokens between the starts of neighbouring samples; default: seq_length (no overlap)."""
    mock_data: bool = False
    """Generated tokens instead of files, to try a configuration."""
    num_workers: int = 0
    """Threads that read the next step's samples ahead; the order does not depend on it."""
    tokenizer_type: TokenizerType | None = None
    """Kind of tokenizer."""
