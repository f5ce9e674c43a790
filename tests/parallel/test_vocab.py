"""The vocabulary-parallel cross-entropy, argmax and gathering against plain torch on the whole vocabulary."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from ranks import run_on_ranks

from megatron_lite.parallel.linear import TensorAxis
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.parallel.vocab import (
    VocabParallelEmbedding,
    VocabularyPart,
    gather_vocabulary,
    vocab_parallel_argmax,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
    vocabulary_weight,
)

ROWS, DIVISIBLE_BY = 12, 8


def _whole(vocabulary, *, shift=0.0):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(3, ROWS // 3, vocabulary, generator=generator) + shift
    labels = torch.randint(0, vocabulary, (3, ROWS // 3), generator=generator)
    labels[1, 2] = -100
    cotangent = torch.rand(3, ROWS // 3, generator=generator)
    return logits, labels, cotangent


def _formula(logits, labels, label_smoothing, z_loss):
    log_partition = torch.logsumexp(logits, -1)
    target = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    loss = log_partition - (1 - label_smoothing) * target - label_smoothing * logits.mean(-1)
    return (loss + z_loss * log_partition**2) * (labels >= 0)


def _cut(logits, part):
    """This rank's columns; padding is NaN, so that whoever reads it shows."""
    local = torch.full((*logits.shape[:-1], part.length), math.nan, dtype=logits.dtype)
    local[..., : part.held] = logits[..., part.first : part.first + part.held]
    return local


