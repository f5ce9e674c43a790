"""The attention backends agree to rounding, and each is the formula."""

import dataclasses

import pytest
import torch

from megatron_lite.config.kernels import KernelsConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.model.attention import fused_softmax, sdpa
from megatron_lite.model.cache import KeyValueCache
from megatron_lite.model.gpt import GPT
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.parallel.recompute import Recompute

VOCABULARY, LENGTH = 50, 17
CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    position_embedding_type="rope",
    hidden_dropout=0.0,
    attention_dropout=0.0,
    init_method_std=0.2,
)


def _drawn(*shape, seed, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _inputs(heads, groups, queries, keys, dtype):
    """Query, key and value as a layer has them: views of [S, B, ...], key and value of one tensor."""
    query = _drawn(queries, 3, heads, 16, seed=0, dtype=dtype).permute(1, 2, 0, 3)
    key, value = (t.permute(1, 2, 0, 3) for t in _drawn(keys, 3, 2, groups, 16, seed=1, dtype=dtype).unbind(2))
    return query, key, value


def _hidden_at_random(queries, keys):
    seen = _drawn(3, 1, queries, keys, seed=2, dtype=torch.float32) > 0
    seen[..., 0] = True
    return seen


def _exact(query, key, value, seen):
    """The formula, in float64."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (1, 9), (1, 1), (70, 70)])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype, heads, groups, queries, keys, masked):
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    mask = (seen := _hidden_at_random(queries, keys)) if masked else None
    inputs = _inputs(heads, groups, queries, keys, dtype)
    cotangent = _drawn(3, heads, queries, 16, seed=3, dtype=dtype)
    results = {}
    for name, attend, kind in (
        ("exact", lambda *qkv: _exact(*qkv, seen), torch.float64),
        ("sdpa", lambda *qkv: sdpa(*qkv, mask, 0.0, None), dtype),
        ("fused_softmax", lambda *qkv: fused_softmax(*qkv, mask, 0.0, None), dtype),
    ):
        leaves = [t.detach().to(kind).requires_grad_() for t in inputs]
        output = attend(*leaves)
        output.backward(cotangent.to(kind))
        results[name] = [output.detach(), *(leaf.grad for leaf in leaves)]
    for exact, theirs, ours in zip(*results.values(), strict=True):
        assert ours.dtype == dtype and ours.shape == exact.shape
        error, torchs = (ours - exact).norm(), (theirs - exact).norm()
        # Scores and probabilities are rounded to the dtype between the kernels.
        assert error <= 4 * torchs + torch.finfo(dtype).eps * exact.norm()


def test_a_cache_of_several_tokens_is_attended_to_from_its_end():
    query, key, value = _inputs(4, 2, 3, 11, torch.float32)
    seen = torch.ones(3, 11, dtype=torch.bool).tril(8)
    expected = sdpa(query, key, value, seen[None, None], 0.0, None)
    torch.testing.assert_close(fused_softmax(query, key, value, None, 0.0, None), expected)


@pytest.mark.parametrize("backend", [sdpa, fused_softmax])
def test_dropout_keeps_the_mean_and_repeats_by_its_seed(backend):
    query, key, _ = _inputs(4, 2, 12, 12, torch.float32)
    value = torch.ones_like(key)
    draws = torch.stack([backend(query, key, value, None, 0.25, seed) for seed in range(300)])
    assert torch.equal(draws[7], backend(query, key, value, None, 0.25, 7))
    assert not torch.equal(draws[7], draws[8])
    assert draws.mean().item() == pytest.approx(1, abs=0.01)
    # The first query sees one key: it is dropped, or scaled up.
    first = draws[..., 0, 0]
    assert first.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (first == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)


def _model(backend, config=CONFIG, **options):
    kernels = KernelsConfig(attention_backend=backend)
    return GPT(
        config,
        ProcessMesh.create(MeshShape()),
        vocab_size=VOCABULARY,
        seq_length=LENGTH,
        kernels=kernels,
        seed=3,
        **options,
    )


def _tokens(rows=2):
    return torch.randint(0, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(0))


def _gradients(backend, config=CONFIG, **options):
    model = _model(backend, config, **options).train()
    tokens = _tokens()
    loss = model(tokens, tokens.roll(-1, 1), torch.ones_like(tokens, dtype=torch.float32), dropout_seed=5)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def test_a_model_has_the_same_loss_and_gradients():
    for ours, theirs in zip(_gradients("fused_softmax"), _gradients("auto"), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-6


def test_selective_recompute_draws_the_same_masks():
    config = dataclasses.replace(CONFIG, attention_dropout=0.2)
    plain = _gradients("fused_softmax", config)
    again = _gradients("fused_softmax", config, recompute=Recompute("selective"))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert not torch.equal(plain[0], _gradients("fused_softmax")[0])


def test_generation_step_by_step_with_padding_on_the_left():
    padding = torch.tensor([0, 4])
    expected = _model("sdpa").eval().logits(_tokens(), left_padding_B=padding)
    model, cache, found = _model("fused_softmax").eval(), KeyValueCache(LENGTH), []
    for part in _tokens().split([6, 5, 1, 1, 4], dim=1):
        found.append(model.logits(part, cache=cache, left_padding_B=padding))
    torch.testing.assert_close(torch.cat(found, 1)[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(found, 1)[1, 4:], expected[1, 4:], rtol=1e-4, atol=1e-4)
