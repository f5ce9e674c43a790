"""GPT-2's ids of JSON lines by `tokenizers`: batches to `encode_batch_fast`, which runs on all cores."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from token_files import main
from tokenizers import Tokenizer, models, pre_tokenizers


def make(vocabulary: str, merges: str, threads: int) -> tuple[Callable[[list[str]], Iterable[list[int]]], int]:
    tokenizer = Tokenizer(models.BPE.from_file(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    end = tokenizer.token_to_id("<|endoftext|>")
    return lambda texts: [found.ids for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)], end


if __name__ == "__main__":
    main(make)
