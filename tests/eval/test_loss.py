"""Scores: every token once, equal to Hugging Face's sliding windows, at any number of ranks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_on_ranks
from transformers_models import gpt2, llama, load_serial, serial, shake

from megatron_lite.data.documents import TokenWindows
from megatron_lite.data.indexed import IndexedReader, IndexedWriter
from megatron_lite.data.provenance import Provenance, write_provenance
from megatron_lite.data.tokenizer_byte import ByteTokenizer
from megatron_lite.errors import ConfigError, DataError, NonFiniteError
from megatron_lite.eval.loss import Score, score
from megatron_lite.eval.passage import Passage, Windows, passage_of_documents, passage_of_text
from megatron_lite.model.gpt import GPT
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.pipeline.partition import balanced_counts, stages_of_counts
from megatron_lite.parallel.process_mesh import ProcessMesh

VOCABULARY, LENGTH = 101, 16
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, 75)
TOKENIZER = ByteTokenizer()


def passage_of(tokens, name="some tokens", text_bytes=None):
    return Passage(name, len(tokens), lambda start, stop: tokens[start:stop], text_bytes)


@given(st.integers(2, 200), st.integers(1, 40), st.data())
def test_windows_ask_for_every_token_but_the_first_once_with_as_much_context_as_fits(num_tokens, length, data):
    stride = data.draw(st.integers(1, length))
    windows = Windows(num_tokens, length, stride)
    passage = passage_of(np.arange(num_tokens))
    asked = []
    for window in range(len(windows)):
        tokens, labels = windows.read(passage, window)
        assert len(tokens) == len(labels) == min(length, num_tokens - 1)
        for place in np.flatnonzero(labels >= 0):
            assert labels[place] == tokens[place] + 1 == window * stride + place + 1
            context = place + 1
            assert context >= min(length - stride + 1, labels[place])
            asked.append(labels[place])
    assert asked == list(range(1, num_tokens))


def reference_windows(theirs, tokens, max_length, stride):
    """Sum of losses, number of targets and of hits by the sliding windows of Hugging Face's perplexity page."""
    total, count, hits, previous_end = 0.0, 0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + max_length, len(tokens))
        ids = torch.tensor(tokens[begin:end])
        logits = theirs(ids[None]).logits[0, :-1].double()
        first = max(previous_end - begin - 1, 0)
        labels = ids[1:][first:]
        total += torch.nn.functional.cross_entropy(logits[first:], labels, reduction="sum").item()
        hits += (logits[first:].argmax(-1) == labels).sum().item()
        count += len(labels)
        previous_end = end
        if end == len(tokens):
            return total, count, hits


@pytest.fixture(scope="module")
def models():
    found = {}
    for name, (theirs, config) in {
        "gpt2": gpt2(VOCABULARY, LENGTH + 1),
        "llama": llama(VOCABULARY, LENGTH + 1, kv_heads=2),
    }.items():
        shake(theirs)
        found[name] = theirs.eval(), config
    return found


def our_model(config, weights, mesh, sequence_parallel=False):
    pipe = mesh.size("pipe")
    model = GPT(
        config,
        mesh,
        vocab_size=VOCABULARY,
        seq_length=LENGTH + 1,
        sequence_parallel=sequence_parallel,
        stages=stages_of_counts(balanced_counts(config.num_layers, pipe, embedding=0, head=0)),
        placement=range(pipe),
    )
    held = dict(model.named_parameters()) if pipe > 1 else weights
    load_serial(model, {name: weights[name] for name in held})
    return model.eval()


@pytest.mark.parametrize("stride", [16, 5, 1])
@torch.no_grad()
def test_scores_equal_hugging_faces_sliding_windows(models, stride):
    mesh = ProcessMesh.create(MeshShape())
    for theirs, config in models.values():
        loss_sum, count, hits = reference_windows(theirs, TOKENS, LENGTH + 1, stride)
        model = our_model(config, serial(theirs), mesh)
        result = score(model, mesh, passage_of(TOKENS), seq_length=LENGTH, stride=stride, batch_size=3)
        assert (result.tokens, result.correct) == (count, hits) == (len(TOKENS) - 1, hits)
        assert result.loss_sum == pytest.approx(loss_sum, rel=1e-6)
        assert result.perplexity == pytest.approx(math.exp(loss_sum / count), rel=1e-6)


