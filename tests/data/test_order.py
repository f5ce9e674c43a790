"""The order is a permutation, the same for ever, and looks like chance."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.data.order import Permutation
from megatron_lite.kernels import host


@given(st.integers(1, 5000), st.integers(0, 2**64))
def test_every_index_comes_once(n, seed):
    order = Permutation(n, "order", seed)
    numbers = order(np.arange(n))
    assert numbers.dtype == np.int64
    assert np.array_equal(np.sort(numbers), np.arange(n))
    for at in (0, n // 3, n - 1):
        assert order(at) == numbers[at]


@given(st.integers(1, 2**63), st.data())
def test_a_number_and_an_array_agree_at_any_size(n, data):
    order = Permutation(n, "order", 7)
    at = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5, unique=True))
    numbers = [order(i) for i in at]
    assert order(np.array(at, np.uint64)).tolist() == numbers
    assert len(set(numbers)) == len(at) and all(0 <= number < n for number in numbers)


@given(st.integers(1, 2**63), st.data())
def test_compiled_or_not_the_numbers_are_the_same(n, data):
    compiled, plain = Permutation(n, "order", 7), Permutation(n, "order", 7)
    assert compiled._compiled
    plain._compiled = None
    at = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=9)), np.uint64)
    assert np.array_equal(compiled(at), plain(at)) and compiled(at).dtype == plain(at).dtype
    assert [compiled(int(i)) for i in at] == [plain(int(i)) for i in at]


@pytest.mark.parametrize("compiled", [True, False])
def test_the_order_of_a_run_never_changes(compiled, monkeypatch):
    """A change of these numbers changes every training run that is resumed after it."""
    if not compiled:
        monkeypatch.setattr(host, "module", lambda: None)
    assert Permutation(1000, "order", 1234, "train", 0, 0)(np.arange(8)).tolist() == [
        862,
        704,
        669,
        172,
        935,
        193,
        606,
        699,
    ]
    assert Permutation(10**12, "order", 1234, "train", 0, 1)(np.arange(3)).tolist() == [
        360628573,
        710790013405,
        241437878347,
    ]


def test_seed_epoch_split_and_set_each_give_another_order():
    names = [("order", 1, "train", 0, 0), ("order", 2, "train", 0, 0), ("order", 1, "train", 0, 1)]
    names += [("order", 1, "valid", 0, 0), ("order", 1, "train", 1, 0), ("order", 1, "train", "0", 0)]
    orders = {tuple(Permutation(50, *name)(np.arange(50)).tolist()) for name in names}
    assert len(orders) == len(names)


@pytest.mark.parametrize("n", [3, 16, 100])
def test_every_index_is_as_likely_at_every_place(n):
    seeds = 4000
    counts = np.zeros((n, n))
    for seed in range(seeds):
        counts[np.arange(n), Permutation(n, seed)(np.arange(n))] += 1
    expected = seeds / n
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom) + 10


def test_neighbours_do_not_stay_together():
    n, seeds = 500, 400
    orders = np.stack([Permutation(n, seed)(np.arange(n)) for seed in range(seeds)])
    adjacent = (np.abs(np.diff(orders, axis=1)) == 1).sum(1).mean()
    fixed = (orders == np.arange(n)).sum(1).mean()
    correlation = np.array([np.corrcoef(order, np.arange(n))[0, 1] for order in orders])
    assert adjacent == pytest.approx(2, abs=0.35)
    assert fixed == pytest.approx(1, abs=0.25)
    assert abs(correlation.mean()) < 4 / np.sqrt(n * seeds)
    assert correlation.std() == pytest.approx(1 / np.sqrt(n), rel=0.2)


def test_indices_outside_are_refused():
    order = Permutation(10, 1)
    for bad in (-1, 10, np.array([0, 10]), np.array([-1])):
        with pytest.raises(IndexError):
            order(bad)
    for n in (0, 2**63 + 1):
        with pytest.raises(ValueError):
            Permutation(n, 1)
    assert order(np.empty(0, np.int64)).size == 0
