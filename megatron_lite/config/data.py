"""The data: token files, their order, and the tokenizer they were made with."""

from __future__ import annotations

import dataclasses
from typing import Literal

from megatron_lite.config.mixture import MixtureConfig
from megatron_lite.config.tokenizer import TokenizerFiles, TokenizerType


@dataclasses.dataclass(frozen=True)
class DataConfig(MixtureConfig, TokenizerFiles):
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
    """Processes of each rank that read the next step's training samples ahead; the order does not depend on it."""
    reset_attention_mask: bool = False
    """A token attends to its own document alone."""
    reset_position_ids: bool = False
    """Positions begin anew with each document."""
    eod_mask_loss: bool = False
    """What follows an end-of-document token, the next document's first token, is no target."""
    curriculum_seq_length_min: int | None = None
    """Tokens of a sequence at first, for a curriculum from short to long sequences: samples are divided, so that no
    token is left out. Default: seq_length."""
    curriculum_seq_length_samples: int | None = None
    """Samples after which sequences have seq_length tokens."""
    curriculum_seq_length_schedule: Literal["linear", "root", "step"] = "linear"
    """How they grow: with the samples consumed, with a root of them, or doubling, each length for as long."""
    curriculum_seq_length_step: int = 8
    """Tokens by which linear and root grow at least."""
    curriculum_seq_length_root: int = 2
    """Degree of root."""
    tokenizer_type: TokenizerType | None = None
    """Kind of tokenizer."""
