"""Tokenizers of every kind: same ids as their libraries, special tokens stay text, batches, windows, streams."""

from __future__ import annotations

import base64
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import regex
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from small_tokenizers import (
    ENGLISH,
    GPT2,
    GPT2_FILES,
    HARD,
    KINDS,
    LOSSLESS,
    tiktoken_ranks,
    train_library,
    write_ranks,
)
from tokenizers import models, pre_tokenizers, trainers

from megatron_lite.config.data import DataConfig
from megatron_lite.data.tokenizer import build_tokenizer
from megatron_lite.data.tokenizer_interface import sliding_windows
from megatron_lite.data.tokenizer_tiktoken import PATTERNS, SPECIALS
from megatron_lite.errors import TokenizerError

LITERALS = ["<|endoftext|>", "<s>", "</s>", "<pad>", "<|pad|>", "[PAD]", "<user>", "<|im_start|>"]


# Same ids as the libraries


def test_gpt2_equals_tiktoken(built, tmp_path):
    oracle = tiktoken.Encoding(
        "gpt2", pat_str=PATTERNS["r50k"], mergeable_ranks=tiktoken_ranks(50256), special_tokens={}
    )
    write_ranks(tmp_path / "gpt2.tiktoken", tiktoken_ranks(50256))
    ranked = build_tokenizer(
        DataConfig(tokenizer_type="TiktokenTokenizer", tokenizer_model=str(tmp_path / "gpt2.tiktoken"))
    )
    for text in ENGLISH[:20] + HARD + LITERALS:
        expected = oracle.encode_ordinary(text)
        assert built["gpt2"].encode(text) == expected
        assert ranked.encode(text) == expected
    for tokenizer in (built["gpt2"], ranked):
        assert (tokenizer.eod, tokenizer.eos, tokenizer.vocab_size) == (50256, 50256, 50257)
    assert built["gpt2"].encode("Hello world") == [15496, 995]
    assert built["gpt2"].token_to_id("Ġworld") == ranked.token_to_id("Ġworld") == 995


def test_sentencepiece_equals_library(built, sources):
    for name in ("sentencepiece", "sentencepiece-bpe"):
        oracle = sentencepiece.SentencePieceProcessor(model_file=sources[name].tokenizer_model)
        for text in ENGLISH[:20] + HARD:
            ids = built[name].encode(text)
            assert ids == oracle.encode(text)
            assert built[name].decode(ids) == oracle.decode(ids)


def test_huggingface_equals_transformers(built, sources):
    from transformers import PreTrainedTokenizerFast

    oracle = PreTrainedTokenizerFast(tokenizer_file=f"{sources['bpe'].tokenizer_model}/tokenizer.json")
    for text in ENGLISH[:5] + HARD:
        assert built["bpe"].encode(text) == oracle.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_patterns_and_specials_are_those_of_tiktoken(name, monkeypatch):
    """tiktoken's own definitions, its download replaced by an empty table."""
    from tiktoken_ext import openai_public

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    oracle = getattr(openai_public, f"{name}_base")()
    assert oracle["special_tokens"] == SPECIALS[name]
    for text in ENGLISH[:10] + HARD + ["I'll pay 12345!!\n\nHelloWorld /x", "ſ'S'LL 'S ǅ ́a"]:
        assert regex.findall(PATTERNS[name], text) == regex.findall(oracle["pat_str"], text)


def test_tekken_offsets_ids_by_its_special_tokens(tmp_path):
    ranks = tiktoken_ranks(300)
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    ]
    settings = {"pattern": PATTERNS["r50k"], "default_vocab_size": 290 + 20, "default_num_special_tokens": 20}
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps({"config": settings, "vocab": entries}))
    tokenizer = build_tokenizer(DataConfig(tokenizer_type="TiktokenTokenizer", tokenizer_model=str(path)))
    small = {token: rank for token, rank in ranks.items() if rank < 290}
    oracle = tiktoken.Encoding("small", pat_str=PATTERNS["r50k"], mergeable_ranks=small, special_tokens={})
    assert tokenizer.encode(ENGLISH[0]) == [id + 20 for id in oracle.encode_ordinary(ENGLISH[0])]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unk) == (1, 2, 11, 0)
    assert tokenizer.vocab_size == 310
    assert tokenizer.decode(tokenizer.encode("é<s>")) == "é<s>"


# Text and back


@pytest.mark.parametrize("name", LOSSLESS)
@given(text=st.text())
@example(text=HARD[5])
def test_byte_level_round_trip(built, name, text):
    assert built[name].decode(built[name].encode(text)) == text


