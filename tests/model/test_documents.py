"""Attention within documents is attention under the dense block-diagonal mask, by every backend and to the gradient."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers_models import gpt2, llama, load_serial, serial, shake

from megatron_lite.config.kernels import KernelsConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.model.attention import ATTENTION_BACKENDS
from megatron_lite.model.documents import Documents, attend_by_lengths, attend_in_blocks
from megatron_lite.model.gpt import GPT
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.parallel.recompute import Recompute

VOCABULARY, BATCH, LENGTH = 50, 3, 40
CPU = torch.device("cpu")


def begins_of(*rows, length=LENGTH):
    """bool [B, S] that is true at the places of each row."""
    begins = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, places in zip(begins, rows, strict=True):
        row[torch.tensor([0, *places])] = True
    return begins


DIVIDED = begins_of([1, 2, 30], [], [5, 10, 15, 20, 39])


def dense(begins):
    """bool [B, 1, S, S]: the keys each query sees."""
    document = begins.cumsum(1)
    return (document[:, None, :, None] == document[:, None, None, :]).tril()


def positions_of(begins):
    """int64 [B, S], one token after the other."""
    rows = []
    for row in begins.tolist():
        rows.append([])
        for is_first in row:
            rows[-1].append(0 if is_first or not rows[-1] else rows[-1][-1] + 1)
    return torch.tensor(rows)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads_of(begins, heads=4, groups=2):
    """Query, key and value as a layer has them: views of [S, B, ...], key and value of one tensor."""
    batch, length = begins.shape
    query = drawn(length, batch, heads, 8).permute(1, 2, 0, 3)
    return query, *(t.permute(1, 2, 0, 3) for t in drawn(length, batch, 2, groups, 8, seed=1).unbind(2))


def with_gradients(attend, heads):
    leaves = [t.detach().requires_grad_() for t in heads]
    output = attend(*leaves)
    output.backward(drawn(*output.shape, seed=2))
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6


@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
def test_blocks_are_the_dense_mask(backend, heads, groups):
    inputs = heads_of(DIVIDED, heads, groups)
    attend, documents = ATTENTION_BACKENDS[backend], Documents(DIVIDED, CPU)
    ours = with_gradients(lambda *qkv: attend_in_blocks(attend, *qkv, documents, 0.0, None), inputs)
    mask = dense(DIVIDED)
    theirs = with_gradients(lambda *qkv: F.scaled_dot_product_attention(*qkv, attn_mask=mask, enable_gqa=True), inputs)
    close(ours, theirs)


@given(st.data())
def test_every_token_has_a_place_and_blocks_are_nearly_full(data):
    length = data.draw(st.integers(1, 300))
    places = st.lists(st.integers(0, length - 1), max_size=30)
    begins = begins_of(*data.draw(st.lists(places, min_size=1, max_size=3)), length=length)
    documents = Documents(begins, CPU)
    blocks = documents.blocks
    assert documents.lengths.sum() == begins.numel() and documents.longest == documents.lengths.max()
    assert documents.is_divided == (begins[:, 1:].sum() > 0)
    sizes = [count * tokens for count, tokens in blocks.shapes]
    assert sum(sizes) == len(blocks.source) == len(blocks.filling) + begins.numel()
    assert torch.equal(blocks.source[blocks.place], torch.arange(begins.numel()))
    assert set(blocks.place.tolist()).isdisjoint(blocks.filling.tolist())
    # Within a document of a block tokens follow one another: the batch apart, and the last again where it is filled up.
    for part, (count, tokens) in zip(blocks.source.split(sizes), blocks.shapes, strict=True):
        steps = part.view(count, tokens).diff(dim=1)
        assert set(steps.unique().tolist()) <= {0, len(begins)}
        filled = (steps == len(begins)).sum(1) + 1
        assert (filled >= 7 / 8 * tokens).all() or (tokens <= 32 and filled.sum() >= count * tokens / 2)


def test_lengths_end_to_end_on_a_gpu(monkeypatch):
    """The GPU's kernel by its contract: documents [first, next) of all tokens, one sequence behind the other."""
    called = []

    def kernel(query, key, value, ends, same_ends, longest, same_longest, dropout, *, is_causal, return_debug_mask):
        called.append((dropout, longest))
        assert ends.dtype == torch.int32 and ends is same_ends and longest == same_longest and is_causal
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        sizes = ends.diff().tolist()
        assert ends[0] == 0 and sum(sizes) == len(query) == len(key) and max(sizes) == longest
        parts = zip(*(t.transpose(0, 1).split(sizes, 1) for t in (query, key, value)), strict=True)
        mixed = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
        return torch.cat(mixed, 1).transpose(0, 1), None, None

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", kernel)
    inputs, documents = heads_of(DIVIDED), Documents(DIVIDED, CPU)
    ours = with_gradients(lambda *qkv: attend_by_lengths(*qkv, documents, 0.1, None), inputs)
    theirs = with_gradients(
        lambda *qkv: attend_in_blocks(ATTENTION_BACKENDS["sdpa"], *qkv, documents, 0.0, None), inputs
    )
    close(ours, theirs)
    attend_by_lengths(*inputs, documents, 0.1, 7)
    assert called == [(0.0, 40), (0.1, 40)]


