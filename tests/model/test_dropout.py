"""Dropout over tensor ranks: the masks of a serial model, but for attention's own; recompute repeats them."""

import dataclasses

import pytest
import torch
from ranks import run_on_ranks

from megatron_lite.config.model import ModelConfig
from megatron_lite.model.forward_pass import ForwardPass, Site
from megatron_lite.model.gpt import GPT
from megatron_lite.parallel.linear import TensorAxis
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.parallel.recompute import Recompute

VOCABULARY, LENGTH = 50, 16
CONFIG = ModelConfig(
    num_layers=3, hidden_size=32, num_attention_heads=4, hidden_dropout=0.2, attention_dropout=0.2, init_method_std=0.2
)
RECOMPUTE = [Recompute("selective"), Recompute("full", "uniform", 2), Recompute("full", "block", 1)]


def _batch():
    text = torch.randint(0, VOCABULARY, (2, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return text[:, :-1], text[:, 1:], torch.ones(2, LENGTH)


def _model(mesh, config=CONFIG, **options):
    return GPT(config, mesh, vocab_size=VOCABULARY, seq_length=LENGTH, seed=7, **options)


def _loss(model, seed):
    with torch.no_grad():
        return model(*_batch(), dropout_seed=seed).item()


def _passes(sequence_parallel):
    return [
        ForwardPass(TensorAxis(ProcessMesh(MeshShape(tensor=2), rank), sequence_parallel), dropout_seed=3)
        for rank in range(2)
    ]


def test_masks_between_split_regions():
    hidden = torch.ones(8, 2, 32)
    whole = [run.dropout(hidden, 0.2, 1, Site.MLP_OUTPUT) for run in _passes(False)]
    assert torch.equal(whole[0], whole[1]) and (whole[0] == 0).any()
    parts = [run.dropout(hidden[:4], 0.2, 1, Site.MLP_OUTPUT) for run in _passes(True)]
    assert torch.equal(torch.cat(parts), whole[0])
    added = _passes(False)[0].bias_dropout_add(hidden, 3 * hidden[0, 0], hidden, 0.2, 1, Site.MLP_OUTPUT)
    assert torch.equal(added, 1 + 4 * whole[0])
    nothing = ForwardPass(_passes(False)[0].axis)
    assert nothing.dropout(hidden, 0.2, 1, Site.MLP_OUTPUT) is hidden
    assert torch.equal(nothing.bias_dropout_add(hidden, None, hidden, 0.2, 1, Site.MLP_OUTPUT), 2 * hidden)


def test_every_site_layer_and_head_split_has_its_own_seed():
    seeds = [run.seed(layer, site, differs=True) for run in _passes(False) for layer in range(-1, 40) for site in Site]
    assert len(set(seeds)) == len(seeds)
    assert ForwardPass(_passes(False)[0].axis).seed(0, Site.EMBEDDING, differs=False) is None


def test_loss_is_a_function_of_the_seed():
    model = _model(ProcessMesh.create(MeshShape()))
    assert _loss(model, 1) == _loss(model, 1) != _loss(model, 2)
    assert _loss(model, None) != _loss(model, 1)
    assert _loss(model.eval(), 1) == _loss(model, None)
    for field in ("hidden_dropout", "attention_dropout"):
        alone = _model(ProcessMesh.create(MeshShape()), dataclasses.replace(CONFIG, **{field: 0.0}))
        assert len({_loss(alone, seed) for seed in (None, 1, 2)}) == 3


def _gradients(mesh, recompute, **options):
    model = _model(mesh, recompute=recompute, **options)
    loss = model(*_batch(), dropout_seed=5)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def _assert_recompute_is_exact(mesh, **options):
    plain = _gradients(mesh, Recompute(), **options)
    for recompute in RECOMPUTE:
        for expected, value in zip(plain, _gradients(mesh, recompute, **options), strict=True):
            assert torch.equal(expected, value), recompute


def test_recompute_gives_the_same_bits():
    mesh = ProcessMesh.create(MeshShape())
    _assert_recompute_is_exact(mesh)
    _assert_recompute_is_exact(mesh, dtype=torch.bfloat16)


def _on_two_ranks(serial_loss):
    mesh = ProcessMesh.create(MeshShape(tensor=2))
    no_attention_dropout = dataclasses.replace(CONFIG, attention_dropout=0.0)
    for sequence_parallel in (False, True):
        # Hidden dropout draws the masks of a serial model.
        alone = _model(mesh, no_attention_dropout, sequence_parallel=sequence_parallel)
        assert abs(_loss(alone, 1) - serial_loss) <= 1e-5 * serial_loss
        model = _model(mesh, sequence_parallel=sequence_parallel)
        model.train()
        losses = mesh.gather_json(_loss(model, 1))
        assert losses[0] == losses[1]
        _assert_recompute_is_exact(mesh, sequence_parallel=sequence_parallel)


def test_on_two_ranks():
    model = _model(ProcessMesh.create(MeshShape()), dataclasses.replace(CONFIG, attention_dropout=0.0))
    run_on_ranks(_on_two_ranks, 2, _loss(model, 1))


@pytest.mark.parametrize("training", [True, False])
def test_smoothing_and_z_loss_belong_to_training(training):
    mesh = ProcessMesh.create(MeshShape())
    plain = _model(mesh)
    model = _model(mesh, dataclasses.replace(CONFIG, label_smoothing=0.1, z_loss=1e-2)).train(training)
    assert (_loss(model, None) == _loss(plain, None)) is not training