def _check(size):
    mesh = ProcessMesh.create(MeshShape(tensor=size))
    group = mesh.group("tensor")
    settings = itertools.product((101, 5, 64), (0.0, 0.1), (0.0, 1e-2), (torch.float32, torch.bfloat16), (0.0, 1e4))
    for vocabulary, label_smoothing, z_loss, dtype, shift in settings:
        case = (vocabulary, label_smoothing, z_loss, dtype, shift)
        part = VocabularyPart.of(vocabulary, DIVISIBLE_BY, mesh)
        logits, labels, cotangent = _whole(vocabulary, shift=shift)
        logits = logits.to(dtype)
        reference = logits.double().requires_grad_()
        expected = _formula(reference, labels, label_smoothing, z_loss)
        expected.backward(cotangent.double())

        local = _cut(logits, part).requires_grad_()
        loss = vocab_parallel_cross_entropy(
            local * 1, labels, part, group, label_smoothing=label_smoothing, z_loss=z_loss
        )
        assert loss.dtype == torch.float32 and loss[1, 2] == 0.0
        # fp32 rounds the logits' own size away, which matters to z-loss and the mean alone.
        scale = 1e-6 * (1 + abs(shift) * (label_smoothing > 0) + shift**2 * z_loss)
        assert (loss - expected).abs().max() <= 10 * scale, case
        loss.backward(cotangent)
        wanted = reference.grad[..., part.first : part.first + part.held]
        tolerance = 4e-3 if dtype == torch.bfloat16 else 2e-6 * (1 + (shift > 0) * 100)
        difference = (local.grad[..., : part.held] - wanted).norm()
        assert difference <= tolerance * reference.grad.norm(), (case, difference)
        assert (local.grad[..., part.held :] == 0).all(), case

        assert torch.equal(gather_vocabulary(_cut(logits, part), part, group), logits)
        logits[0, 0, : vocabulary // 2 + 1] = logits[0, 1, vocabulary // 2 :] = 2 * logits.amax()
        guesses = vocab_parallel_argmax(_cut(logits, part), part, group)
        assert guesses[0, 0] == 0 and guesses[0, 1] == vocabulary // 2
        assert torch.equal(logits.gather(-1, guesses.unsqueeze(-1)).squeeze(-1), logits.amax(-1))

    _check_linear(mesh)
    _check_embedding(mesh, size)


def _check_linear(mesh):
    """Loss and gradients of hidden states and weight, with logits made of a few columns at a time."""
    generator = torch.Generator().manual_seed(1)
    hidden, cotangent = torch.randn(4, 3, 6, generator=generator), torch.rand(4, 3, generator=generator)
    precisions = ((torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3))
    settings = itertools.product((101, 5), (7, 50), ((0.0, 0.0), (0.1, 1e-2)), precisions, (False, True))
    for vocabulary, columns, (label_smoothing, z_loss), (dtype, tolerance), sequence_parallel in settings:
        case = (vocabulary, columns, label_smoothing, dtype, sequence_parallel)
        axis = TensorAxis(mesh, sequence_parallel and mesh.size("tensor") > 1)
        part = VocabularyPart.of(vocabulary, DIVISIBLE_BY, mesh)
        labels = torch.arange(12).reshape(4, 3) * 7 % vocabulary
        labels[1, 2] = -100
        # A loss scale, which float16 cannot do without.
        upstream = cotangent * (1024 if dtype == torch.float16 else 1)
        table = torch.randn(vocabulary, 6, generator=generator).to(dtype)

        whole, weight = hidden.to(dtype).double().requires_grad_(), table.double().requires_grad_()
        expected = _formula(whole @ weight.t(), labels, label_smoothing, z_loss)
        expected.backward(upstream.double())

        ours = vocabulary_weight(part, 6, mesh, dtype=dtype)
        ours.data.copy_(ours.mesh_layout.cut(table))
        local = axis.part_of_sequence(hidden.to(dtype, copy=True)).requires_grad_()
        loss = vocab_parallel_linear_cross_entropy(
            axis.enter(local),
            ours,
            labels,
            part,
            axis.group,
            columns=columns,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )
        assert loss.dtype == torch.float32 and loss[1, 2] == 0
        assert (loss - expected).abs().max() <= tolerance * (1 + expected.max()), case
        loss.backward(upstream)
        difference = (local.grad - axis.part_of_sequence(whole.grad)).norm()
        assert difference <= 2 * tolerance * whole.grad.norm(), (case, difference)
        difference = (ours.grad - ours.mesh_layout.cut(weight.grad)).norm()
        assert difference <= tolerance * weight.grad.norm(), (case, difference)


def _check_embedding(mesh, size):
    part = VocabularyPart.of(101, DIVISIBLE_BY, mesh)
    table = torch.randn(101, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = torch.arange(0, 96).reshape(8, 12)
    cotangent = torch.randn(8, 12, 6, generator=torch.Generator().manual_seed(1))
    expected = F.embedding(tokens, table)
    expected.backward(cotangent)
    for sequence_parallel in (False, True):
        axis = TensorAxis(mesh, sequence_parallel and size > 1)
        embedding = VocabParallelEmbedding(part, 6, mesh)
        embedding.weight.data.copy_(embedding.weight.mesh_layout.cut(table.detach()))
        output = embedding(tokens, axis)
        assert torch.equal(output, axis.part_of_sequence(expected.detach()))
        output.backward(axis.part_of_sequence(cotangent))
        assert torch.equal(embedding.weight.grad, embedding.weight.mesh_layout.cut(table.grad))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_equals_the_formula_in_double(size):
    if size == 1:
        _check(1)
    else:
        run_on_ranks(_check, size, size)


def _alone(vocabulary):
    return VocabularyPart.of(vocabulary, 1, ProcessMesh(MeshShape(), 0))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_equals_torch_cross_entropy(label_smoothing):
    logits, labels, _ = _whole(31)
    expected = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=label_smoothing
    )
    loss = vocab_parallel_cross_entropy(logits, labels, _alone(31), None, label_smoothing=label_smoothing)
    assert torch.allclose(loss.flatten(), expected, atol=1e-5)


def test_backward_runs_once_and_is_not_differentiated():
    logits = torch.randn(4, 10, requires_grad=True)
    loss = vocab_parallel_cross_entropy(logits * 1, torch.arange(4), _alone(10), None).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can run only once"):
        loss.backward()
    loss = vocab_parallel_cross_entropy(logits * 1, torch.arange(4), _alone(10), None).sum()
    weight = torch.ones((), requires_grad=True)
    (gradient,) = torch.autograd.grad(loss * weight, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_loss_by_chunks_may_be_differentiated_again():
    hidden, weight = torch.randn(4, 6, requires_grad=True), torch.randn(10, 6, requires_grad=True)
    loss = vocab_parallel_linear_cross_entropy(hidden, weight, torch.arange(4), _alone(10), None, columns=3).sum()
    first, second = (torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("columns", [None, 4])
def test_a_label_beyond_the_vocabulary_is_no_number(columns):
    """Padding included: a loss of 0, or of a padded column, would go unnoticed."""
    hidden, weight, labels = torch.randn(3, 6), torch.randn(16, 6), torch.tensor([9, 10, 99])
    part = dataclasses.replace(_alone(10), padded_size=16, length=16)
    if columns is None:
        loss = vocab_parallel_cross_entropy(hidden @ weight.t(), labels, part, None)
    else:
        loss = vocab_parallel_linear_cross_entropy(hidden, weight, labels, part, None, columns=columns)
    assert loss.isnan().tolist() == [False, True, True]


def test_what_needs_the_logits_in_backward_is_told_that_they_are_gone():
    leaf = torch.randn(4, 10, requires_grad=True)
    loss = vocab_parallel_cross_entropy(leaf.exp(), torch.arange(4), _alone(10), None).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_leaf_is_not_overwritten():
    leaf = torch.randn(4, 10, requires_grad=True)
    with pytest.raises(ValueError, match=r"shape \(4, 10\) are a leaf .* pass logits.clone\(\)"):
        vocab_parallel_cross_entropy(leaf, torch.arange(4), _alone(10), None)


def test_tiles_are_parts():
    part = VocabularyPart(vocab_size=20, padded_size=32, first=16, length=8)
    assert [(p.first, p.length, p.held) for p in part.tiles(3)] == [(16, 3, 3), (19, 3, 1), (22, 2, 0)]
    assert part.tiles(8) == [part]


def test_a_part_counts_true_ids():
    meshes = [ProcessMesh(MeshShape(tensor=4), rank) for rank in range(4)]
    parts = [VocabularyPart.of(20, 8, mesh) for mesh in meshes]
    assert [(p.first, p.length, p.held, p.padded_size) for p in parts] == [
        (0, 8, 8, 32),
        (8, 8, 8, 32),
        (16, 8, 4, 32),
        (24, 8, 0, 32),
    ]
    rows, here = parts[2].find(torch.tensor([15, 16, 19, 20, -100]))
    assert rows.tolist() == [0, 0, 3, 0, 0] and here.tolist() == [False, True, True, False, False]
