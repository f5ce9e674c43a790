"""Choosing a token: equal to transformers' processors, drawn from the right distribution, repeatable."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_lite.errors import ConfigError
from megatron_lite.generate.sampling import Sampling, choose, keep_top_k, keep_top_p, penalize, row_generator


def some_logits(rows=4, vocabulary=97, seed=0):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def seen_of(ids, vocabulary):
    return torch.zeros(ids.shape[0], vocabulary, dtype=torch.bool).scatter(1, ids, True)


@given(st.integers(0, 1000), st.sampled_from([1, 2, 7, 96, 97, 200]))
def test_top_k_equals_transformers(seed, k):
    logits = some_logits(seed=seed)
    expected = TopKLogitsWarper(k)(None, logits.clone())
    assert torch.equal(keep_top_k(logits, k), expected)


@given(st.integers(0, 1000), st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.99, 1.0]))
def test_top_p_equals_transformers(seed, p):
    logits = some_logits(seed=seed)
    assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(None, logits.clone()))


def test_top_p_keeps_what_top_k_left():
    logits = keep_top_k(some_logits(), 5)
    assert torch.equal(keep_top_p(logits, 0.8), TopPLogitsWarper(0.8)(None, logits.clone()))


def test_top_k_keeps_equals_of_the_kth():
    logits = torch.tensor([[3.0, 2.0, 2.0, 1.0]])
    assert torch.isfinite(keep_top_k(logits, 2)).tolist() == [[True, True, True, False]]


@given(st.integers(0, 1000), st.sampled_from([0.5, 1.0, 1.3, 2.0]))
def test_repetition_penalty_equals_transformers(seed, penalty):
    logits = some_logits(seed=seed)
    ids = torch.randint(0, 97, (4, 12), generator=torch.Generator().manual_seed(seed))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    assert torch.equal(penalize(logits, seen_of(ids, 97), penalty), expected)


def test_greedy_is_the_most_likely_token_after_the_penalty():
    logits = torch.tensor([[2.0, 1.9, -5.0]])
    nothing, first = torch.zeros(1, 3, dtype=torch.bool), torch.tensor([[True, False, False]])
    assert choose(logits, nothing, Sampling(temperature=0), []).tolist() == [0]
    assert choose(logits, first, Sampling(temperature=0, repetition_penalty=1.2), []).tolist() == [1]


def test_drawn_frequencies_follow_the_filtered_distribution():
    draws = 20_000
    logits = some_logits(rows=1, vocabulary=20)
    seen = torch.zeros(1, 20, dtype=torch.bool).scatter(1, torch.tensor([[3, 5]]), True)
    sampling = Sampling(temperature=2.0, top_k=12, top_p=0.9, repetition_penalty=1.5)
    scores = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[3, 5]]), logits.clone())
    scores = TopPLogitsWarper(0.9)(None, TopKLogitsWarper(12)(None, TemperatureLogitsWarper(2.0)(None, scores)))
    expected = scores.softmax(-1)[0]
    generator = row_generator(0, [1, 2], 0)
    chosen = choose(logits.expand(draws, -1), seen.expand(draws, -1), sampling, [generator] * draws)
    frequencies = torch.bincount(chosen, minlength=20) / draws
    assert torch.all(frequencies[expected == 0] == 0)
    # Four standard deviations of each frequency.
    assert torch.all((frequencies - expected).abs() <= 4 * (expected * (1 - expected) / draws).sqrt() + 1e-9)


def test_a_certain_token_is_always_drawn():
    logits = torch.full((50, 9), -math.inf)
    logits[:, 4] = 1.0
    generators = [row_generator(0, [], sample) for sample in range(50)]
    chosen = choose(logits, torch.zeros(50, 9, dtype=torch.bool), Sampling(), generators)
    assert chosen.tolist() == [4] * 50


def test_a_row_draws_the_same_whatever_stands_beside_it():
    logits, seen = some_logits(rows=3), torch.zeros(3, 97, dtype=torch.bool)

    def generators():
        return [row_generator(5, [1, row], row) for row in range(3)]

    together = choose(logits, seen, Sampling(), generators())
    alone = [choose(logits[i : i + 1], seen[i : i + 1], Sampling(), generators()[i : i + 1]).item() for i in range(3)]
    assert together.tolist() == alone


def test_seed_prompt_and_sample_number_each_change_what_is_drawn():
    first = torch.rand(4, generator=row_generator(0, [1, 2], 0))
    for other in (row_generator(1, [1, 2], 0), row_generator(0, [12], 0), row_generator(0, [1, 2], 1)):
        assert not torch.equal(first, torch.rand(4, generator=other))
    assert torch.equal(first, torch.rand(4, generator=row_generator(0, [1, 2], 0)))


def test_values_out_of_range_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        Sampling(temperature=-1.0, top_k=-2, top_p=0.0, repetition_penalty=0.0)
    assert len(caught.value.problems) == 4
    assert "temperature=-1.0" in caught.value.problems[0]
    with pytest.raises(ConfigError, match="temperature=nan"):
        Sampling(temperature=math.nan)
