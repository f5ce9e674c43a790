"""The ladder of libraries: whichever encodes gives the ids of the tokenizer itself, or is not taken, which is said."""

from __future__ import annotations

import copy
import dataclasses
import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import ENGLISH, HARD

from megatron_lite.data import tokenizer_engines
from megatron_lite.data.corpus_job import CorpusJob
from megatron_lite.data.indexed import IndexedReader
from megatron_lite.data.tokenize_corpus import tokenize_corpus
from megatron_lite.data.tokenizer import build_tokenizer
from megatron_lite.data.tokenizer_engines import (
    Unfit,
    disorder_of_merges,
    require_byte_level,
    tiktoken_of_description,
)
from megatron_lite.data.tokenizer_huggingface import HuggingFaceTokenizer
from megatron_lite.data.tokenizer_ladder import Ladder, stand_on
from megatron_lite.errors import TokenizerError

RUNGS = [(kind, engine) for kind in ("gpt2", "bpe") for engine in ("gigatoken", "tiktoken", "tokenizers")]
RUNGS += [("tiktoken", "gigatoken"), ("tiktoken", "tiktoken")]


def climb(tokenizer, wish, sample):
    return Ladder(tokenizer, wish).climb(sample)


@pytest.fixture(scope="module")
def standing(sources):
    """A tokenizer on each rung."""
    found = {}
    for kind, engine in RUNGS:
        found[kind, engine] = build_tokenizer(sources[kind])
        assert climb(found[kind, engine], engine, ENGLISH[:3]) == engine
    return found


@pytest.mark.parametrize(("kind", "engine"), RUNGS)
def test_every_rung_gives_the_ids_of_the_tokenizer(standing, kind, engine):
    tokenizer = standing[kind, engine]
    texts = [*HARD, *ENGLISH[:40], "a <|endoftext|> b<|endoftext|>", "<s></s>"]
    flat, lengths = tokenizer.encode_block(texts)
    assert flat.dtype == np.int32 and lengths.dtype == np.int64
    expected = [tokenizer.encode(text) for text in texts]
    assert lengths.tolist() == list(map(len, expected))
    assert flat.tolist() == [id for row in expected for id in row]


@given(st.lists(st.text(), max_size=5))
def test_gigatoken_on_any_text(standing, texts):
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    for kind in ("gpt2", "tiktoken"):
        tokenizer = standing[kind, "gigatoken"]
        assert tokenizer.encode_block(texts)[0].tolist() == [id for text in texts for id in tokenizer.encode(text)]


def test_the_highest_rung_is_taken_and_said(sources, capsys):
    tokenizer = build_tokenizer(sources["gpt2"])
    assert climb(tokenizer, "auto", ENGLISH[:2]) == "gigatoken"
    assert "text is encoded by gigatoken, whose ids are those of tokenizers on the" in capsys.readouterr().err
    assert climb(build_tokenizer(sources["byte"]), "auto", ["x"]) == "numpy"
    assert climb(build_tokenizer(sources["unigram"]), "auto", ["x"]) == "tokenizers"
    said = capsys.readouterr().err
    assert "gigatoken does not encode the text: its model is Unigram" in said
    assert "text is encoded by tokenizers" in said


def test_a_rung_that_differs_is_left(sources, monkeypatch, capsys):
    """Also where only the corpus shows the difference."""
    tokenizer = build_tokenizer(sources["gpt2"])
    own = tokenizer.engines

    def spoilt():
        encode = own()["tiktoken"]()
        return lambda texts: [row[:-1] if "zebra fish" in texts[i] else row for i, row in enumerate(encode(texts))]

    monkeypatch.setattr(tokenizer, "engines", lambda: {"gigatoken": spoilt, "tiktoken": own()["tiktoken"]})
    sample = ["a zebra fish swims"]
    assert climb(tokenizer, "auto", sample) == "tiktoken"
    said = capsys.readouterr().err
    assert "gigatoken does not encode the text: its ids differ from those of tokenizers, as for 'a zebra fish" in said
    assert tokenizer.encode_block(sample)[0].tolist() == tokenizer.encode(sample[0])
    with pytest.raises(TokenizerError, match=r"--tokenizer-engine gigatoken cannot run this GPT2BPETokenizer: its ids"):
        climb(tokenizer, "gigatoken", sample)
    assert tokenizer.encode_block(sample)[0].tolist() == tokenizer.encode(sample[0])