def test_all_ways_to_encode_agree(tokenizer):
    texts = HARD + LITERALS + ENGLISH[:5]
    each = [tokenizer.encode(text) for text in texts]
    flat, lengths = tokenizer.encode_block(texts)
    assert flat.dtype == np.int32 and flat.tolist() == [id for ids in each for id in ids]
    assert lengths.tolist() == [len(ids) for ids in each]
    assert [ids.tolist() for ids in tokenizer.encode_ordinary_batch(texts)] == each
    assert tokenizer.encode_batch(texts).ids == each
    assert max(flat) < tokenizer.vocab_size
    assert tokenizer.encode_block([])[0].size == 0 and tokenizer.encode_ordinary_batch([]) == []


def test_spelled_out_special_token_stays_text(sources, built):
    for name in KINDS:
        tokenizer = build_tokenizer(dataclasses.replace(sources[name], special_tokens=("<user>", "<|im_start|>")))
        special = set(tokenizer.special_tokens.values()) - {tokenizer.unk}
        assert {tokenizer.token_to_id("<user>"), tokenizer.eod} - {None} <= special
        for literal in LITERALS:
            for text in (literal, f"the {literal}{literal} end", f"x{literal[:3]}{literal}"):
                ids = tokenizer.encode(text)
                assert ids and special.isdisjoint(ids), (name, text)
                if name in LOSSLESS:
                    assert tokenizer.decode(ids) == text
                if literal not in tokenizer.special_tokens:
                    assert ids == built[name].encode(text)


def test_a_special_token_of_one_letter_ends_a_text(tmp_path):
    """It can be spelled by nothing else, which is said: no cut behind it makes the text shorter."""
    library = tokenizers.Tokenizer(models.WordLevel({"a": 0, "n": 1, "<unk>": 2}, unk_token="<unk>"))
    library.add_special_tokens(["n"])
    library.save(str(tmp_path / "letters.json"))
    tokenizer = build_tokenizer(
        DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "letters.json"))
    )
    tokenizer._library.encode_special_tokens = False  # as a library that takes every literal for the token
    with pytest.raises(TokenizerError, match="can spell 'n' only by a special token"):
        tokenizer.encode("an")


def test_special_token_made_by_normalisation_stays_text(tmp_path):
    """Full-width characters become "</s>" only inside the library, where no literal can be cut."""
    library = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    library.normalizer = tokenizers.normalizers.NFKC()
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "words.json"))
    tokenizer = build_tokenizer(
        DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "words.json"))
    )
    full_width = "</s>".translate({ord(c): ord(c) + 0xFEE0 for c in "</s>"})
    ids = tokenizer.encode(f"a {full_width} a")
    assert 1 not in ids and ids[0] == ids[-1] == 2


def test_lone_surrogate_is_named(tokenizer):
    with pytest.raises(TokenizerError, match=r"lone surrogate, U\+D800, at character 2"):
        tokenizer.encode("ab\ud800")


# Special tokens and roles


def test_added_special_tokens_follow_the_vocabulary(sources):
    for name in KINDS:
        tokenizer = build_tokenizer(sources[name])
        size, fingerprint = tokenizer.vocab_size, tokenizer.fingerprint
        assert tokenizer.add_special_tokens(["<extra>", "<extra>", "<more>"]) == 2
        assert tokenizer.token_to_id("<more>") == size + 1 == tokenizer.vocab_size - 1
        assert tokenizer.id_to_token(size) == "<extra>"
        assert tokenizer.fingerprint != fingerprint
        ids = [*tokenizer.encode("one"), size, *tokenizer.encode("two")]
        assert "<extra>" not in tokenizer.decode(ids)
        assert tokenizer.decode(ids, skip_special=False) == "one<extra>two"


def test_ids_of_before_an_addition_are_understood_and_no_others(sources):
    tokenizer = build_tokenizer(sources["gpt2"])
    of_files = tokenizer.fingerprint
    tokenizer.add_special_tokens(["<one>"])
    of_one = tokenizer.fingerprint
    tokenizer.add_special_tokens(["<two>"])
    assert all(map(tokenizer.understands, (of_files, of_one, tokenizer.fingerprint)))
    assert not build_tokenizer(sources["gpt2"]).understands(of_one)


def test_added_token_takes_its_role(sources):
    tokenizer = build_tokenizer(dataclasses.replace(sources["bpe"], special_tokens=("<pad>",)))
    assert tokenizer.pad == tokenizer.vocab_size - 1
    assert build_tokenizer(sources["bpe"]).pad is None


def test_roles(built):
    sp = built["sentencepiece"]
    assert (sp.unk, sp.bos, sp.eos, sp.pad, sp.eod) == (0, 1, 2, 3, 2)
    bpe = built["bpe"]
    assert (bpe.unk, bpe.bos, bpe.eos, bpe.eod) == (0, 1, 2, 3)
    assert (built["byte"].eod, built["byte"].pad, built["byte"].vocab_size) == (256, 257, 258)


