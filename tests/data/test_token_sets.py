"""Sets that are there: checked, described, merged, divided by difficulty."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.config.data import DataConfig
from megatron_lite.data import indexed
from megatron_lite.data.corpus_job import CorpusJob
from megatron_lite.data.indexed import IndexedReader, IndexedWriter
from megatron_lite.data.loss_mask import mask_prefix, read_mask
from megatron_lite.data.provenance import manifest_path, read_manifest, scores_path, write_provenance
from megatron_lite.data.token_set_division import divide
from megatron_lite.data.token_set_join import join
from megatron_lite.data.token_set_merge import merge
from megatron_lite.data.token_sets import describe, document_lengths, faults
from megatron_lite.data.tokenize_corpus import tokenize_corpus
from megatron_lite.errors import DataError

BYTES = DataConfig(tokenizer_type="ByteTokenizer")


def make(folder: Path, name: str, texts: list[str], scores: list[float] | None = None, **changes) -> str:
    """A set of those texts, of bytes, with its manifest."""
    source = folder / f"{name}.jsonl"
    rows = [{"text": text} | ({"score": scores[i]} if scores else {}) for i, text in enumerate(texts)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    key = "score" if scores else None
    job = CorpusJob((str(source),), str(folder / name), BYTES, append_eod=True, score_key=key)
    return next(iter(tokenize_corpus(dataclasses.replace(job, **changes))))


def texts_of(prefix: str) -> list[str]:
    reader = IndexedReader(prefix)
    bounds = [reader.document_token(i) for i in range(reader.num_documents + 1)]
    found = [reader.tokens(a, b) for a, b in itertools.pairwise(bounds)]
    return [bytes(ids[ids < 256].astype(np.uint8)).decode() for ids in found]


def facts_of(prefix: str):
    return read_manifest(prefix, IndexedReader(prefix).num_tokens)


TEXTS = ["one", "", "a much longer text", "four", "", "xyz" * 30]


def test_a_sound_set_has_no_faults(tmp_path):
    prefix = make(tmp_path, "a", TEXTS, [1, 2, 3, 4, 5, 6])
    assert list(faults(prefix)) == []
    assert list(faults(prefix, vocab_size=200)) == [f"{prefix}.bin: token id 256 is outside the vocabulary of 200 ids"]


def flip(path: Path, at: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= mask
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("suffix", "damage", "said"),
    [
        ("bin", lambda path: flip(path, 0), r"its SHA-256 is not the manifest's"),
        ("bin", lambda path: flip(path, 1, 0x80), r"token id 32,879 is outside the vocabulary of 258 ids"),
        ("bin", lambda path: path.write_bytes(path.read_bytes()[:-2]), r"size is .* truncated"),
        ("idx", lambda path: flip(path, 3), r"this is no Megatron index"),
        ("scores.npy", lambda path: flip(path, -1), r"scores.npy: its SHA-256 is not the manifest's"),
        (
            "scores.npy",
            lambda path: path.write_bytes(path.read_bytes()[:-4]),
            r"scores.npy: it has .* the manifest speaks",
        ),
        ("scores.npy", Path.unlink, r"scores.npy: it cannot be read"),
        ("manifest.json", lambda path: path.write_text("{"), r"manifest.json cannot be used"),
        (
            "manifest.json",
            lambda path: path.write_text(path.read_text().replace('"tokens": ', '"tokens": 1')),
            "speaks of",
        ),
        (
            "manifest.json",
            lambda path: path.write_text(path.read_text().replace('"documents": 6', '"documents": 7')),
            "it has 6 documents, and the manifest speaks of 7",
        ),
        (
            "manifest.json",
            lambda path: path.write_text(path.read_text().replace('"bytes": ', '"size": ')),
            "does not say how many bytes",
        ),
    ],
)
def test_damage_is_found(tmp_path, suffix, damage, said):
    prefix = make(tmp_path, "a", TEXTS, [1, 2, 3, 4, 5, 6])
    damage(Path(f"{prefix}.{suffix}"))
    found = list(faults(prefix))
    assert found
    assert any(re.search(said, fault) for fault in found), found


def test_a_set_is_described(tmp_path):
    prefix = make(tmp_path, "a", TEXTS)
    found = describe(prefix)
    assert (found["documents"], found["sequences"], found["dtype"]) == (6, 4, "uint16")
    assert found["document_lengths"]["empty"] == 2
    assert found["document_lengths"]["quantiles"]["1"] == 91
    assert found["manifest"]["tokenizer_type"] == "ByteTokenizer"
    json.dumps(found)
    manifest_path(prefix).unlink()
    assert describe(prefix)["manifest"] is None


def test_lengths_of_documents_of_several_sequences(tmp_path):
    with IndexedWriter(tmp_path / "a", dtype="u2") as writer:
        writer.add_many(np.arange(10), [2, 3, 1, 4], [2, 0, 1, 0, 1, 0])
    assert document_lengths(IndexedReader(tmp_path / "a")).tolist() == [5, 0, 1, 0, 4, 0]


def test_merged_sets_have_merged_facts(tmp_path, capsys):
    a = make(tmp_path, "a", TEXTS, [1, 2, 3, 4, 5, 6])
    b = make(tmp_path, "b", ["more", "text"], [7, 8])
    both = make(tmp_path, "both", [*TEXTS, "more", "text"], [1, 2, 3, 4, 5, 6, 7, 8])
    output = str(tmp_path / "merged")
    merge([a, b], output)
    for suffix in ("bin", "idx", "scores.npy"):
        assert Path(f"{output}.{suffix}").read_bytes() == Path(f"{both}.{suffix}").read_bytes()
    facts, expected = facts_of(output), facts_of(both)
    for name in ("documents", "tokens", "text_bytes", "files", "append_eod", "tokenizer_fingerprint", "score_key"):
        assert getattr(facts, name) == getattr(expected, name), name
    assert facts.unigram_entropy == pytest.approx(expected.unigram_entropy, rel=1e-12)
    assert [part["prefix"] for part in facts.parts] == [a, b]
    assert [entry["name"] for entry in facts.inputs] == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert list(faults(output)) == []
    manifest_path(b).unlink()
    merge([b, a], output)
    assert not manifest_path(output).exists()
    assert texts_of(output) == ["more", "text", *TEXTS]
    assert f"{b} has no manifest" in capsys.readouterr().err


def test_sets_that_do_not_go_together_are_not_merged(tmp_path):
    a = make(tmp_path, "a", ["x"])
    wide = make(tmp_path, "wide", ["x"], vocab_size=70000)
    with pytest.raises(DataError, match=r"a_text_document has ids of uint16 and .*wide_text_document of int32"):
        merge([a, wide], str(tmp_path / "out"))
    other = make(tmp_path, "other", ["x"], tokenizer=dataclasses.replace(BYTES, special_tokens=("<s>",)))
    with pytest.raises(DataError, match=r"by a ByteTokenizer of 258 ids .* by a ByteTokenizer of 259 .*two texts"):
        merge([a, other], str(tmp_path / "out"))
    with pytest.raises(DataError, match="is one of the sets to merge"):
        merge([a, other], a)
    write_provenance(a, dataclasses.replace(facts_of(a), vocab_size=100))
    with pytest.raises(DataError, match="token id 256 is outside the vocabulary of 100 ids"):
        merge([a, a], str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_a_set_is_divided_by_length(tmp_path):
    texts = ["x" * length for length in (50, 3, 20, 3, 90, 10, 40, 1, 60, 30)]
    prefix = make(tmp_path, "a", texts)
    buckets = divide(prefix, "length", 3)
    assert [bucket.prefix for bucket in buckets] == [f"{prefix}_bucket{i}" for i in range(3)]
    found = [texts_of(bucket.prefix) for bucket in buckets]
    assert [list(map(len, of)) for of in found] == [[3, 20, 3, 10, 40, 1, 30], [50, 60], [90]]
    assert [bucket.tokens for bucket in buckets] == [114, 112, 91]
    assert (buckets[0].lowest, buckets[0].highest, buckets[1].lowest) == (2, 41, 51)
    facts = facts_of(buckets[1].prefix)
    assert facts.difficulty == {
        "by": "length", "descending": False, "of": prefix, "bucket": 1, "buckets": 3, "lowest": 51.0, "highest": 61.0
    }  # fmt: skip
    assert facts.text_bytes is None and facts.tokenizer_fingerprint == facts_of(prefix).tokenizer_fingerprint
    assert list(faults(buckets[1].prefix)) == []


def test_a_set_is_divided_by_compression_and_by_score(tmp_path):
    draw = np.random.default_rng(0)
    noise = ["".join(map(chr, draw.integers(33, 127, 80))) for _ in range(3)]
    texts = [noise[0], "ab" * 40, noise[1], "c" * 80, noise[2], "the " * 20]
    prefix = make(tmp_path, "a", texts, [3, 1, 2, 6, 4, 5])
    easy, hard = divide(prefix, "compression", 2)
    assert texts_of(easy.prefix) == [texts[1], texts[3], texts[5]] and texts_of(hard.prefix) == noise
    assert easy.highest < 0.3 < hard.lowest
    low, high = divide(prefix, "score", 2)
    assert texts_of(low.prefix) == [texts[0], texts[1], texts[2]]
    assert (low.lowest, low.highest, high.lowest, high.highest) == (1, 3, 4, 6)
    np.save(tmp_path / "own.npy", np.array([0, 1, 1, 0, 0, 1]))
    first, _ = divide(prefix, "score", 2, scores=str(tmp_path / "own.npy"), descending=True)
    assert texts_of(first.prefix) == [texts[1], texts[2], texts[5]]


def test_documents_of_several_sequences_stay_whole_when_divided(tmp_path):
    with IndexedWriter(tmp_path / "a", dtype="u2") as writer:
        writer.add_many(np.arange(10), [2, 3, 1, 4], [2, 1, 1])
    divide(str(tmp_path / "a"), "length", 2)
    easy, hard = (IndexedReader(tmp_path / f"a_bucket{i}") for i in range(2))
    assert (easy.lengths.tolist(), easy.documents.tolist()) == ([1, 4], [0, 1, 2])
    assert easy.tokens(0, 5).tolist() == [5, 6, 7, 8, 9]
    assert (hard.lengths.tolist(), hard.documents.tolist()) == ([2, 3], [0, 2])
    assert not manifest_path(tmp_path / "a_bucket0").exists()


def test_what_is_left_of_another_division_is_refused(tmp_path):
    prefix = make(tmp_path, "a", [letter * 5 for letter in "abcdef"])
    divide(prefix, "length", 3)
    with pytest.raises(DataError, match=r"bucket2 of another division are there, and --buckets 2 would leave 1 among"):
        divide(prefix, "length", 2)
    assert len(divide(prefix, "length", 3)) == 3


def test_what_cannot_be_divided(tmp_path):
    prefix = make(tmp_path, "a", ["x" * 100, "y", "z"])
    with pytest.raises(DataError, match=r"3 documents of 105 tokens, and bucket 1 of 4 would have none"):
        divide(prefix, "length", 4)
    with pytest.raises(DataError, match=r"scores.npy does not exist: .*--score-key"):
        divide(prefix, "score", 2)
    for wrong, said in (
        (np.zeros(4), r"float64 numbers of shape \(4,\); one for each of 3 documents"),
        (np.array(["a", "b", "c"]), r"<U1 numbers"),
        (np.array([1, np.nan, 2]), r"no number for 1 of 3 documents"),
    ):
        np.save(tmp_path / "own.npy", wrong)
        with pytest.raises(DataError, match=said):
            divide(prefix, "score", 2, scores=str(tmp_path / "own.npy"))
    (tmp_path / "own.npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match="no column of scores"):
        divide(prefix, "score", 2, scores=str(tmp_path / "own.npy"))


def test_parts_of_documents_are_joined_and_context_does_not_count(tmp_path):
    source = tmp_path / "qa.jsonl"
    rows = [{"q": f"question {i}" * (i % 3), "a": f"answer {i}" * (i % 4)} for i in range(50)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = CorpusJob((str(source),), str(tmp_path / "qa"), BYTES, json_keys=("q", "a"), append_eod=True)
    question, answer = tokenize_corpus(job)
    whole = str(tmp_path / "whole")
    documents, tokens, counted = join([question, answer], [question], whole)
    assert texts_of(whole) == [row["q"] + row["a"] for row in rows]
    reader = IndexedReader(whole)
    mask = read_mask(reader)
    assert (documents, tokens) == (50, reader.num_tokens) and counted == IndexedReader(answer).num_tokens
    for i, row in enumerate(rows):
        ids, counts = (each.tokens(each.document_token(i), each.document_token(i + 1)) for each in (reader, mask))
        assert bytes(ids[(counts == 1) & (ids < 256)].astype(np.uint8)).decode() == row["a"]
        assert (ids == 256).sum() == bool(row["q"] + row["a"]) and (not len(ids) or ids[-1] == 256)
    assert list(faults(whole)) == [] and len(facts_of(whole).parts) == 2
    both = str(tmp_path / "both")
    merge([whole, whole], both)
    assert read_mask(IndexedReader(both)).num_documents == 100
    with pytest.raises(DataError, match="1 of 2 sets have a loss mask"):
        merge([whole, answer], str(tmp_path / "mixed"))
    with pytest.raises(DataError, match="divide sets before they are joined"):
        divide(whole, "length", 2)


def test_an_old_loss_mask_goes_with_its_set(tmp_path):
    question, answer = make(tmp_path, "q", TEXTS), make(tmp_path, "a", TEXTS)
    whole = str(tmp_path / "whole")
    _, _, counted = join([question, answer], [question], whole)
    assert describe(whole)["loss_mask"] == {"prefix": mask_prefix(whole), "targets": counted}
    flip(Path(f"{mask_prefix(whole)}.bin"), 0, 2)
    assert any("loss_mask.bin: token id" in fault for fault in faults(whole))
    Path(f"{mask_prefix(whole)}.bin").write_bytes(b"")
    assert any("loss_mask" in fault for fault in faults(whole))
    join([question, answer], [], whole)
    assert describe(whole)["loss_mask"] is None and list(faults(whole)) == []


def test_a_set_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    question, answer = make(tmp_path, "q", TEXTS), make(tmp_path, "a", TEXTS)
    whole = str(tmp_path / "whole")
    join([question, answer], [question], whole)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("whole*")}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(indexed, "_sync", full)
    for again in (lambda: merge([question, answer], whole), lambda: join([answer, question], [answer], whole)):
        with pytest.raises(DataError, match="No space left on device"):
            again()
        assert {path.name: path.read_bytes() for path in tmp_path.glob("whole*")} == before


def test_joined_and_half_scored_sets_have_no_scores(tmp_path):
    question, answer = (make(tmp_path, name, TEXTS, [1.0] * len(TEXTS)) for name in "qa")
    whole = str(tmp_path / "whole")
    join([question, answer], [question], whole)
    assert list(faults(whole)) == []
    merge([question, answer], whole)
    assert list(faults(whole)) == [] and scores_path(whole).exists()
    scores_path(answer).unlink()
    merge([question, answer], whole)
    assert list(faults(whole)) == [] and not scores_path(whole).exists()


def test_what_cannot_be_joined_is_refused_before_anything_is_written(tmp_path):
    a, b = make(tmp_path, "a", TEXTS), make(tmp_path, "b", TEXTS[:-1])
    output = str(tmp_path / "whole")
    with pytest.raises(DataError, match=r"there are 6 in .*, 5 in .*; make them of the same input"):
        join([a, b], [], output)
    with pytest.raises(DataError, match="is context and none of the sets"):
        join([a], [b], output)
    with pytest.raises(DataError, match="leaves nothing to predict"):
        join([a], [a], output)
    with pytest.raises(DataError, match="give the joined set another name"):
        join([a, b], [], a)
    assert not list(tmp_path.glob("whole*")) and not Path(f"{mask_prefix(output)}.bin").exists()
