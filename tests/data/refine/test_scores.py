"""Scores of texts, and evaluation items kept out of training text."""

from __future__ import annotations

import inspect
import json
import pydoc_data.topics
import tokenize
from pathlib import Path

import pytest

from megatron_lite.data.refine.decontaminate import Decontaminate
from megatron_lite.data.refine.document import Document
from megatron_lite.data.refine.importance import BUCKETS, Importance, learn
from megatron_lite.data.refine.score import Score
from megatron_lite.data.text_blocks import Limit
from megatron_lite.data.text_input import find_sources
from megatron_lite.errors import DataError

ITEM = "which of the following planets has the largest number of moons that were known to astronomers in the year"


def write(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text, "n": 1}) + "\n" for text in texts))
    return path


def pieces(text: str, size: int = 600) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text) - size, size)]


def test_importance_tells_prose_from_code_it_has_not_seen(tmp_path):
    prose = pieces("\n".join(pydoc_data.topics.topics.values()))
    code = pieces(inspect.getsource(inspect) + inspect.getsource(tokenize) + inspect.getsource(json.decoder))
    good, raw = write(tmp_path / "good.jsonl", prose[::2]), write(tmp_path / "raw.jsonl", code[::2] + prose[1::50])
    learn(find_sources([str(good)]), find_sources([str(raw)]), "text", Limit(), tmp_path / "w.npy")
    score = Importance(str(tmp_path / "w.npy"))
    of_prose, of_code = list(map(score, prose[1::2])), list(map(score, code[1::2]))
    right = sum(a > b for a in of_prose for b in of_code) / (len(of_prose) * len(of_code))
    assert right > 0.97, right
    assert score("") == 0.0
    learn(find_sources([str(good)]), find_sources([str(raw)]), "text", Limit(), tmp_path / "again.npy")
    assert (tmp_path / "again.npy").read_bytes() == (tmp_path / "w.npy").read_bytes()

    stage = Score(
        function="megatron_lite.data.refine.importance:Importance",
        arguments={"weights": str(tmp_path / "w.npy")},
        min=0.0,
        field="prose",
    )
    step = stage.open(tmp_path)
    document = Document(max(prose[1::2], key=score), {}, "here", 1)
    assert step(document) is None and document.metadata["prose"] > 0
    assert min(of_code) < 0 < max(of_prose)
    assert step(Document(min(code[1::2], key=score), {}, "here", 1)).reason == "low score"
    with pytest.raises(DataError, match="there is no text to learn from"):
        empty = write(tmp_path / "empty.jsonl", [])
        learn(find_sources([str(empty)]), find_sources([str(raw)]), "text", Limit(), tmp_path / "x.npy")
    (tmp_path / "bad.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match=r"bad\.npy cannot be read"):
        Importance(str(tmp_path / "bad.npy"))
    assert BUCKETS == 1 << 18


def test_any_function_scores(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    step = Score(function="builtins:len", max=5, field="size").open(tmp_path)
    document = Document("four", {}, "here", 1)
    assert step(document) is None and document.metadata == {"size": 4}
    assert step(Document("longer", {}, "here", 1)).detail == "6 > 5"
    for function, match in {
        "no.module:f": "cannot be loaded: No module",
        "json:nothing": "cannot be loaded: .*nothing",
        "megatron_lite.data.refine.importance:Importance": "does not take the arguments",
    }.items():
        with pytest.raises(DataError, match=match):
            Score(function=function).prepare(tmp_path)
    for stage in (Score(function="sys:maxsize"), Score(function="builtins:int", arguments={})):
        with pytest.raises(DataError, match=f"{stage.function} is no function, but gives int"):
            stage.prepare(tmp_path)
    with pytest.raises(ValueError, match="gives no number"):
        Score(function="stages_for_tests:gives_no_number").open(tmp_path)(Document("nan", {}, "here", 1))


def decontaminated(stage: Decontaminate, folder: Path, text: str) -> str | None:
    stage.prepare(folder)
    drop = stage.open(folder)(Document(text, {}, "here", 1))
    return drop and drop.reason


def test_evaluation_items_are_found_in_any_dress(tmp_path):
    path = write(tmp_path / "exam.jsonl", [ITEM, "a short but whole item of eight words"], key="question")
    stage = Decontaminate(files=(str(path),))
    words = ITEM.split()
    assert decontaminated(stage, tmp_path, f"He asked: “{ITEM.upper()}?” and left.") == "contaminated"
    assert decontaminated(stage, tmp_path, "so " + ", ".join(words[3:16]) + " it is") == "contaminated"
    assert decontaminated(stage, tmp_path, "so " + " ".join(words[3:15]) + " it is") is None
    assert decontaminated(stage, tmp_path, "A short - but whole - item of eight words.") == "contaminated"
    assert decontaminated(stage, tmp_path, "a short but whole item of seven words") is None
    assert decontaminated(Decontaminate(files=(str(path),), min_matches=8), tmp_path, " ".join(words)) is None
    assert decontaminated(Decontaminate(files=(str(path),), keys=("question",)), tmp_path, ITEM) == "contaminated"
    with pytest.raises(DataError, match="no key 'answer'"):
        Decontaminate(files=(str(path),), keys=("answer",)).prepare(tmp_path)
    with pytest.raises(DataError, match="no text of 20 words or more"):
        Decontaminate(files=(str(path),), ngram=20, shortest=20).prepare(tmp_path)
    with pytest.raises(DataError, match=r"decontaminate: .*none\.jsonl: no such file"):
        Decontaminate(files=(str(tmp_path / "none.jsonl"),)).prepare(tmp_path)
    nested = tmp_path / "nested.json"
    nested.write_text(json.dumps({"choices": [{"text": ITEM}, 3]}))
    assert decontaminated(Decontaminate(files=(str(nested),)), tmp_path, ITEM) == "contaminated"
    assert "files are not given" in next(Decontaminate().problems())
