"""tools/dataset.py as a user runs it: what it prints, its exit codes, its mistakes in sentences."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_tokenizers import GPT2
from tiny_run import TOOLS, load_tool, write_token_set

from megatron_lite.config.data import DataConfig
from megatron_lite.data.corpus_job import CorpusJob
from megatron_lite.data.indexed import IndexedReader, IndexedWriter
from megatron_lite.data.provenance import manifest_path
from megatron_lite.data.token_documents import in_chunks
from megatron_lite.data.tokenize_corpus import tokenize_corpus

TEXTS = ["Hello world", "", "naïve 日本 <|endoftext|>", "and " * 300]
main = load_tool("dataset").main


def make(folder: Path, name: str = "a", tokenizer: DataConfig = GPT2, **changes) -> str:
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(TEXTS)))
    job = CorpusJob((str(source),), str(folder / name), tokenizer, append_eod=True)
    return next(iter(tokenize_corpus(dataclasses.replace(job, **changes))))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> str:
    return make(tmp_path_factory.mktemp("made"), score_key="n", shuffle_seed=1)


def run(capsys, *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    out, error = capsys.readouterr()
    return code, out, error


def test_info(capsys, made):
    code, out, _ = run(capsys, "info", f"{made}.idx")
    assert code == 0
    reader = IndexedReader(made)
    for said in (
        f"{made}: 4 documents in 3 sequences, {reader.num_tokens} tokens of uint16",
        "tokens of a document: mean ",
        "0% 0, ",
        "1 are empty",
        "tokenizer: GPT2BPETokenizer of 50,257 ids",
        "a.jsonl: ",
        "shuffle seed: 1",
        "score key: n",
    ):
        assert said in out, said
    code, out, _ = run(capsys, "info", "--prefix", made, made, "--json")
    (found,) = map(json.loads, out.splitlines())
    assert found["manifest"]["tokenizer"]["vocab_file"] == GPT2.vocab_file and found["tokens"] == reader.num_tokens


def test_head_by_the_tokenizer_of_the_manifest(capsys, tmp_path):
    made = make(tmp_path)
    code, out, _ = run(capsys, "head", made, "--documents", 3)
    assert code == 0
    assert out == (
        "--- document 0: 3 tokens\nHello world<|endoftext|>\n--- document 1: 0 tokens\n\n"
        f"--- document 2: {document_length(made, 2)} tokens\nnaïve 日本 <|endoftext|><|endoftext|>\n"
    )
    code, out, _ = run(capsys, "head", made, "--characters", 10)
    assert out.endswith(" tokens\nand and an\n")
    code, _, error = run(capsys, "head", made, "--tokenizer-type", "ByteTokenizer")
    assert code == 2 and "was made with another tokenizer" in error
    manifest_path(made).unlink()
    code, _, error = run(capsys, "head", made)
    assert code == 2 and "no manifest to name its tokenizer; give --tokenizer-type" in error
    files = ("--vocab-file", GPT2.vocab_file, "--merge-file", GPT2.merge_file)
    assert "Hello world" in run(capsys, "head", made, "--tokenizer-type", "GPT2BPETokenizer", *files)[1]


def document_length(prefix: str, document: int) -> int:
    reader = IndexedReader(prefix)
    return reader.document_token(document + 1) - reader.document_token(document)


def test_verify_says_which_sets_are_damaged(capsys, tmp_path):
    sound, damaged = (make(tmp_path, name, DataConfig(tokenizer_type="ByteTokenizer")) for name in "ab")
    assert run(capsys, "verify", sound, damaged)[:2] == (0, f"{sound}: sound\n{damaged}: sound\n")
    data = bytearray(Path(f"{damaged}.bin").read_bytes())
    data[2] ^= 1
    Path(f"{damaged}.bin").write_bytes(data)
    code, out, _ = run(capsys, "verify", f"{sound}.bin", f"{sound}.idx", damaged)
    assert code == 1
    assert out.startswith(f"{sound}: sound\n{damaged}: damaged\n  {damaged}.bin: its SHA-256 is not the manifest's")
    assert run(capsys, "verify", tmp_path / "none")[0] == 1


def test_merge_and_divide(capsys, tmp_path):
    a, b = (str(write_token_set(tmp_path / name)) for name in "ab")
    code, out, _ = run(capsys, "merge", a, b, "--output", tmp_path / "all")
    tokens = IndexedReader(a).num_tokens
    assert (code, out) == (0, f"{tmp_path}/all: 24 documents, {2 * tokens:,} tokens of 2 sets\n")
    code, out, _ = run(capsys, "divide", tmp_path / "all", "--by", "length", "--buckets", 2)
    assert code == 0 and out.startswith(f"{tmp_path}/all_bucket0: ")
    assert sum(IndexedReader(tmp_path / f"all_bucket{i}").num_documents for i in range(2)) == 24


def test_outputs_and_context_may_be_named_by_a_file_as_sets_are(capsys, tmp_path):
    a, b = (str(write_token_set(tmp_path / name)) for name in "ab")
    words = ("join", a, b, "--context", f"{a}.idx", "--output", tmp_path / "both.bin")
    code, out, error = run(capsys, *words)
    assert (code, error) == (0, "") and out.startswith(f"{tmp_path}/both: ")
    assert run(capsys, "merge", f"{a}.idx", b, "--output", f"{tmp_path}/all.idx")[0] == 0
    assert run(capsys, "info", f"{tmp_path}/all.bin")[0] == run(capsys, "verify", f"{tmp_path}/both.bin")[0] == 0
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(("bin.bin", "idx.idx", "idx.bin"))]
    code, _, error = run(capsys, "merge", a, f"{a}.bin", "--output", tmp_path / "twice")
    assert code == 2 and f"{a} is named more than once" in error


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def parts(tmp_path, monkeypatch) -> dict[str, list[str]]:
    """The arguments of each command that writes sets, in several batches, over sets that are there already."""
    q, a = (make(tmp_path, name, DataConfig(tokenizer_type="ByteTokenizer")) for name in "qa")
    whole, both = f"{tmp_path}/whole", f"{tmp_path}/both"
    commands = {
        "join": ["join", q, a, "--context", q, "--output", whole],
        "merge": ["merge", whole, whole + "2", "--output", both],
        "divide": ["divide", q, "--by", "compression", "--buckets", "2"],
    }
    assert [main(commands["join"]), main([*commands["join"][:-1], whole + "2"])] == [0, 0]
    assert [main(commands[name]) for name in ("merge", "divide")] == [0, 0]
    for room in ("token_sets", "token_set_join"):
        monkeypatch.setattr(f"megatron_lite.data.{room}.in_chunks", functools.partial(in_chunks, size=8))
    return commands


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["join", "merge", "divide"])
def test_an_interrupt_leaves_all_as_it_was(capsys, tmp_path, monkeypatch, parts, command, number):
    before, add_many = contents(tmp_path), IndexedWriter.add_many

    def add_and_be_interrupted(writer, *arguments):
        add_many(writer, *arguments)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(IndexedWriter, "add_many", add_and_be_interrupted)
    assert main(parts[command]) == 130
    assert "stopped; no set was written" in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["join", "merge", "divide"])
def test_an_interrupt_while_sets_get_their_names_comes_too_late(tmp_path, monkeypatch, parts, command, number):
    before, replace = contents(tmp_path), os.replace

    def be_interrupted_and_replace(*arguments):
        os.kill(os.getpid(), number)
        replace(*arguments)

    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(os, "replace", be_interrupted_and_replace)
    assert main(parts[command]) == 0
    assert contents(tmp_path) == before
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("inspect", "a"), "inspect is no command; there are info, head, verify, merge, join, divide"),
        (("info",), "--prefix is needed"),
        (("info", "missing"), "missing.idx does not exist"),
        (("merge", "a", "b"), "--output is needed"),
        (("join", "a", "b", "--output", "c", "--context", "d"), "d is context and none of the sets to join, a, b"),
        (("merge", "a", "b", "a", "--output", "c"), "a is named more than once, and a set is taken once"),
        (("head", "a", "--characters", "-5"), "--characters -5 is below 0"),
        (("head", "a", "--documents", "-1"), "--documents -1 is below 0"),
        (("divide", "a", "b", "--by", "length"), "divide works on one set, and 2 are given"),
        (("divide", "a", "--by", "size"), "--by is 'size', but should be one of length, compression, score"),
        (("divide", "a", "--by", "length", "--buckets", "1"), "--buckets 1 is not possible; give 2 to 100"),
        (("divide", "a", "--by", "length", "--scores", "x"), "--scores is for --by score, and --by length was given"),
    ],
)
def test_mistakes(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, error = run(capsys, *words)
    assert code == 2 and message in error


def test_it_starts_without_torch():
    code = (
        f"import runpy, sys; sys.argv = ['dataset.py', 'info', '--help']\n"
        f"try: runpy.run_path({str(TOOLS / 'dataset.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(TOOLS.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert b"--json" in done.stdout
