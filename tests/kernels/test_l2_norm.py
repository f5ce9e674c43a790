"""The L2 norm of many tensors as of one: exact to fp32's last digit, in a fixed order."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, assert_threads_change_nothing, drawn

from megatron_lite.kernels.l2_norm import l2_norm


def exact(tensors):
    return math.sqrt(math.fsum(x * x for t in tensors for x in t.double().flatten().tolist()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 63, 65, 2047, 2049, 65536, 65537, 200001])
def test_equals_the_exact_norm(length, dtype, instruction_set):
    x = drawn(length, dtype=dtype)
    assert l2_norm([x]).item() == pytest.approx(exact([x]), rel=3e-7)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 3), st.sampled_from(DTYPES)), min_size=1, max_size=6))
def test_many_tensors_are_one_vector(shapes):
    tensors = [drawn(rows, columns, dtype=dtype, seed=i).t() for i, (rows, columns, dtype) in enumerate(shapes)]
    norm = l2_norm(tensors)
    assert norm.shape == () and norm.dtype == torch.float32
    assert norm.item() == pytest.approx(exact(tensors), rel=3e-7, abs=1e-30)


def test_the_error_does_not_grow_with_the_length():
    x = torch.full((5_000_000,), 0.1)
    assert l2_norm([x]).item() == pytest.approx(math.sqrt(5e6) * x[0].item(), rel=1e-6)


def test_the_number_of_threads_changes_nothing():
    tensors = [drawn(300_000, dtype=torch.bfloat16), drawn(70_000, seed=1)]
    assert_threads_change_nothing(lambda: [l2_norm(tensors)])


def test_what_is_not_finite_shows(instruction_set):
    x = drawn(1000)
    x[777] = math.nan
    assert l2_norm([drawn(3), x]).isnan()
    x[777] = -math.inf
    assert l2_norm([drawn(3), x]).item() == math.inf
    x[777] = 2e19
    assert l2_norm([x]).item() == math.inf


def test_squares_of_a_block_overflow_together_and_those_of_blocks_do_not(instruction_set):
    assert l2_norm([torch.full((2048,), 5e17)]).item() == math.inf
    assert l2_norm([torch.full((2048 * 50,), 3e17)]).item() == pytest.approx(3e17 * math.sqrt(2048 * 50))


def test_refusals_give_the_numbers():
    with pytest.raises(ValueError, match="at least one is needed"):
        l2_norm([])
    with pytest.raises(TypeError, match=r"tensor 1 is torch.int64"):
        l2_norm([torch.zeros(2), torch.zeros(2, dtype=torch.int64)])
    with pytest.raises(ValueError, match="tensor 1 is on meta and tensor 0 on cpu"):
        l2_norm([torch.zeros(2), torch.zeros(2, device="meta")])
