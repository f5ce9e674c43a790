"""A sample of text: bounded, repeatable, in order, everything where it fits, and no part of the stream preferred."""

from __future__ import annotations

import itertools
import random

from megatron_lite.data.text_sample import TextSample


def sample(texts, most: int, seed: int = 0) -> TextSample:
    found = TextSample(most, seed)
    for text in texts:
        found.add(text)
    return found


def test_everything_where_it_fits():
    texts = ["é", "b", "", "a"]
    found = sample(texts, 4)
    assert list(found) == texts and len(found) == 4 and found.bytes == found.seen_bytes == 4


def test_bounded_in_order_and_repeatable():
    texts = [f"{i:04d}" for i in range(5000)]
    found = sample(texts, 1003)
    kept = list(found)
    assert kept == sorted(kept) and len(kept) == 250 and found.bytes == 1000 and found.seen_bytes == 20_000
    assert kept == list(sample(texts, 1003)) != list(sample(texts, 1003, seed=1))


def test_texts_of_mixed_sizes_are_the_first_by_their_keys_that_fit():
    """Against all keys sorted: a large text that went leaves no room for texts behind it."""
    for seed in range(20):
        sizes = random.Random(seed + 100)
        texts = [f"{i:04d}" + "x" * sizes.choice((0, 5, 400)) for i in range(500)]
        keys = random.Random(seed)
        order = sorted((keys.random(), text) for text in texts)
        ends = itertools.accumulate(len(text) for _, text in order)
        first = [text for (_, text), end in zip(order, ends, strict=True) if end <= 3000]
        assert list(sample(texts, 3000, seed)) == sorted(first)


def test_no_part_is_preferred():
    """The mean place of 2,000 of 20,000 texts is within five standard errors of the middle."""
    places = [int(text) for text in sample((f"{i:05d}" for i in range(20_000)), 10_000)]
    assert len(places) == 2000
    assert abs(sum(places) / 2000 - 9999.5) < 5 * 20_000 / 12**0.5 / 2000**0.5
