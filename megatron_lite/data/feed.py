"""From a configuration to the stream of samples it asks for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from fractions import Fraction

from megatron_lite import log
from megatron_lite.config.data import DataConfig
from megatron_lite.data.blended import BlendedStream
from megatron_lite.data.data_path import Entry, parse_data_path
from megatron_lite.data.documents import TokenWindows, WindowsOfDocuments, parse_split, split_documents
from megatron_lite.data.fim import FimStream, sentinels
from megatron_lite.data.indexed import IndexedReader
from megatron_lite.data.loss_mask import read_mask
from megatron_lite.data.mixture import SetSize, constant_mixture, is_mixed, training_mixture
from megatron_lite.data.pack import PackedDocuments
from megatron_lite.data.provenance import check_tokenizer, read_provenance
from megatron_lite.data.segments import SegmentedBlend
from megatron_lite.data.stream import MockStream, SampleStream, ShuffledWindows, SkippingStream, parse_skip_ranges
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.errors import DataError


def build_stream(
    data: DataConfig,
    *,
    seed: int,
    split: str,
    vocab_size: int,
    tokenizer: Tokenizer | None = None,
    skip_samples: Sequence[str] = (),
    total_samples: int | None = None,
) -> SampleStream:
    """The stream of "train", "valid" or "test" samples a configuration asks for.

    Several prefixes without weights are shuffled together; with weights they are blended.
    `total_samples` is the length of the run, None where it is not known before. Raises DataError for a
    damaged set, one made with another tokenizer than `tokenizer`, an empty split and a set shorter than
    one sequence; ConfigError for a path, split, range or segment that cannot be read, and for tokens of
    fill-in-the-middle that the tokenizer has not.
    """
    if data.mock_data:
        stream: SampleStream = MockStream(data.seq_length, vocab_size, seed, split)
    else:
        stream = _file_stream(data, seed, split, tokenizer, total_samples)
    if data.fim_rate:
        stream = FimStream(stream, data, sentinels(data, tokenizer), seed, split)
    ranges = parse_skip_ranges(skip_samples)
    return SkippingStream(stream, ranges) if ranges else stream


def _file_stream(
    data: DataConfig, seed: int, split: str, tokenizer: Tokenizer | None, total_samples: int | None
) -> SampleStream:
    own_path = {"train": data.train_data_path, "valid": data.valid_data_path, "test": data.test_data_path}[split]
    words = own_path or data.data_path
    if not words:
        raise DataError(f"no data for {split}: give --data-path or --{split}-data-path.")
    shares = None if own_path else parse_split(data.split)
    entries = parse_data_path(words)
    sets = [[_open(prefix, data, split, shares, tokenizer) for prefix in entry.prefixes] for entry in entries]
    mixes = is_mixed(data, entries) if split == "train" else entries[0].weight is not None
    if not mixes:
        filled = _filled([windows for of in sets for windows in of], split)
        return ShuffledWindows(filled, "order", seed, split, 0)
    if split != "train":
        entries, sets = _with_samples(entries, sets, split)
    sets = [_filled(of, split) for of in sets]
    members = [
        ShuffledWindows([windows], "order", seed, split, i) for i, windows in enumerate(w for of in sets for w in of)
    ]
    blend = _blend(data, entries, sets, split, total_samples)
    if len(members) == 1 and blend.ends_after is None:
        return members[0]
    return BlendedStream(members, blend, total_samples if split == "train" else None)


def _open(
    prefix: str,
    data: DataConfig,
    split: str,
    shares: tuple[float, float, float] | None,
    tokenizer: Tokenizer | None,
) -> WindowsOfDocuments:
    """The part of a token set that belongs to a split."""
    reader = IndexedReader(prefix)
    check_tokenizer(prefix, read_provenance(prefix, reader.num_tokens), tokenizer)
    documents = shares and split_documents(reader.num_documents, shares, split)
    mask = read_mask(reader)
    if data.data_packing == "best_fit":
        return PackedDocuments(reader, data.seq_length, documents, mask)
    return TokenWindows(reader, data.seq_length, data.sample_stride, documents, mask)


def _blend(
    data: DataConfig,
    entries: Sequence[Entry],
    sets: Sequence[Sequence[WindowsOfDocuments]],
    split: str,
    total_samples: int | None,
) -> SegmentedBlend:
    by_tokens = data.blend_by == "tokens"
    masked = [windows.reader.prefix for of in sets for windows in of if windows.mask is not None]
    if by_tokens and masked:
        log.once(
            f"blend_by=tokens: tokens that the loss mask of {masked[0]} leaves out are among those its weight is a "
            "share of; a larger weight makes up for them"
        )
    sizes = [
        [SetSize(len(windows), windows.num_tokens, windows.targets if by_tokens else Fraction(1)) for windows in of]
        for of in sets
    ]
    if split == "train":
        return training_mixture(data, entries, sizes, total_samples)
    return constant_mixture(entries, sizes, data.blend_by)


def _filled(sets: list[WindowsOfDocuments], split: str) -> list[WindowsOfDocuments]:
    """Those of some sets that hold a sample. Raises DataError if none does."""
    filled = [windows for windows in sets if len(windows)]
    if not filled:
        raise _no_sample(sets[0], split)
    _warn_of_short([windows for windows in sets if not len(windows)], split)
    return filled


def _with_samples(
    entries: Sequence[Entry], sets: Sequence[list[WindowsOfDocuments]], split: str
) -> tuple[list[Entry], list[list[WindowsOfDocuments]]]:
    """The parts of a blend that hold a sample; all where none does. A small set does not stop a validation."""
    holds = [any(map(len, of)) for of in sets]
    if not any(holds):
        return list(entries), list(sets)
    _warn_of_short([windows for of, held in zip(sets, holds, strict=True) if not held for windows in of], split)
    return list(itertools.compress(entries, holds)), list(itertools.compress(sets, holds))


def _warn_of_short(sets: Iterable[WindowsOfDocuments], split: str) -> None:
    for windows in sets:
        log.warn(f"{windows.describe()}: too short for one {split} sample, it is left out")


def _no_sample(windows: WindowsOfDocuments, split: str) -> DataError:
    first, last = windows.documents
    way_out = "; to train without validation, set eval_interval to 0" if split == "valid" else ""
    return DataError(
        f"{windows.reader.prefix} holds no {split} sample: {split} gets {last - first:,} of its "
        f"{windows.reader.num_documents:,} documents, with {windows.num_tokens:,} tokens, and one sample is seq_length "
        f"+ 1 = {windows.seq_length + 1:,}. Add documents, give {split} a larger share in split, or shorten "
        f"seq_length{way_out}."
    )
