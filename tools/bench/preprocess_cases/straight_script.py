"""JSON lines to Megatron's files of GPT-2's ids as a script does it that was made for one corpus: lengths in memory.

    python straight_script.py tokenizers INPUT.jsonl PREFIX ENCODER.json VOCAB.bpe THREADS

`tokenizers` has batches encoded by `encode_batch_fast`, on all cores; `tiktoken` by `encode_ordinary_batch`.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

DOCUMENTS_AT_ONCE = 1000
END = "<|endoftext|>"
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
EncodeBatch = Callable[[list[str]], Iterable[list[int]]]


def by_tokenizers(vocabulary: str, merges: str, threads: int) -> EncodeBatch:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return lambda texts: [found.ids for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def by_tiktoken(vocabulary: str, merges: str, threads: int) -> EncodeBatch:
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    ranks = data_gym_to_mergeable_bpe_ranks(merges, vocabulary)
    library = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    return lambda texts: library.encode_ordinary_batch(texts, num_threads=threads)


def batches(path: str) -> Iterator[list[str]]:
    """The texts of JSON lines, a thousand at a time."""
    with open(path, "rb") as lines:
        while texts := [json.loads(line)["text"] for line in islice(lines, DOCUMENTS_AT_ONCE)]:
            yield texts


def write(prefix: str, rows: Iterable[list[int]], end: int) -> None:
    """Write documents of ids below 65,536, each with its end behind it."""
    lengths = []
    with open(f"{prefix}.bin", "wb") as tokens:
        for row in rows:
            tokens.write(np.array([*row, end], np.uint16).tobytes())
            lengths.append(len(row) + 1)
    sizes = np.array(lengths, np.int64)
    with open(f"{prefix}.idx", "wb") as index:
        index.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(sizes), len(sizes) + 1))
        index.write(sizes.astype(np.int32).tobytes())
        index.write((2 * (np.cumsum(sizes) - sizes)).tobytes())
        index.write(np.arange(len(sizes) + 1).tobytes())


if __name__ == "__main__":
    library, source, prefix, vocabulary, merges, threads = sys.argv[1:]
    encode = {"tokenizers": by_tokenizers, "tiktoken": by_tiktoken}[library](vocabulary, merges, int(threads))
    end = json.loads(Path(vocabulary).read_bytes())[END]
    write(prefix, (row for texts in batches(source) for row in encode(texts)), end)
