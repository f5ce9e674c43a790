"""Text to token sets: bytes as Megatron's, one output whatever the workers, nothing left behind."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from megatron_lite.config.data import DataConfig
from megatron_lite.data.corpus_job import CorpusJob
from megatron_lite.data.indexed import IndexedReader
from megatron_lite.data.provenance import read_provenance
from megatron_lite.data.tokenize_corpus import tokenize_corpus
from megatron_lite.data.tokenize_units import UnitOutcome, UnitTokenizer
from megatron_lite.data.tokenizer import build_tokenizer
from megatron_lite.errors import DataError, TokenizerError

BYTES = DataConfig(tokenizer_type="ByteTokenizer")
TEXTS = ["first", "", "zwei é", "", "", "x" * 300, "last"]


def write_jsonl(path: Path, texts=TEXTS, **more) -> str:
    path.write_text("".join(json.dumps({"text": text} | more) + "\n" for text in texts))
    return str(path)


def golden(documents: list[list[int]]) -> tuple[bytes, bytes]:
    """The two files as Megatron's writer makes them: u16 ids, no sequence for an empty document."""
    ids = [id for document in documents for id in document]
    lengths = [len(document) for document in documents if document]
    bounds = [0]
    for document in documents:
        bounds.append(bounds[-1] + bool(document))
    pointers = [2 * sum(lengths[:i]) for i in range(len(lengths))]
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(lengths), len(bounds))
    index += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(pointers)}q", *pointers)
    return struct.pack(f"<{len(ids)}H", *ids), index + struct.pack(f"<{len(bounds)}q", *bounds)


def test_documents_begin_with_bos_where_asked_even_empty_ones(tmp_path):
    tokenizer = dataclasses.replace(BYTES, special_tokens=("<s>",))
    source = (write_jsonl(tmp_path / "a.jsonl"),)
    facts = tokenize_corpus(CorpusJob(source, str(tmp_path / "out"), tokenizer, prepend_bos=True, append_eod=True))
    bos = build_tokenizer(tokenizer).bos
    assert bos == build_tokenizer(tokenizer).token_to_id("<s>") > 256
    assert written(tmp_path / "out_text_document") == golden([[bos, *text.encode(), 256] for text in TEXTS])
    assert facts[str(tmp_path / "out_text_document")].prepend_bos
    assert read_provenance(
        tmp_path / "out_text_document", facts[str(tmp_path / "out_text_document")].tokens
    ).prepend_bos


def written(prefix) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def expected(texts=TEXTS, eod=True) -> tuple[bytes, bytes]:
    return golden([[*text.encode(), *([256] if eod and text else [])] for text in texts])


@pytest.mark.parametrize("eod", [True, False])
def test_bytes_are_those_of_megatron(tmp_path, eod):
    job = CorpusJob((write_jsonl(tmp_path / "a.jsonl"),), str(tmp_path / "out"), BYTES, append_eod=eod)
    facts = tokenize_corpus(job)
    assert list(facts) == [str(tmp_path / "out_text_document")]
    assert written(tmp_path / "out_text_document") == expected(eod=eod)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.jsonl",
        "out_text_document.bin",
        "out_text_document.idx",
        "out_text_document.manifest.json",
    ]


def test_output_does_not_depend_on_workers_or_blocks(tmp_path):
    texts = [f"{i} " * (i % 40) for i in range(500)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    for name, settings in {
        "one": {},
        "small": {"block_bytes": 100, "unit_bytes": 1},
        "many": {"workers": 3, "block_bytes": 997, "unit_bytes": 2000},
    }.items():
        tokenize_corpus(CorpusJob((source,), str(tmp_path / name), BYTES, append_eod=True, **settings))
        assert written(tmp_path / f"{name}_text_document") == expected(texts)


def test_every_key_is_a_set_and_bad_lines_leave_all(tmp_path):
    lines = [{"title": "a", "body": "b"}, {"title": "x"}, {"title": "", "body": "bb"}, {"title": "c", "body": 3}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    job = CorpusJob(
        (str(tmp_path / "a.jsonl"),), str(tmp_path / "out"), BYTES, json_keys=("title", "body"), on_error="skip"
    )
    facts = tokenize_corpus(job)
    assert written(tmp_path / "out_title_document") == expected(["a", ""], eod=False)
    assert written(tmp_path / "out_body_document") == expected(["b", "bb"], eod=False)
    assert facts[str(tmp_path / "out_body_document")].skipped == {"missing key": 1, "not a string": 1}


def test_facts(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["aab", "é"])
    ((prefix, facts),) = tokenize_corpus(CorpusJob((source,), str(tmp_path / "out"), BYTES, append_eod=True)).items()
    # a a b eod, 0xc3 0xa9 eod
    assert (facts.documents, facts.tokens, facts.text_bytes) == (2, 7, 5)
    counts = np.array([2, 1, 2, 1, 1]) / 7
    assert math.isclose(facts.unigram_entropy, -(counts * np.log(counts)).sum())
    assert read_provenance(prefix, tokens=7) == facts
    assert read_provenance(prefix, tokens=8) is None
    assert read_provenance(tmp_path / "other", tokens=7) is None
    (tmp_path / "out_text_document.manifest.json").write_text("{")
    assert read_provenance(prefix, tokens=7) is None
    assert IndexedReader(prefix).num_tokens == 7


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_line_stops_with_file_and_line_and_leaves_nothing(tmp_path, workers):
    texts = [f"document {i}" for i in range(400)]
    good = write_jsonl(tmp_path / "a.jsonl", texts)
    lines = Path(good).read_bytes().splitlines(keepends=True)
    lines[300], lines[390] = b'{"text": "cut\n', b"nothing\n"
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines))
    folder = tmp_path / "out"
    inputs = (good, str(tmp_path / "b.jsonl"))
    job = CorpusJob(inputs, f"{folder}/c", BYTES, workers=workers, block_bytes=512, unit_bytes=512)
    with pytest.raises(DataError, match=r"b\.jsonl, line 301: invalid JSON: .*--on-error skip"):
        tokenize_corpus(job)
    assert not list(folder.iterdir())
    facts = tokenize_corpus(dataclasses.replace(job, on_error="skip"))
    assert facts[f"{folder}/c_text_document"].skipped == {"invalid JSON": 2}
    assert written(f"{folder}/c_text_document") == expected(
        texts + texts[:300] + texts[301:390] + texts[391:], eod=False
    )