def _score_on(shape, config, weights, sequence_parallel):
    mesh = ProcessMesh.create(MeshShape(**shape))
    weights = {name: torch.from_numpy(value) for name, value in weights.items()}
    model = our_model(config, weights, mesh, sequence_parallel)
    passage = passage_of(TOKENS, text_bytes=lambda part, parts: 10 + part if parts > 1 else 21)
    told = []
    result = score(
        model, mesh, passage, seq_length=LENGTH, stride=7, batch_size=2, on_batch=lambda *counts: told.append(counts)
    )
    assert told == [(done, len(told)) for done in range(1, len(told) + 1)]
    return result.loss_sum, result.tokens, result.correct, result.text_bytes


@pytest.mark.parametrize("shape", [{"data": 2}, {"tensor": 2}, {"pipe": 2}])
def test_scores_are_equal_at_any_number_of_ranks(models, shape):
    theirs, config = models["llama"]
    weights = {name: value.numpy() for name, value in serial(theirs).items()}
    loss_sum, *counts = _score_on({}, config, weights, False)
    for sequence_parallel in (False, True) if "tensor" in shape else (False,):
        results = run_on_ranks(_score_on, 2, shape, config, weights, sequence_parallel)
        assert results[0] == results[1]
        assert results[0][1:] == tuple(counts)
        # Data ranks score the same batches: only the order of a float64 sum differs.
        assert results[0][0] == pytest.approx(loss_sum, rel=1e-6 if "tensor" in shape else 1e-14)


def test_derived_numbers_and_sums():
    together = Score(8.0, 4, 1, 2) + Score(4.0, 2, 2, 4)
    assert together == Score(12.0, 6, 3, 6)
    assert (together.loss, together.accuracy, together.perplexity) == (2.0, 0.5, math.exp(2.0))
    assert together.bits_per_byte == pytest.approx(12 / math.log(2) / 6)
    assert (together + Score(1.0, 1, 0, None)).bits_per_byte is None
    assert Score(1e6, 1, 0, 1).perplexity == math.inf


TEXTS = ["Größe – ja", "plain", "日本語 text", "last"]


@pytest.fixture
def token_set(tmp_path):
    with IndexedWriter(tmp_path / "set", vocab_size=TOKENIZER.vocab_size) as writer:
        for text in TEXTS:
            writer.add_document([*TOKENIZER.encode(text), TOKENIZER.eod])
    return tmp_path / "set"


def facts(**changes):
    values = {
        "tokenizer_type": "ByteTokenizer",
        "tokenizer_fingerprint": TOKENIZER.fingerprint,
        "vocab_size": TOKENIZER.vocab_size,
        "append_eod": True,
        "documents": len(TEXTS),
        "tokens": sum(len(text.encode()) + 1 for text in TEXTS),
        "text_bytes": sum(len(text.encode()) for text in TEXTS),
        "unigram_entropy": 1.0,
        "skipped": {},
        "created_by": "a test",
    }
    return Provenance(**(values | changes))


def open_passage(prefix, documents=None, vocab_size=TOKENIZER.vocab_size, tokenizer=TOKENIZER):
    return passage_of_documents("set", TokenWindows(IndexedReader(prefix), 8, None, documents), vocab_size, tokenizer)


@pytest.mark.parametrize("documents", [None, (0, 1), (1, 3)])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("with_facts", [False, True])
def test_bytes_are_those_of_the_scored_tokens(token_set, documents, parts, with_facts):
    if with_facts:
        write_provenance(token_set, facts())
    passage = open_passage(token_set, documents)
    held = TEXTS[slice(*(documents or (None,)))]
    assert passage.num_tokens == sum(len(text.encode()) + 1 for text in held)
    # The first byte of the first document is not predicted.
    assert sum(passage.text_bytes(part, parts) for part in range(parts)) == len("".join(held).encode()) - 1
    first = passage.tokens(0, 3)
    assert first.tolist() == list(held[0].encode()[:3])


