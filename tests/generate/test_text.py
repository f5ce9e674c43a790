"""Completions as text: stop strings, streaming, several samples, data ranks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_on_ranks

from megatron_lite.config.model import ModelConfig
from megatron_lite.data.tokenizer_byte import ByteTokenizer
from megatron_lite.errors import UserError
from megatron_lite.generate.sampling import Sampling
from megatron_lite.generate.text import GrowingText, complete
from megatron_lite.model.gpt import GPT
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh

TOKENIZER = ByteTokenizer()
PROMPTS = ["In the beginning", "ä", "Now these are"]


def grown(text, stop):
    """(pieces told while `text` arrives byte by byte, whether a stop string was met)."""
    growing = GrowingText(TOKENIZER, TOKENIZER.encode("Q: "), stop)
    pieces = []
    for token in TOKENIZER.encode(text):
        pieces.append(growing.push(token))
        if growing.stopped:
            break
    pieces.append(growing.finish())
    assert "".join(pieces) == growing.text
    return pieces, growing.stopped


@given(st.text("abEND\n"), st.lists(st.text("abEND\n", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(text, stop):
    pieces, stopped = grown(text, stop)
    # The first stop string to be complete ends the text; of those that end together, the earliest beginning.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    assert stopped == bool(ends)
    assert "".join(pieces) == (text[: min(ends)[1]] if ends else text)


@given(st.text())
def test_all_text_is_told_in_whole_characters(text):
    pieces, stopped = grown(text, ["\x00never\x00"])
    assert "".join(pieces) == text and not stopped


def test_what_may_begin_a_stop_string_is_held_back_until_it_is_certain():
    assert grown("a\n\nQ", ["\n\nA"])[0] == ["a", "", "", "\n\nQ", ""]
    assert grown("a\n\nA", ["\n\nA"])[0] == ["a", "", "", "", ""]


def model_on(mesh):
    config = ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, init_method_std=0.3, make_vocab_size_divisible_by=8
    )
    return GPT(config, mesh, vocab_size=TOKENIZER.vocab_size, seq_length=64, seed=0).eval()


def run(mesh, **options):
    options = {"prompts": PROMPTS, "sampling": Sampling(seed=4), "max_new_tokens": 12, **options}
    return complete(model_on(mesh), mesh, TOKENIZER, options.pop("prompts"), options.pop("sampling"), **options)


@pytest.fixture(scope="module")
def mesh():
    return ProcessMesh.create(MeshShape())


def test_completions_come_by_prompt_and_sample_whatever_the_batches(mesh):
    expected = run(mesh, num_samples=2)
    assert [(c.prompt, c.sample) for c in expected] == [(p, s) for p in PROMPTS for s in range(2)]
    assert len({c.text for c in expected}) == 6
    assert run(mesh, num_samples=2, batch_size=1) == expected
    assert run(mesh, num_samples=2, batch_size=4, use_cache=False) == expected
    assert run(mesh, prompts=PROMPTS[::-1])[-1] == expected[0]


def test_what_is_streamed_is_the_text(mesh):
    told = {number: "" for number in range(3)}

    def on_text(number, piece):
        told[number] += piece

    texts = [completion.text for completion in run(mesh, on_text=on_text)]
    assert list(told.values()) == texts


def test_a_stop_string_ends_its_row_alone(mesh):
    plain = run(mesh)
    stop = plain[0].text[1:3]
    assert stop not in plain[1].text
    stopped = run(mesh, stop=["unmet", stop])
    assert (stopped[0].text, stopped[0].reason) == (plain[0].text[: plain[0].text.index(stop)], "stop")
    assert stopped[0].tokens < plain[0].tokens
    assert stopped[1:] == plain[1:]


def _on_a_mesh(tensor, data):
    mesh = ProcessMesh.create(MeshShape(data=data, tensor=tensor))
    return [(c.text, c.reason) for c in run(mesh, num_samples=2, batch_size=2)]


def test_data_and_tensor_ranks_share_the_work_and_agree(mesh):
    expected = [(c.text, c.reason) for c in run(mesh, num_samples=2)]
    assert run_on_ranks(_on_a_mesh, 4, 2, 2) == [expected] * 4


def test_unfit_prompts_are_refused(mesh):
    with pytest.raises(UserError, match="prompt 2 of 2 is empty"):
        run(mesh, prompts=["a", ""])
    with pytest.raises(
        UserError, match="1 of 1 has 70 tokens and the model was trained for 64 positions; shorten it by 6"
    ):
        run(mesh, prompts=["a" * 70])
    with pytest.raises(UserError, match="stop string is empty"):
        run(mesh, stop=[""])


def test_sentencepiece_keeps_the_space_after_the_prompt(tmp_path):
    import sentencepiece

    from megatron_lite.data.tokenizer_sentencepiece import SentencePieceTokenizer

    sentences = iter(["hello world of words"] * 50)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_prefix=str(tmp_path / "m"), vocab_size=15, minloglevel=2
    )
    tokenizer = SentencePieceTokenizer.from_path(tmp_path / "m.model")
    prompt, both = tokenizer.encode("hello"), tokenizer.encode("hello world")
    assert both[: len(prompt)] == prompt
    growing = GrowingText(tokenizer, prompt, ())
    assert "".join(map(growing.push, both[len(prompt) :])) + growing.finish() == " world"


def test_ids_are_never_those_the_tokenizer_lacks(mesh):
    config = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, make_vocab_size_divisible_by=8)
    model = GPT(config, mesh, vocab_size=2000, seq_length=64, seed=0).eval()
    torch.manual_seed(0)
    done = complete(model, mesh, TOKENIZER, ["a"], Sampling(), max_new_tokens=20, num_samples=8)
    assert sum(c.tokens for c in done) > 20
