"""Which passages an evaluation is about: token sets by split, and text files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_lite.config.data import DataConfig
from megatron_lite.data.data_path import prefixes_of
from megatron_lite.data.documents import TokenWindows, parse_split, split_documents
from megatron_lite.data.indexed import IndexedReader
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.errors import ConfigError, TokenizerError
from megatron_lite.eval.passage import Passage, passage_of_documents, passage_of_text


def select_passages(
    data: DataConfig,
    *,
    data_path: Sequence[str],
    splits: Sequence[str],
    text: Sequence[str],
    vocab_size: int,
    tokenizer: Tokenizer | None,
) -> list[Passage]:
    """The text files, then each split ("train", "valid", "test" or "all") of each token set.

    The sets are those of `data_path`, by default wholly, or those a run was configured with, `data`, by
    default its validation split; weights between prefixes are left aside. Raises ConfigError, DataError
    or TokenizerError.
    """
    if text and tokenizer is None:
        raise TokenizerError(
            "--text needs a tokenizer and the checkpoint names none; give --tokenizer-type and its file"
        )
    found = [passage_of_text(Path(path), tokenizer) for path in text]
    default = ("all",) if data_path else () if text else ("valid",)
    for split in splits or default:
        entries, whole = _sets(data, data_path, split)
        for prefix in prefixes_of(entries):
            reader = IndexedReader(prefix)
            documents = None if whole else split_documents(reader.num_documents, parse_split(data.split), split)
            name = prefix if whole else f"{prefix} ({split})"
            windows = TokenWindows(reader, data.seq_length, None, documents)
            found.append(passage_of_documents(name, windows, vocab_size, tokenizer))
    return found


def _sets(data: DataConfig, data_path: Sequence[str], split: str) -> tuple[Sequence[str], bool]:
    """(the entries that hold a split, whether all of their documents belong to it)."""
    if data_path:
        return data_path, split == "all"
    own = {"train": data.train_data_path, "valid": data.valid_data_path, "test": data.test_data_path}
    if own.get(split):
        return own[split], True
    if not data.data_path:
        raise ConfigError(f"the run was configured with no {split} data; give --data-path PREFIX or --text FILE")
    return data.data_path, split == "all"
