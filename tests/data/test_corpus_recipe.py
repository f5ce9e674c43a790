"""A recipe before the tokenizer: the documents it keeps, the report it leaves, and goes on where it was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.config.data import DataConfig
from megatron_lite.data.corpus_job import CorpusJob
from megatron_lite.data.indexed import IndexedReader
from megatron_lite.data.refine.report import Report
from megatron_lite.data.tokenize_corpus import tokenize_corpus
from megatron_lite.errors import ConfigError, DataError

RECIPE = """
stages:
  - white_space
  - length: {min_words: 3}
  - exact_duplicates
  - score: {function: "builtins:len", field: size}
"""
TEXTS = ["one  two   three", "short", "one two three", "four five six seven", "x y", "a b c"]
KEPT = ["one two three", "four five six seven", "a b c"]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"body": text, "id": i}) + "\n" for i, text in enumerate(texts)) + "{bad\n")
    return path


@pytest.fixture
def job(tmp_path) -> CorpusJob:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return CorpusJob(
        (str(write(tmp_path / "a.jsonl", TEXTS)),),
        str(tmp_path / "out"),
        DataConfig(tokenizer_type="ByteTokenizer"),
        json_keys=("body",),
        append_eod=True,
        recipe=str(tmp_path / "recipe.yaml"),
        score_key="size",
    )


def texts_of(prefix: Path) -> list[str]:
    reader = IndexedReader(prefix)
    ids = reader.tokens(0, reader.num_tokens)
    return bytes(np.where(ids < 256, ids, 0).astype(np.uint8)).decode().split("\0")[:-1]


def test_what_the_recipe_keeps_becomes_tokens(job, tmp_path):
    facts = tokenize_corpus(job)[str(tmp_path / "out_body_document")]
    assert texts_of(tmp_path / "out_body_document") == KEPT
    assert np.load(tmp_path / "out_body_document.scores.npy").tolist() == [13, 19, 5]
    assert (facts.recipe["documents"], facts.recipe["kept"], facts.recipe["dropped"]) == (7, 3, 4)
    assert [next(iter(stage)) for stage in facts.recipe["stages"]] == [
        "white_space", "length", "exact_duplicates", "score"
    ]  # fmt: skip
    (read,) = facts.inputs
    assert read["name"] == job.inputs[0] and read["read"] == Path(job.inputs[0]).stat().st_size
    assert sorted(path.name for path in (tmp_path / "out.refine").iterdir()) == ["report.html", "report.json"]
    assert Report.read(tmp_path / "out.refine").kept == 3
    assert not (tmp_path / "out.work").exists()


def test_another_recipe_or_tokenizer_begins_anew_once_the_sets_are_made(job, tmp_path):
    tokenize_corpus(job)
    tokenize_corpus(dataclasses.replace(job, recipe_changes=("length.min_words=1",)))
    assert texts_of(tmp_path / "out_body_document") == ["one two three", "short", "four five six seven", "x y", "a b c"]
    tokenize_corpus(dataclasses.replace(job, shuffle_seed=3))
    assert sorted(texts_of(tmp_path / "out_body_document")) == sorted(KEPT)


def test_a_run_that_ended_in_the_tokenizer_does_not_refine_again(job, tmp_path, monkeypatch):
    from megatron_lite.data import tokenize_corpus as module

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.UnitTokenizer, "__call__", stopped)
        with pytest.raises(KeyboardInterrupt):
            tokenize_corpus(job)
    refined = tmp_path / "out.refine" / "report.json"
    stamp = refined.stat().st_mtime_ns
    tokenize_corpus(job)
    assert refined.stat().st_mtime_ns == stamp
    assert texts_of(tmp_path / "out_body_document") == KEPT


def test_a_recipe_that_keeps_nothing_is_told(job, tmp_path):
    with pytest.raises(DataError, match=r"keeps none of 7 documents; why is in .*report\.html"):
        tokenize_corpus(dataclasses.replace(job, recipe_changes=("length.min_words=9",)))
    assert (tmp_path / "out.refine" / "report.html").exists()
    tokenize_corpus(job)


def test_recipes_that_cannot_be(job):
    with pytest.raises(ConfigError, match=r"--recipe wob is no preset; perhaps you meant web"):
        tokenize_corpus(dataclasses.replace(job, recipe="wob"))
    with pytest.raises(ConfigError, match=r"--recipe works on one text a document, and --json-keys names 2"):
        tokenize_corpus(dataclasses.replace(job, json_keys=("body", "title")))
    with pytest.raises(ConfigError, match=r"--max-memory-mb 100 is less than .* --workers 4"):
        tokenize_corpus(dataclasses.replace(job, max_memory=100 << 20, workers=4))