def test_roles_of_a_folder_come_from_its_settings(sources, tmp_path):
    content = Path(sources["bpe"].tokenizer_model, "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(content)
    settings = {"bos_token": "</s>", "eos_token": {"content": "<s>"}, "pad_token": "the", "unk_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = build_tokenizer(DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path)))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (2, 1, tokenizer.token_to_id("the"))
    assert tokenizer.pad not in tokenizer.encode("the")


def test_unused_ids_decode_to_nothing(tmp_path):
    """cl100k leaves ids unused between its special tokens; a model may still sample them."""
    ranks = tiktoken_ranks(256) | {b"%07d" % rank: rank for rank in range(256, 100256)}
    write_ranks(tmp_path / "large.tiktoken", ranks)
    tokenizer = build_tokenizer(
        DataConfig(tokenizer_type="TiktokenTokenizer", tokenizer_model=str(tmp_path / "large.tiktoken"))
    )
    assert (tokenizer.eod, tokenizer.vocab_size) == (100257, 100277)
    assert tokenizer.id_to_token(100256) is None
    assert tokenizer.decode([100256, *tokenizer.encode("ok"), 100270]) == "ok"


def test_id_beyond_the_vocabulary_is_named(tokenizer):
    for id in (-1, tokenizer.vocab_size):
        with pytest.raises(TokenizerError, match=f"token id {id} is outside .* 0 to {tokenizer.vocab_size - 1}"):
            tokenizer.decode([id])


# Fingerprint


def test_fingerprint_is_of_the_content(built, sources, tmp_path):
    assert len({tokenizer.fingerprint for tokenizer in built.values()}) == len(built)
    vocab = json.loads((GPT2_FILES / "encoder.json").read_bytes())
    (tmp_path / "vocab.json").write_text(json.dumps(dict(reversed(vocab.items())), indent=1))
    merges = (GPT2_FILES / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    (tmp_path / "merges.txt").write_text("\n".join(merges))
    reordered = dataclasses.replace(
        GPT2, vocab_file=str(tmp_path / "vocab.json"), merge_file=str(tmp_path / "merges.txt")
    )
    assert build_tokenizer(reordered).fingerprint == built["gpt2"].fingerprint
    merges[100], merges[101] = merges[101], merges[100]
    (tmp_path / "merges.txt").write_text("\n".join(merges))
    assert build_tokenizer(reordered).fingerprint != built["gpt2"].fingerprint


def test_fingerprint_does_not_depend_on_how_the_file_was_saved(built, sources, tmp_path):
    source = f"{sources['bpe'].tokenizer_model}/tokenizer.json"
    description = json.loads(Path(source).read_bytes())
    description["model"]["merges"] = [" ".join(pair) for pair in description["model"]["merges"]]
    description["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    del description["model"]["ignore_merges"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    other = build_tokenizer(DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path)))
    assert other.fingerprint == built["bpe"].fingerprint
    assert other.encode(ENGLISH[0]) == built["bpe"].encode(ENGLISH[0])


# Batches and windows


def test_padding_and_mask(built):
    tokenizer = built["byte"]
    batch = tokenizer.encode_batch(["abc", "", "a"], padding="longest")
    assert batch.ids == [[97, 98, 99], [257] * 3, [97, 257, 257]]
    assert batch.attention_mask == [[1, 1, 1], [0, 0, 0], [1, 0, 0]]
    left = tokenizer.encode_batch(["ab"], max_length=4, padding="max_length", padding_side="left")
    assert (left.ids, left.attention_mask) == ([[257, 257, 97, 98]], [[0, 0, 1, 1]])


def test_truncation(built):
    tokenizer = built["byte"]
    assert tokenizer.encode_batch(["abcdef", "ab"], max_length=3, truncation=True).ids == [[97, 98, 99], [97, 98]]
    with pytest.raises(TokenizerError, match="text 1 has 6 tokens, more than max_length=3"):
        tokenizer.encode_batch(["ab", "abcdef"], max_length=3)
    with pytest.raises(TokenizerError, match="max_length, which was not given"):
        tokenizer.encode_batch(["ab"], truncation=True)


def test_padding_without_a_pad_token_takes_eod(built):
    batch = built["gpt2"].encode_batch(["Hello world", "Hello"], padding="longest")
    assert batch.ids == [[15496, 995], [15496, 50256]]
    assert batch.attention_mask == [[1, 1], [1, 0]]


@given(count=st.integers(0, 60), max_length=st.integers(1, 20), data=st.data())
def test_windows_cover_every_token_once_as_fresh(count, max_length, data):
    stride = data.draw(st.integers(1, max_length))
    ids = list(range(count))
    windows = sliding_windows(ids, max_length, stride)
    assert [id for window in windows for id in window.ids[len(window.ids) - window.fresh :]] == ids
    for index, window in enumerate(windows):
        assert window.start == index * stride and window.fresh > 0
        assert window.ids == ids[window.start : window.start + max_length]


def test_windows_of_a_text(built):
    windows = built["byte"].encode_windows("abcdefg", max_length=4, stride=2)
    assert [bytes(window.ids) for window in windows] == [b"abcd", b"cdef", b"efg"]
    assert [window.fresh for window in windows] == [4, 2, 1]
    for stride in (0, 5):
        with pytest.raises(TokenizerError, match="choose 1 to 4"):
            built["byte"].encode_windows("abc", max_length=4, stride=stride)


# Errors and imports


def test_errors_name_file_and_way_out(tmp_path):
    def refused(match: str, **fields) -> None:
        with pytest.raises(TokenizerError, match=match):
            build_tokenizer(DataConfig(**fields))

    refused("choose one of GPT2BPETokenizer", tokenizer_type=None)
    refused("needs --merge-file FILE", tokenizer_type="GPT2BPETokenizer", vocab_file=GPT2.vocab_file)
    refused("no such file", tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tmp_path / "none"))
    refused("no such file", tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tmp_path))
    refused("tokenizer.json does not exist", tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path))
    swapped = {"vocab_file": GPT2.merge_file, "merge_file": GPT2.vocab_file}
    refused("vocab.bpe is not a JSON file", tokenizer_type="GPT2BPETokenizer", **swapped)
    junk = tmp_path / "junk"
    junk.write_text("12 34 56\n")
    refused("junk, line 1: .* not a merge", **{**dataclasses.asdict(GPT2), "merge_file": str(junk)})
    for kind, match in {
        "SentencePieceTokenizer": "is not a SentencePiece model",
        "HuggingFaceTokenizer": "is not a JSON file",
        "TiktokenTokenizer": "junk, line 1: .* not a base64 token",
    }.items():
        refused(match, tokenizer_type=kind, tokenizer_model=str(junk))
    junk.write_text('{"model": {"type": "Nonsense"}}')
    refused("not a tokenizer that", tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(junk))
    refused("not a tekken.json", tokenizer_type="TiktokenTokenizer", tokenizer_model=str(junk))
    junk.write_text("[1]")
    refused("has no section", tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(junk))
    refused("too short", tokenizer_type="ByteTokenizer", special_tokens=("x",))
    train_library(
        tmp_path / "deep" / "tokenizer.json", models.BPE(), trainers.BpeTrainer(show_progress=False), None, None
    )
    (tmp_path / "deep" / "tokenizer_config.json").write_text("[1]")
    refused(
        "tokenizer_config.json is no JSON obj",
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=f"{tmp_path}/deep",
    )


def test_rank_files_are_checked(tmp_path):
    def refused(match: str, ranks, pattern="r50k") -> None:
        write_ranks(tmp_path / "t", ranks)
        with pytest.raises(TokenizerError, match=match):
            build_tokenizer(
                DataConfig(
                    tokenizer_type="TiktokenTokenizer", tokenizer_model=str(tmp_path / "t"), tiktoken_pattern=pattern
                )
            )

    ranks = tiktoken_ranks(300)
    refused("300 ranks, which is none of the known files", ranks, pattern=None)
    refused(r"neither one of r50k, cl100k, o200k nor a regular expression", ranks, pattern="(")
    refused("no token for 1 of the 256 bytes, the first 0x41", {t: r for t, r in ranks.items() if t != b"A"})
    refused("1 ranks to two tokens", ranks | {b"twice": 299})


def test_missing_package_is_said(monkeypatch, sources):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.delitem(sys.modules, "megatron_lite.data.tokenizer_sentencepiece", raising=False)
    with pytest.raises(TokenizerError, match="pip install sentencepiece"):
        build_tokenizer(sources["sentencepiece"])


def test_no_torch(sources):
    """Tokenizing needs neither torch nor transformers."""
    chosen = (sources[name] for name in ("bpe", "sentencepiece", "byte"))
    light = [(config.tokenizer_type, config.tokenizer_model) for config in chosen]
    code = (
        "import sys; from megatron_lite.config.data import DataConfig\n"
        "from megatron_lite.data.tokenizer import build_tokenizer\n"
        f"for kind, model in {light}:\n"
        "    build_tokenizer(DataConfig(tokenizer_type=kind, tokenizer_model=model)).encode('x')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
