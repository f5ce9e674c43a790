"""The GPT against Hugging Face `transformers`: equal logits, losses and gradients on 1, 2 and 4 tensor ranks."""

import pytest
import torch
from ranks import run_on_ranks
from transformers_models import gpt2, llama, llama3, load_serial, mistral, qwen2, qwen3, serial, shake

from megatron_lite.errors import UserError
from megatron_lite.model.cache import KeyValueCache
from megatron_lite.model.gpt import GPT
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh

VOCABULARY, LENGTH, BATCH = 101, 24, 3


def _references():
    cases = {}
    for name, (model, config) in {
        "gpt2": gpt2(VOCABULARY, LENGTH),
        "llama, 4 key/value heads": llama(VOCABULARY, LENGTH, kv_heads=4),
        "llama, 2 key/value heads": llama(VOCABULARY, LENGTH, kv_heads=2),
        "llama, 1 key/value head": llama(VOCABULARY, LENGTH, kv_heads=1),
        "llama 3, stretched": llama3(VOCABULARY, LENGTH),
        "mistral": mistral(VOCABULARY, LENGTH),
        "qwen2": qwen2(VOCABULARY, LENGTH),
        "qwen3": qwen3(VOCABULARY, LENGTH),
    }.items():
        shake(model)
        generator = torch.Generator().manual_seed(1)
        text = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
        mask = torch.rand(BATCH, LENGTH, generator=generator) > 0.2
        logits = model(text[:, :-1]).logits
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), text[:, 1:], reduction="none")
        (losses * mask).sum().backward()
        cases[name] = {
            "config": config,
            "text": text.numpy(),
            "mask": mask.numpy(),
            "logits": logits.detach().numpy(),
            "losses": losses.detach().numpy(),
            "weights": {k: v.numpy() for k, v in serial(model).items()},
            "gradients": {k: v.numpy() for k, v in serial(model, gradients=True).items()},
        }
    return cases


@pytest.fixture(scope="module")
def references():
    return _references()


def _check(size, references):
    mesh = ProcessMesh.create(MeshShape(tensor=size))
    for name, case in references.items():
        for sequence_parallel in (False, True) if size > 1 else (False,):
            _check_case(f"{name}, sequence parallel {sequence_parallel}", case, mesh, sequence_parallel)


def _check_case(name, case, mesh, sequence_parallel):
    model = GPT(
        case["config"], mesh, vocab_size=VOCABULARY, seq_length=LENGTH, sequence_parallel=sequence_parallel, seed=0
    )
    load_serial(model, {k: torch.from_numpy(v) for k, v in case["weights"].items()})
    text, mask = torch.from_numpy(case["text"]), torch.from_numpy(case["mask"])
    tokens, labels = text[:, :-1], text[:, 1:]
    expected = torch.from_numpy(case["logits"])

    logits = model.full_logits(model.logits(tokens))
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() <= 1e-5, name
    losses, correct = model.token_losses(tokens, labels)
    assert torch.allclose(losses, torch.from_numpy(case["losses"]), atol=1e-5), name
    assert torch.equal(correct, expected.argmax(-1) == labels), name

    model(tokens, labels, mask, dropout_seed=None).backward()
    for key, parameter in model.named_parameters():
        reference = torch.from_numpy(case["gradients"][key])
        difference = parameter.grad - parameter.mesh_layout.cut(reference)
        assert difference.norm() <= 1e-5 * reference.norm(), (name, key, difference.norm() / reference.norm())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_logits_losses_and_gradients_equal_transformers(size, references):
    if size == 1:
        _check(1, references)
    else:
        run_on_ranks(_check, size, size, references)


def test_cached_logits_equal_plain_ones(references):
    for name, case in references.items():
        mesh = ProcessMesh.create(MeshShape())
        model = GPT(case["config"], mesh, vocab_size=VOCABULARY, seq_length=LENGTH, seed=0)
        load_serial(model, {k: torch.from_numpy(v) for k, v in case["weights"].items()})
        tokens = torch.from_numpy(case["text"])[:, :-1]
        cache = KeyValueCache(LENGTH)
        parts = [model.logits(part, cache=cache) for part in tokens.split((5, 1, 1, 7, 1, LENGTH - 15), dim=1)]
        assert (torch.cat(parts, 1) - model.logits(tokens)).abs().max() <= 1e-5, name
        assert torch.equal(model.logits(tokens, last_only=True), model.logits(tokens)[:, -1:])
        with pytest.raises(ValueError, match="5 tokens in a key/value cache of 4"):
            model.logits(tokens[:, :5], cache=KeyValueCache(4))


def test_more_tokens_than_learned_positions_are_refused_with_the_numbers(references):
    model = GPT(references["gpt2"]["config"], ProcessMesh.create(MeshShape()), vocab_size=9, seq_length=8, seed=0)
    cache = KeyValueCache(16)
    model.logits(torch.zeros(1, 8, dtype=torch.int64), cache=cache)
    with pytest.raises(UserError, match="9 tokens for a model that learned 8 positions"):
        model.logits(torch.zeros(1, 1, dtype=torch.int64), cache=cache)


def test_left_padding_changes_no_logit(references):
    for name, case in references.items():
        mesh = ProcessMesh.create(MeshShape())
        model = GPT(case["config"], mesh, vocab_size=VOCABULARY, seq_length=LENGTH, seed=0)
        load_serial(model, {k: torch.from_numpy(v) for k, v in case["weights"].items()})
        tokens = torch.from_numpy(case["text"])[:, :10]
        padding = torch.tensor([0, 4, 7])
        padded = torch.zeros_like(tokens)
        for row, skip in zip(range(BATCH), padding.tolist(), strict=True):
            padded[row, skip:] = tokens[row, : 10 - skip]
        cache = KeyValueCache(10)
        logits = torch.cat(
            [model.logits(part, cache=cache, left_padding_B=padding) for part in padded.split((8, 1, 1), dim=1)], 1
        )
        plain = model.logits(tokens)
        for row, skip in zip(range(BATCH), padding.tolist(), strict=True):
            assert (logits[row, skip:] - plain[row, : 10 - skip]).abs().max() <= 1e-5, name
