"""GPT-2's ids of JSON lines by `tiktoken`: batches to `encode_ordinary_batch`, with a thread a core."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from token_files import main

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def make(vocabulary: str, merges: str, threads: int) -> tuple[Callable[[list[str]], Iterable[list[int]]], int]:
    ranks = data_gym_to_mergeable_bpe_ranks(merges, vocabulary)
    end = json.loads(Path(vocabulary).read_bytes())["<|endoftext|>"]
    library = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": end})
    return lambda texts: library.encode_ordinary_batch(texts, num_threads=threads), end


if __name__ == "__main__":
    main(make)
