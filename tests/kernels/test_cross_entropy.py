"""Cross-entropy's statistics and gradient: as exact as torch's, joined from parts, blind to padding and the ignored."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, assert_as_exact_as, assert_threads_change_nothing, drawn

from megatron_lite.kernels.cross_entropy import cross_entropy_gradient_, cross_entropy_statistics

LOWEST = torch.finfo(torch.float32).min
SHAPES = ((0, 8), (1, 1), (3, 7), (6, 64), (129, 65), (5, 1031), (4, 5000), (2, 33001))


def loss_and_gradient(logits, labels, cotangent, label_smoothing=0.0, cuts=()):
    """The op as its callers use it, over a vocabulary cut into parts."""
    bounds = [0, *cuts, logits.shape[1]]
    parts = [
        (a, logits[:, a:b].clone(), cross_entropy_statistics(logits[:, a:b], labels, first=a, held=b - a))
        for a, b in itertools.pairwise(bounds)
    ]
    peaks, partitions, targets, sums = torch.stack([statistics for _, _, statistics in parts]).unbind(1)
    top = peaks.amax(0)
    total = (partitions * (peaks - top).exp()).sum(0)
    loss = total.log() + (top - targets.sum(0))
    loss += label_smoothing * (targets.sum(0) - sums.sum(0) / logits.shape[1])
    gradients = [
        cross_entropy_gradient_(
            part, labels, top, 1 / total, cotangent, first=first, held=part.shape[1],
            label_smoothing=label_smoothing, vocab_size=logits.shape[1],
        )
        for first, part, _ in parts
    ]  # fmt: skip
    return loss.masked_fill(labels < 0, 0), torch.cat(gradients, 1)


def by_torch(logits, labels, cotangent, label_smoothing=0.0, dtype=None):
    logits = logits.detach().to(dtype or logits.dtype).requires_grad_()
    loss = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    loss.backward(cotangent.to(loss.dtype))
    return loss.detach(), logits.grad


def drawn_case(rows, length, dtype, scale=3.0):
    labels = torch.arange(rows) * 7919 % length
    labels[2::5] = -100
    return (scale * drawn(rows, length)).to(dtype), labels, drawn(rows, seed=1)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_torch(shape, dtype, label_smoothing, instruction_set):
    logits, labels, cotangent = drawn_case(*shape, dtype)
    loss, gradient = loss_and_gradient(logits, labels, cotangent, label_smoothing)
    # Torch's 16-bit loss is rounded to 16 bits and ours is not: the peer is torch's fp32 there.
    peer_loss, _ = by_torch(logits, labels, cotangent, label_smoothing, torch.float32)
    _, peer_gradient = by_torch(logits, labels, cotangent, label_smoothing)
    exact_loss, exact_gradient = by_torch(logits, labels, cotangent, label_smoothing, torch.float64)
    # Of seven losses in fp32 torch's are right to a quarter of a digit, and ours off by 0.75.
    assert_as_exact_as(peer_loss, loss, exact_loss, digits=1)
    assert_as_exact_as(peer_gradient, gradient, exact_gradient)


@given(st.data())
def test_parts_join_to_the_whole(data):
    rows, length = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 2100))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4)))
    logits, labels, cotangent = drawn_case(rows, length, data.draw(st.sampled_from(DTYPES)))
    label_smoothing = data.draw(st.sampled_from([0.0, 0.2]))
    loss, gradient = loss_and_gradient(logits, labels, cotangent, label_smoothing)
    of_parts = loss_and_gradient(logits, labels, cotangent, label_smoothing, cuts)
    torch.testing.assert_close(of_parts[0], loss, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(of_parts[1], gradient, rtol=2 * torch.finfo(logits.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_is_not_read_and_has_no_gradient(dtype, instruction_set):
    logits, labels, cotangent = drawn_case(6, 1100, dtype)
    held = 1029
    spoilt = logits.clone()
    spoilt[:, held:] = torch.nan
    labels = labels.clamp(max=held - 1)
    options = {"first": 0, "held": held}
    statistics = cross_entropy_statistics(spoilt, labels, **options)
    assert torch.equal(statistics, cross_entropy_statistics(logits[:, :held], labels, **options))
    top, total, _, _ = statistics
    gradient = cross_entropy_gradient_(
        spoilt, labels, top, 1 / total, cotangent, label_smoothing=0.1, vocab_size=held, **options
    )
    assert gradient is spoilt and (gradient[:, held:] == 0).all() and gradient.isfinite().all()
    # Some are too small for float16.
    assert (gradient[labels >= 0][:, :held] != 0).float().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ignored_are_zero_whatever_their_logits(dtype, instruction_set):
    logits, _, _ = drawn_case(4, 70, dtype)
    logits[0], logits[1, 3] = torch.nan, torch.inf
    labels, cotangent = torch.tensor([-1, 5, 6, 7]), torch.tensor([1.0, 0.0, 1.0, -2.0])
    _, gradient = loss_and_gradient(logits, labels, cotangent)
    assert (gradient[:2] == 0).all() and (gradient[2:] != 0).any(1).all() and gradient.isfinite().all()


@pytest.mark.parametrize("at", [0, 69, 1500])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_row(dtype, at, instruction_set):
    for bad in (float("nan"), float("inf")):
        logits, _, cotangent = drawn_case(3, 2000, dtype)
        logits[1, at] = bad
        labels = torch.tensor([0, 1, 2])
        loss, gradient = loss_and_gradient(logits, labels, cotangent)
        assert loss.isfinite().tolist() == [True, False, True] and loss[1].isnan()
        assert gradient.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_constant_and_missing_logits(dtype, instruction_set):
    largest = torch.finfo(dtype).max
    logits = torch.full((4, 1500), -largest, dtype=dtype)
    logits[0, [3, 1400]] = largest
    logits[1] = 7
    # What a rank beside them shows alone: nothing.
    logits[2], logits[3, 1100:] = -torch.inf, 0
    peak, partition, _, _ = cross_entropy_statistics(logits, torch.zeros(4, dtype=torch.int64), first=0, held=1500)
    assert peak.tolist() == [largest, 7, LOWEST, 0]
    assert partition.tolist() == [2, 1500, 0, 400]
    nothing = cross_entropy_statistics(logits, torch.zeros(4, dtype=torch.int64), first=9, held=0)
    assert nothing.tolist() == [[LOWEST] * 4, [0] * 4, [0] * 4, [0] * 4]


def test_rising_logits_are_rescaled_strip_by_strip(instruction_set):
    """Every strip's peak is above the one before, by more than an exponential reaches at the end."""
    logits = torch.linspace(-300, 0, 9000).unsqueeze(0)
    for x in (logits, logits.flip(1)):
        _, partition, _, _ = cross_entropy_statistics(x, torch.zeros(1, dtype=torch.int64), first=0, held=9000)
        torch.testing.assert_close(partition.double(), logits.double().exp().sum(1), rtol=1e-6, atol=0)