def test_an_earlier_set_survives_a_failed_run(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl")
    job = CorpusJob((source,), str(tmp_path / "out"), BYTES)
    tokenize_corpus(job)
    before = written(tmp_path / "out_text_document")
    Path(source).write_text('{"text": "new"}\nbad\n')
    with pytest.raises(DataError):
        tokenize_corpus(job)
    assert written(tmp_path / "out_text_document") == before
    assert (tmp_path / "out_text_document.manifest.json").exists()


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """A pipe is read as it is written: not more than the blocks in flight are taken ahead."""
    line = json.dumps({"text": "y" * 1000}).encode() + b"\n"
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    sent = 0

    def feed() -> None:
        nonlocal sent
        with open(fifo, "wb", buffering=0) as file:
            for _ in range(20_000):
                sent += file.write(line)

    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    lead = []
    done = 0
    original = UnitTokenizer.__call__

    def call(self, unit) -> UnitOutcome:
        nonlocal done
        outcome = original(self, unit)
        done += outcome.text_bytes
        lead.append(sent - done)
        return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnitTokenizer, "__call__", call)
        job = CorpusJob((str(fifo),), str(tmp_path / "out"), BYTES, block_bytes=1 << 16, unit_bytes=1 << 18)
        tokenize_corpus(job)
    feeder.join()
    assert sent == 20_000 * len(line)
    assert max(lead) < 2_000_000


def test_refusals_come_before_any_work(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl")
    job = CorpusJob((source,), str(tmp_path / "out"), BYTES)

    def refused(error, match: str, **changes) -> None:
        with pytest.raises(error, match=match):
            tokenize_corpus(dataclasses.replace(job, **changes))

    refused(TokenizerError, "--vocab-size 100 is less than the 258 ids", vocab_size=100)
    (tmp_path / "a.txt").write_text("plain")
    refused(DataError, "a.txt has no keys; give one", inputs=(str(tmp_path / "a.txt"),), json_keys=("a", "b"))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    refused(DataError, "there is no text for .*out_text_document", inputs=(str(tmp_path / "empty.jsonl"),))
    Path(source).write_text("bad")
    refused(DataError, r"no text .* skipped 1 bad documents: 1 invalid JSON \(.*a.jsonl:1\)", on_error="skip")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.txt", "empty.jsonl"]


def test_append_eod_needs_an_eod(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "t.json"))
    config = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "t.json"))
    source = write_jsonl(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(TokenizerError, match=r"has no token that ends a document; add one by --special-tokens"):
        tokenize_corpus(CorpusJob((source,), str(tmp_path / "out"), config, append_eod=True))
    with pytest.raises(TokenizerError, match=r"--prepend-bos: .* has no token that begins a text; add one by"):
        tokenize_corpus(CorpusJob((source,), str(tmp_path / "out"), config, prepend_bos=True))
    config = dataclasses.replace(config, special_tokens=("<|endoftext|>",))
    tokenize_corpus(CorpusJob((source,), str(tmp_path / "out"), config, append_eod=True))
    assert written(tmp_path / "out_text_document") == golden([[0, 1]])


def test_vocab_size_decides_the_width(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl")
    for size, width in {65499: 2, 65500: 4}.items():
        tokenize_corpus(CorpusJob((source,), str(tmp_path / "out"), BYTES, vocab_size=size))
        assert IndexedReader(tmp_path / "out_text_document").dtype.itemsize == width


def test_what_a_post_processor_would_add_is_told_and_left_out(tmp_path, capsys):
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1}, unk_token="a"))
    library.add_special_tokens(["<s>"])
    library.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    library.save(str(tmp_path / "tokenizer.json"))
    assert library.encode("a").ids == [0, 1]
    job = CorpusJob(
        (write_jsonl(tmp_path / "a.jsonl", ["a"]),),
        str(tmp_path / "out"),
        DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "tokenizer.json")),
    )
    tokenize_corpus(job)
    assert IndexedReader(tmp_path / "out_text_document").tokens(0, 1).tolist() == [1]
    assert "would put <s> around a text" in capsys.readouterr().err
    tokenize_corpus(dataclasses.replace(job, prepend_bos=True))
    assert IndexedReader(tmp_path / "out_text_document").tokens(0, 2).tolist() == [0, 1]
    assert "would put" not in capsys.readouterr().err