def test_missing_package_is_said(sources, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert climb(build_tokenizer(sources["gpt2"]), "auto", []) == "tiktoken"
    assert "gigatoken does not encode the text: the package gigatoken is not installed" in capsys.readouterr().err
    with pytest.raises(TokenizerError, match="cannot run this GPT2BPETokenizer: the package gigatoken is not"):
        climb(build_tokenizer(sources["gpt2"]), "gigatoken", [])


def test_a_library_that_never_runs_the_tokenizer_is_refused(sources):
    with pytest.raises(TokenizerError, match="tokenizers: a TiktokenTokenizer is run by gigatoken or tiktoken; leave"):
        climb(build_tokenizer(sources["tiktoken"]), "tokenizers", [])
    with pytest.raises(TokenizerError, match="--tokenizer-engine gigatoken: a ByteTokenizer is run by numpy"):
        climb(build_tokenizer(sources["byte"]), "gigatoken", [])


def test_a_corpus_does_not_depend_on_the_library(sources, tmp_path):
    """Nor on whether workers are copies (gigatoken, tiktoken) or begin anew (tokenizers)."""
    texts = [*HARD, "Hello <|endoftext|>", *ENGLISH[:20]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    written = set()
    for engine in ("auto", "gigatoken", "tiktoken", "tokenizers"):
        job = CorpusJob(
            (str(tmp_path / "a.jsonl"),),
            f"{tmp_path}/{engine}",
            sources["bpe"],
            append_eod=True,
            tokenizer_engine=engine,
            workers=1 + (engine in ("tiktoken", "tokenizers")),
            block_bytes=4096,
            unit_bytes=8192,
        )
        tokenize_corpus(job)
        written.add(b"".join(Path(f"{job.prefix('text')}.{suffix}").read_bytes() for suffix in ("bin", "idx")))
    assert len(written) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_units_of_a_library_that_turns_out_to_differ_are_thrown_away(sources, tmp_path, monkeypatch, capsys, workers):
    """Workers have begun when the library is checked."""
    kind = type(build_tokenizer(sources["gpt2"]))
    own = kind.engines

    def spoilt(self):
        encode = own(self)["tiktoken"]()
        return {"gigatoken": lambda: lambda texts: [row[:-1] for row in encode(texts)], "tiktoken": lambda: encode}

    monkeypatch.setattr(kind, "engines", spoilt)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ENGLISH[:60]))
    paths = (str(tmp_path / "a.jsonl"),)
    job = CorpusJob(paths, f"{tmp_path}/out", sources["gpt2"], workers=workers, unit_bytes=512, block_bytes=512)
    with pytest.raises(TokenizerError, match=r"--tokenizer-engine gigatoken cannot run this GPT2BPETokenizer: its ids"):
        tokenize_corpus(dataclasses.replace(job, tokenizer_engine="gigatoken"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    tokenize_corpus(job)
    assert "gigatoken does not encode the text: its ids differ from those of tokenizers" in capsys.readouterr().err
    reader, tokenizer = IndexedReader(job.prefix("text")), build_tokenizer(sources["gpt2"])
    expected = [id for text in ENGLISH[:60] for id in tokenizer.encode(text)]
    assert reader.tokens(0, reader.num_tokens).tolist() == expected
    assert reader.num_documents == 60


def test_text_that_spells_special_ids_is_encoded_by_the_tokenizer_in_copies(sources, tmp_path):
    """There the library that climbed in the parent is used again, after the copy was made."""
    source = dataclasses.replace(sources["bpe"], special_tokens=("ing", "the"))
    texts = ["the thing is being", *ENGLISH[:10]] * 3
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    job = CorpusJob(
        (str(tmp_path / "a.jsonl"),), f"{tmp_path}/out", source, workers=2, unit_bytes=4096, block_bytes=4096
    )
    tokenize_corpus(job)
    tokenizer = build_tokenizer(source)
    reader = IndexedReader(job.prefix("text"))
    found = reader.tokens(0, reader.num_tokens).tolist()
    assert found == [id for text in texts for id in tokenizer.encode(text)]
    assert tokenizer.token_to_id("ing") not in found and tokenizer.token_to_id("ing") < 700


@pytest.mark.parametrize("resident", [None, 0])
def test_made_anew_when_its_cache_has_grown(sources, monkeypatch, resident):
    """By the memory that took, or by the text where no system tells."""
    monkeypatch.setattr(tokenizer_engines, "_CACHE_BYTES", -1)
    monkeypatch.setattr(tokenizer_engines, "_CACHED_CHARACTERS", 1000)
    if resident is not None:
        monkeypatch.setattr(tokenizer_engines, "_resident_bytes", lambda: resident)
        monkeypatch.setattr(tokenizer_engines, "_CACHE_BYTES", 1 << 40)
    tokenizer = build_tokenizer(sources["bpe"])
    stand_on(tokenizer, "gigatoken")
    engine = tokenizer._encode_block
    first = engine._encode
    for text in ENGLISH[:5]:
        assert tokenizer.encode_block([text])[0].tolist() == tokenizer.encode(text)
    assert engine._encode is not first
    stand_on(tokenizer, "tokenizers")
    assert tokenizer._encode_block is None


def description(sources) -> dict:
    return json.loads(Path(sources["bpe"].tokenizer_model, "tokenizer.json").read_bytes())


def change(path: str, value):
    """What sets a part of a description."""

    def apply(content: dict) -> None:
        *outer, last = path.split(".")
        for name in outer:
            content = content[name]
        content[last] = value

    return apply


def swap_merges(content: dict) -> None:
    merges = content["model"]["merges"]
    merges[10], merges[20] = merges[20], merges[10]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (change("model.type", "WordLevel"), "its model is WordLevel"),
        (change("model.dropout", 0.1), "its dropout is 0.1"),
        (change("model.continuing_subword_prefix", "##"), "its continuing_subword_prefix is '##'"),
        (change("model.byte_fallback", True), "its byte_fallback is True"),
        (change("normalizer", {"type": "Lowercase"}), "its normalizer is Lowercase"),
        (change("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}]}), "normalizer is Sequence of NFC"),
        (change("pre_tokenizer", None), "its pre_tokenizer is none"),
        (change("pre_tokenizer", {"type": "Whitespace"}), "its pre_tokenizer is Whitespace"),
        (change("pre_tokenizer.add_prefix_space", True), "its pre_tokenizer is ByteLevel"),
        (lambda content: content["model"]["vocab"].pop("!"), "no token for some of the 256 bytes"),
        (lambda content: content["model"]["vocab"].update(unheard=900), "1 of its tokens come of no merge, as 'unhe"),
        (swap_merges, "its merges are not in the order of its ids"),
        (lambda content: content["added_tokens"][0].update(special=False, lstrip=True), "added token '<unk>' has lst"),
    ],
)
def test_what_is_no_plain_byte_level_bpe(sources, spoil, reason):
    def found(content):
        try:
            require_byte_level(content)
        except Unfit as unfit:
            return str(unfit)
        return disorder_of_merges(content)

    content = description(sources)
    assert found(content) is None
    spoil(content)
    assert reason in found(content)


def test_merges_in_another_order_are_left_to_their_own_library(sources, capsys):
    content = description(sources)
    swap_merges(content)
    assert climb(HuggingFaceTokenizer(content, {}, "test"), "auto", ENGLISH[:2]) == "tokenizers"
    told = capsys.readouterr().err
    for name in ("gigatoken", "tiktoken"):
        assert told.count(f"{name} does not encode the text: its merges are not in the order of its ids") == 1
    with pytest.raises(TokenizerError, match=r"--tokenizer-engine gigatoken cannot run this .* in the order"):
        climb(HuggingFaceTokenizer(content, {}, "test"), "gigatoken", ENGLISH[:2])


@pytest.mark.parametrize("spoil", [change("model.byte_fallback", True), lambda c: c["model"]["vocab"].pop("!")])
def test_a_copy_that_prepares_the_check_of_what_no_other_library_runs_is_ended(sources, spoil, capfd):
    content = description(sources)
    spoil(content)
    ladder = Ladder(HuggingFaceTokenizer(content, {}, "test"), "auto")
    ladder.prepare(ENGLISH[:2])
    assert ladder.stand() == "tokenizers" and ladder.check(ENGLISH[:2])
    assert not multiprocessing.active_children()
    assert "Traceback" not in capfd.readouterr().err


def test_a_prepared_check_is_the_same_as_another(sources, monkeypatch):
    ladder = Ladder(HuggingFaceTokenizer(description(sources), {}, "test"), "auto")
    ladder.prepare(ENGLISH[:2])
    assert ladder.stand() == "gigatoken" and ladder.check(ENGLISH[:2])
    assert not multiprocessing.active_children()


def test_tiktoken_takes_no_tokens_in_text_and_no_second_merge(sources):
    content = description(sources)
    tiktoken_of_description(content)
    in_text = copy.deepcopy(content)
    in_text["added_tokens"][0]["special"] = False
    with pytest.raises(Unfit, match="looks for words"):
        tiktoken_of_description(in_text)
    content["model"]["merges"].append(content["model"]["merges"][-1])
    with pytest.raises(Unfit, match="several merges make one token"):
        tiktoken_of_description(content)


def test_words_that_are_looked_for_in_text(sources):
    """Added tokens that are not special, as <tool_call> of some models, also by gigatoken."""
    content = description(sources)
    size = len(content["model"]["vocab"])
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    content["added_tokens"].append({"id": size, "content": "<tool>"} | plain)
    tokenizer = HuggingFaceTokenizer(content, {}, "test")
    assert climb(tokenizer, "auto", []) == "gigatoken"
    text = "x <tool> y<tool><tool>z <|endoftext|> <unk>"
    found = tokenizer.encode_block([text])[0].tolist()
    assert found == tokenizer.encode(text) and found.count(size) == 3


def test_patterns_of_a_split(sources, capsys):
    content = description(sources)
    pattern = {"Regex": tokenizer_engines.GPT2_PATTERN}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    assert climb(HuggingFaceTokenizer(content, {}, "test"), "auto", ENGLISH[:2]) == "gigatoken"
    split["pattern"] = {"Regex": r"\w+|\W"}
    assert climb(HuggingFaceTokenizer(content, {}, "test"), "auto", ENGLISH[:2]) == "tiktoken"
    assert "gigatoken does not encode the text: gigatoken says:" in capsys.readouterr().err
    split["behavior"] = "Removed"
    with pytest.raises(Unfit, match="its pre_tokenizer is Sequence of Split, ByteLevel"):
        require_byte_level(content)