def test_the_kernel_of_a_gpu_takes_what_it_is_given():
    """Shapes, and that torch has a gradient of it, without a GPU."""
    documents = Documents(DIVIDED, torch.device("meta"))
    shapes = (BATCH, 4, LENGTH, 8), (BATCH, 2, LENGTH, 8), (BATCH, 2, LENGTH, 8)
    leaves = [torch.empty(s, device="meta", dtype=torch.bfloat16, requires_grad=True) for s in shapes]
    mixed = attend_by_lengths(*leaves, documents, 0.0, None)
    assert mixed.shape == shapes[0]
    mixed.sum().backward()
    assert [leaf.grad.shape for leaf in leaves] == list(shapes)


@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_dropout_keeps_the_mean_and_repeats_by_its_seed(backend):
    query, key, _ = heads_of(DIVIDED)
    attend, documents, ones = ATTENTION_BACKENDS[backend], Documents(DIVIDED, CPU), torch.ones_like(key)
    draws = torch.stack([attend_in_blocks(attend, query, key, ones, documents, 0.25, s) for s in range(100)])
    assert torch.equal(draws[7], attend_in_blocks(attend, query, key, ones, documents, 0.25, 7))
    assert not torch.equal(draws[7], draws[8])
    assert draws.mean().item() == pytest.approx(1, abs=0.02)
    # Documents of one token in different blocks or places draw apart: each is dropped, or scaled up.
    alone = draws[..., 0][:, 0, :, [0, 1]]
    assert alone.unique().tolist() == pytest.approx([0, 4 / 3])
    assert not torch.equal(alone[:, 0], alone[:, 1])


CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    position_embedding_type="rope",
    hidden_dropout=0.0,
    attention_dropout=0.0,
    init_method_std=0.3,
)


def model_of(config=CONFIG, backend="auto", **options):
    return GPT(
        config,
        ProcessMesh.create(MeshShape()),
        vocab_size=VOCABULARY,
        seq_length=LENGTH,
        kernels=KernelsConfig(attention_backend=backend),
        **{"seed": 3} | options,
    )