def test_the_count_of_preprocessing_is_taken_for_a_whole_set_alone(token_set):
    write_provenance(token_set, facts(text_bytes=1000))
    assert open_passage(token_set).text_bytes(0, 1) == 999
    assert open_passage(token_set, (1, 3)).text_bytes(0, 1) < 100


def test_a_set_of_another_tokenizer_or_vocabulary_is_refused(token_set):
    with pytest.raises(DataError, match="token id 256 and the vocabulary has ids 0 to 99"):
        open_passage(token_set, vocab_size=100)
    write_provenance(token_set, facts(tokenizer_fingerprint="of another"))
    with pytest.raises(DataError, match="made with another tokenizer"):
        open_passage(token_set)


def test_without_a_tokenizer_bits_per_byte_are_unknown_and_that_is_said(token_set, capsys):
    assert open_passage(token_set, tokenizer=None).text_bytes is None
    assert "bits per byte need a tokenizer" in capsys.readouterr().err


def test_all_of_a_text_is_scored_behind_an_end_of_document(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("Größe\r\n".encode())
    passage = passage_of_text(path, TOKENIZER)
    assert passage.tokens(0, 100).tolist() == [TOKENIZER.eod, *"Größe\r\n".encode()]
    assert passage.text_bytes(0, 2) + passage.text_bytes(1, 2) == len("Größe\r\n".encode()) == 9


def test_unfit_input_is_refused(tmp_path, models):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"abc\xff")
    with pytest.raises(DataError, match="not UTF-8 text: byte 3 is 0xff"):
        passage_of_text(path, TOKENIZER)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        passage_of_text(tmp_path / "absent.txt", TOKENIZER)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="has 1 tokens; scoring needs 2"):
        passage_of_text(path, TOKENIZER)
    for stride in (0, 17):
        with pytest.raises(ConfigError, match=f"stride={stride} is out of range: .* give 1 to 16"):
            Windows(100, 16, stride)


def test_a_loss_that_is_not_finite_is_an_error(models):
    theirs, config = models["gpt2"]
    mesh = ProcessMesh.create(MeshShape())
    model = our_model(config, serial(theirs), mesh)
    with torch.no_grad():
        model.layers["1"].mlp.down.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="some tokens: the loss is nan"):
        score(model, mesh, passage_of(TOKENS), seq_length=LENGTH)


def test_documents_are_scored_as_sequences_of_their_own(models):
    """By a model that was trained so; every token is predicted all the same, the first of each from the one before."""
    theirs, config = models["gpt2"]
    model, tokens = our_model(config, serial(theirs), mesh := ProcessMesh.create(MeshShape())), TOKENS[:37]
    starts = np.array([0, 5, 20, 30])

    def starts_between(first, stop):
        return np.unique(np.concatenate(([first], starts[(starts >= first) & (starts < stop)]))) - first

    passage = Passage("documents", len(tokens), lambda start, stop: tokens[start:stop], None, starts_between)
    divided = score(
        model, mesh, passage, seq_length=LENGTH, batch_size=2, reset_attention_mask=True, reset_position_ids=True
    )
    pieces = zip(*(sorted({*starts, *range(0, 36, LENGTH)})[i:] for i in (0, 1)), strict=False)
    parts = [passage_of(tokens[start : stop + 1]) for start, stop in [*pieces, (32, 36)]]
    alone = [score(model, mesh, part, seq_length=LENGTH) for part in parts]
    assert divided.tokens == sum(part.tokens for part in alone) == 36
    assert divided.loss_sum == pytest.approx(sum(part.loss_sum for part in alone), rel=1e-5)
    assert score(model, mesh, passage, seq_length=LENGTH).loss_sum != pytest.approx(divided.loss_sum, rel=1e-3)