def test_strides_do_not_matter_to_statistics():
    logits = drawn(70, 9).t()
    labels = torch.arange(18)[::2]
    options = {"first": 0, "held": 70}
    assert torch.equal(
        cross_entropy_statistics(logits, labels, **options),
        cross_entropy_statistics(logits.contiguous(), labels.contiguous(), **options),
    )


def test_the_number_of_threads_changes_nothing():
    case = drawn_case(100, 3000, torch.bfloat16)
    assert_threads_change_nothing(lambda: loss_and_gradient(*case, label_smoothing=0.1))


def test_compiles_without_a_graph_break():
    def statistics(logits, labels):
        return cross_entropy_statistics(logits * 2, labels, first=3, held=60)

    logits, labels, _ = drawn_case(5, 64, torch.float32)
    compiled = torch.compile(statistics, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, labels), statistics(logits, labels))


def test_autograd_knows_that_the_logits_are_gone():
    leaf = drawn(2, 5).requires_grad_()
    logits = leaf.exp()
    row = torch.ones(2)
    cross_entropy_gradient_(
        logits, torch.tensor([0, 1]), row, row, row, first=0, held=5, label_smoothing=0.0, vocab_size=5
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()
    with pytest.raises(RuntimeError, match="cross_entropy_statistics has no gradient"):
        cross_entropy_statistics(leaf, torch.tensor([0, 1]), first=0, held=5).sum().backward()


def test_refusals_give_the_numbers():
    logits, labels = torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64)
    options = {"first": 0, "held": 6}
    with pytest.raises(TypeError, match=r"input is torch.float64; float32, bfloat16 and float16"):
        cross_entropy_statistics(logits.double(), labels, **options)
    with pytest.raises(ValueError, match=r"logits have shape \(2, 6, 1\); \[rows, vocabulary\]"):
        cross_entropy_statistics(logits.unsqueeze(2), labels, **options)
    with pytest.raises(TypeError, match=r"labels are torch.int32; int64 is needed"):
        cross_entropy_statistics(logits, labels.int(), **options)
    with pytest.raises(ValueError, match=r"labels of shape \(3,\) for logits \(2, 6\); \(2,\) is needed"):
        cross_entropy_statistics(logits, torch.zeros(3, dtype=torch.int64), **options)
    with pytest.raises(ValueError, match="labels on meta and logits on cpu"):
        cross_entropy_statistics(logits, labels.to("meta"), **options)
    with pytest.raises(ValueError, match="first=0, held=7 and 6 columns"):
        cross_entropy_statistics(logits, labels, first=0, held=7)
    row = torch.ones(2)
    options |= {"label_smoothing": 0.0, "vocab_size": 6}
    with pytest.raises(ValueError, match=r"logits of shape \(6, 2\) have strides \(1, 6\)"):
        cross_entropy_gradient_(logits.t(), torch.zeros(6, dtype=torch.int64), row, row, row, **options | {"held": 2})
    with pytest.raises(TypeError, match=r"top is torch.bfloat16; float32 is needed"):
        cross_entropy_gradient_(logits, labels, row.bfloat16(), row, row, **options)
    with pytest.raises(ValueError, match=r"gradient of shape \(1,\) for logits \(2, 6\)"):
        cross_entropy_gradient_(logits, labels, row, row, row[:1], **options)
    with pytest.raises(ValueError, match=r"label_smoothing=1\.5, vocab_size=6"):
        cross_entropy_gradient_(logits, labels, row, row, row, **options | {"label_smoothing": 1.5})
    assert (logits == 0).all()