def tokens_of(seed=0):
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(model, block, **boundaries):
    model.zero_grad()
    tokens, labels = block[:, :-1], block[:, 1:]
    loss = model.train()(tokens, labels, torch.ones_like(tokens, dtype=torch.bool), **boundaries)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_five_steps_of_transformers_model_under_a_dense_mask(kind):
    torch.manual_seed(0)
    make = {"gpt2": gpt2, "llama": lambda *sizes: llama(*sizes, kv_heads=2)}[kind]
    theirs, config = make(VOCABULARY, LENGTH)
    theirs.set_attn_implementation("sdpa")
    shake(theirs)
    ours = model_of(dataclasses.replace(config), seed=None)
    load_serial(ours, serial(theirs))
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in (theirs, ours)]
    mask, positions = dense(DIVIDED), positions_of(DIVIDED)
    for step in range(5):
        block = tokens_of(step)
        loss, *_ = loss_and_gradients(ours, block, begins_BS=DIVIDED, positions_BS=positions)
        theirs.zero_grad()
        logits = theirs(block[:, :-1], attention_mask=mask, position_ids=positions).logits
        expected = F.cross_entropy(logits.flatten(0, 1), block[:, 1:].flatten(), reduction="sum")
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        reference = serial(theirs, gradients=True)
        largest = max(gradient.norm() for gradient in reference.values())
        for name, parameter in ours.named_parameters():
            gradient = parameter.mesh_layout.cut(reference[name])
            assert (parameter.grad - gradient).norm() <= 1e-5 * (gradient.norm() + 1e-2 * largest), name
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("position", ["rope", "learned_absolute"])
def test_documents_in_one_sequence_are_sequences_of_their_own(position):
    """And positions that begin anew, or not, are another matter than attention that ends."""
    model = model_of(dataclasses.replace(CONFIG, position_embedding_type=position)).eval()
    block, begins = tokens_of(), begins_of([13], [13], [13])
    tokens, labels = block[:, :-1], block[:, 1:]
    together, _ = model.token_losses(tokens, labels, begins_BS=begins, positions_BS=positions_of(begins))
    parts = [model.token_losses(tokens[:, part], labels[:, part])[0] for part in (slice(0, 13), slice(13, None))]
    torch.testing.assert_close(together, torch.cat(parts, 1), rtol=1e-5, atol=1e-5)
    plain, _ = model.token_losses(tokens, labels)
    by_attention, _ = model.token_losses(tokens, labels, begins_BS=begins)
    by_position, _ = model.token_losses(tokens, labels, positions_BS=positions_of(begins))
    for losses in (plain, by_attention, by_position):
        torch.testing.assert_close(losses[:, :13], together[:, :13], rtol=1e-5, atol=1e-5)
    # A rotation knows distances alone, and those within a document stay.
    assert torch.allclose(by_attention, together, rtol=1e-4) == (position == "rope")
    assert not torch.allclose(plain, together, rtol=1e-3) and not torch.allclose(by_position, together, rtol=1e-3)


@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_a_changed_document_changes_no_others_loss(backend):
    model, block, changed = model_of(backend=backend).eval(), tokens_of(), tokens_of(1)
    boundaries = {"begins_BS": DIVIDED, "positions_BS": positions_of(DIVIDED)}
    other = block.clone()
    other[0, 2:30] = changed[0, 2:30]
    before, after = (model.token_losses(each[:, :-1], block[:, 1:], **boundaries)[0] for each in (block, other))
    assert not torch.equal(before[0, 2:30], after[0, 2:30])
    before[0, 2:30] = after[0, 2:30]
    assert torch.equal(before, after)


def test_recompute_computes_the_same_under_dropout():
    config = dataclasses.replace(CONFIG, attention_dropout=0.2)
    boundaries = {"begins_BS": DIVIDED, "positions_BS": positions_of(DIVIDED), "dropout_seed": 5}
    plain = loss_and_gradients(model_of(config), tokens_of(), **boundaries)
    for recompute in (Recompute("selective"), Recompute("full")):
        again = loss_and_gradients(model_of(config, recompute=recompute), tokens_of(), **boundaries)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_whole_sequences_are_attended_to_as_ever():
    whole = begins_of([], [], [])
    model, block = model_of(), tokens_of()
    plain = loss_and_gradients(model, block)
    told = loss_and_gradients(model, block, begins_BS=whole, positions_BS=positions_of(whole))
    assert all(torch.equal(a, b) for a, b in zip(plain, told, strict=True))
