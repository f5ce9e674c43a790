"""A whole run: every document accounted for, the same bytes whatever the workers and whatever was killed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard

from megatron_lite.data.refine.job import RefineJob, refine
from megatron_lite.data.refine.passes import plan
from megatron_lite.data.refine.recipe import parse_recipe
from megatron_lite.data.refine.report import Report
from megatron_lite.data.text_blocks import Limit
from megatron_lite.errors import DataError

ROOT = Path(__file__).resolve().parents[3]
RECIPE = """
stages:
  - white_space
  - length: {min_words: 5}
  - exact_duplicates
  - near_duplicates
  - score: {function: "stages_for_tests:fails", field: size}
  - exact_duplicates: {of: paragraph, min_characters: 10}
  - length: {min_characters: 20}
"""


def write_corpus(path: Path, documents: int = 400) -> Path:
    """Documents of paragraphs, among them short, equal, nearly equal and bad ones, and one that a stage fails on."""
    draw = random.Random(1)
    lines, texts = [], []
    for number in range(documents):
        kind = number % 10
        if kind == 3:
            text = "too short"
        elif kind == 5 and texts:
            text = draw.choice(texts)
        elif kind == 7 and texts:
            text = draw.choice(texts) + " more"
        else:
            text = "\n\n".join(" ".join(f"w{draw.randrange(900)}" for _ in range(30)) for _ in range(3))
            if kind == 8 and texts:
                text += "\n\n" + draw.choice(texts).split("\n\n")[0]
            texts.append(text)
        if number == documents // 2:
            text += " ZERO"
        lines.append("{bad" if kind == 9 else json.dumps({"text": text, "id": number, "by": {"name": "x"}}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(autouse=True)
def _own_stages(monkeypatch):
    """Workers find the stages of the tests as this process does."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "a.jsonl")


def job_of(corpus: Path, output: Path, recipe: str = RECIPE, **changes) -> RefineJob:
    job = RefineJob((str(corpus),), str(output), parse_recipe(recipe, "recipe"), unit_bytes=8000, save_dropped=True)
    return dataclasses.replace(job, **changes)


def contents(output: Path) -> dict[str, str]:
    """A hash of each file of an output, and what of the report must be equal."""
    found = {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.is_file() and not path.name.startswith("report")
    }
    report = json.loads((output / "report.json").read_bytes())
    return found | {"report": json.dumps({name: value for name, value in report.items() if name != "cost"})}


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory) -> tuple[Path, Report]:
    sys.path.insert(0, str(Path(__file__).parent))
    output = tmp_path_factory.mktemp("done") / "out"
    return output, refine(job_of(corpus, output, keep_metadata=("id", "size")))


def test_passes_end_where_the_corpus_is_compared():
    stages = parse_recipe(RECIPE, "recipe")
    assert [(p.apply, p.run, p.sign, p.is_last) for p in plan(stages)] == [
        ((), (0, 1), (2, 3), False),
        ((2, 3), (4,), (5,), False),
        ((5,), (6,), (), True),
    ]
    assert [(p.run, p.sign) for p in plan(())] == [((), ())]
    twice = parse_recipe("stages: [exact_duplicates: {of: line}, near_duplicates]", "recipe")
    assert [(p.apply, p.run, p.sign) for p in plan(twice)] == [((), (), (0,)), ((0,), (), (1,)), ((1,), (), ())]


def documents_of(output: Path) -> list[dict]:
    return [
        json.loads(line)
        for path in sorted((output / "documents").iterdir())
        for line in zstandard.ZstdDecompressor()
        .stream_reader(path.read_bytes(), read_across_frames=True)
        .readall()
        .splitlines()
    ]


def test_every_document_is_accounted_for(corpus, done):
    output, report = done
    kept = documents_of(output)
    dropped = zstandard.ZstdDecompressor().stream_reader(
        (output / "dropped.jsonl.zst").read_bytes(), read_across_frames=True
    )
    dropped = [json.loads(line) for line in dropped.readall().splitlines()]
    aside = [json.loads(line) for line in (output / "quarantine.jsonl").read_bytes().splitlines()]
    assert report.documents == 400 and report.kept == len(kept) and report.quarantined == len(aside) == 1
    assert report.kept + report.dropped + report.quarantined == 400
    assert report.stages[0].tally.dropped == {"invalid JSON": 40}
    assert len(dropped) == report.dropped - 40
    assert all(item["reason"] and item["stage"] and item["source"] == str(corpus) for item in dropped)
    assert aside[0]["error"] == "ZeroDivisionError: division by zero" and aside[0]["stage"] == "score"
    assert (aside[0]["line"], aside[0]["source"]) == (201, str(corpus)) and "ZERO" in aside[0]["text"]
    by_stage = {stage.name: stage for stage in report.stages[:4]}
    assert by_stage["length"].tally.dropped == {"too few words": 40}
    assert by_stage["exact_duplicates"].tally.dropped["duplicate"] >= 35
    assert report.stages[4].tally.dropped["near duplicate"] >= 30
    for before, after in zip(report.stages, report.stages[1:], strict=False):
        assert after.tally.documents == before.tally.kept
    assert report.stages[6].tally.edited >= 10
    ids = [item["id"] for item in kept]
    assert ids == sorted(ids)
    assert all(
        (set(item) == {"text", "id", "size"} and item["size"] == len(item["text"])) or "w" in item["text"]
        for item in kept
    )
    # By a plain definition: the first of equal texts.
    seen = set()
    for line in corpus.read_text().splitlines():
        if line.startswith("{bad"):
            continue
        item = json.loads(line)
        assert item["id"] not in ids or item["text"] not in seen
        seen.add(item["text"])
    assert not (output / ".work").exists()


@pytest.mark.parametrize("changes", [{"workers": 2}, {"workers": 3, "max_memory": 4 << 30}])
def test_output_does_not_depend_on_workers(corpus, done, tmp_path, changes):
    refine(job_of(corpus, tmp_path / "out", keep_metadata=("id", "size"), **changes))
    assert contents(tmp_path / "out") == contents(done[0])


def test_documents_do_not_depend_on_units(corpus, done, tmp_path):
    refine(job_of(corpus, tmp_path / "out", keep_metadata=("id", "size"), unit_bytes=100_000))
    assert documents_of(tmp_path / "out") == documents_of(done[0])


DRIVER = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import test_job
from pathlib import Path
from megatron_lite.data.refine.job import refine
if __name__ == "__main__":
    refine(test_job.job_of(Path({corpus!r}), Path({output!r}), keep_metadata=("id", "size"), workers={workers}))
"""


def start(corpus: Path, output: Path, workers: int) -> subprocess.Popen:
    tests = str(Path(__file__).parent)
    script = DRIVER.format(tests=tests, root=str(ROOT), corpus=str(corpus), output=str(output), workers=workers)
    path = output.with_suffix(".py")
    path.write_text(script)
    return subprocess.Popen([sys.executable, str(path)], stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_killed_anywhere_and_run_again_the_bytes_are_the_same(corpus, done, tmp_path):
    """SIGKILL after each of some files has appeared, in every pass; then once to the end."""
    output = tmp_path / "out"
    work = output / ".work"
    marks = (
        "pass-0/000000003.unit",
        "pass-0/000000012.unit",
        "pass-0/verdicts-3",
        "pass-1/000000002.unit",
        "pass-2/*.unit",
    )
    for number, mark in enumerate(marks):
        process = start(corpus, output, workers=1 + number % 2)
        deadline = time.monotonic() + 120
        while not list(work.glob(mark)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        process.communicate()
        if (output / "report.json").exists():
            break
        assert list(work.glob(mark)), mark
    report = refine(job_of(corpus, output, keep_metadata=("id", "size")))
    assert contents(output) == contents(done[0])
    assert report.plain()["stages"] == done[1].plain()["stages"]


def test_a_killed_run_and_another_job_are_never_mixed(tmp_path):
    for name, letter in (("a", "w"), ("b", "v")):
        path = write_corpus(tmp_path / f"{name}.jsonl", 100)
        path.write_text(path.read_text().replace(" w", f" {letter}"))
    script = Path(__file__).with_name("killed_runs.py")
    paths = os.pathsep.join([str(ROOT), str(script.parent)])
    done = subprocess.run(
        [sys.executable, script, tmp_path], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_units_that_are_done_are_not_done_again(corpus, tmp_path, monkeypatch):
    output = tmp_path / "out"
    marks = tmp_path / "marks"
    marks.mkdir()
    recipe = f"stages: [score: {{function: 'stages_for_tests:Dies', arguments: {{folder: '{marks}', times: 2}}}}]"
    path = tmp_path / "a.jsonl"
    texts = ["fine " * 40] * 200
    texts[100], texts[150] = "KILL me", "KILL me too"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    job = job_of(path, output, recipe, workers=2, unit_bytes=2000)
    for _ in range(2):
        with pytest.raises(DataError, match="a worker process was killed by signal 9"):
            refine(job)
    before = {unit.name: unit.stat().st_mtime_ns for unit in (output / ".work" / "pass-0").glob("*.unit")}
    assert before
    monkeypatch.setattr("megatron_lite.data.refine.job.shutil.rmtree", lambda *_, **__: None)
    assert refine(job).kept == 200
    after = {unit.name: unit.stat().st_mtime_ns for unit in (output / ".work" / "pass-0").glob("*.unit")}
    assert len(after) > len(before) and before.items() <= after.items()


def test_an_end_of_the_program_in_a_stage_sets_the_document_aside(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("fine", "LEAVE", "fine too")))
    report = refine(job_of(path, tmp_path / "out", "stages: [score: {function: 'stages_for_tests:leaves'}]"))
    assert (report.kept, report.quarantined) == (2, 1)


def test_a_document_that_kills_its_worker_is_set_aside(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = [f"fine {number} " * 20 for number in range(60)]
    texts[20] = texts[41] = "a FAULT"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = "stages: [length, score: {function: 'stages_for_tests:faults'}]"
    report = refine(job_of(path, tmp_path / "out", recipe, workers=2, unit_bytes=2000))
    assert (report.kept, report.quarantined) == (58, 2)
    aside = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_bytes().splitlines()]
    assert [(item["line"], item["stage"]) for item in aside] == [(21, "score"), (42, "score")]
    assert aside[0]["error"] == "ChildProcessError: it killed its worker by SIGSEGV"


def test_an_interrupt_leaves_what_is_done(corpus, tmp_path):
    output = tmp_path / "out"
    process = start(corpus, output, workers=2)
    deadline = time.monotonic() + 120
    while not list((output / ".work").glob("pass-0/*.unit")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in said or (output / "report.json").exists()


def test_another_job_does_not_go_on_in_a_folder(corpus, done, tmp_path):
    output, report = done
    again = refine(job_of(corpus, output, keep_metadata=("id", "size")))
    assert again.plain() == report.plain()
    with pytest.raises(DataError, match=r"is of another job \(keep_metadata differ\); .*--overwrite"):
        refine(job_of(corpus, output))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="holds other files"):
        refine(job_of(corpus, tmp_path / "mine"))
    with pytest.raises(DataError, match="is a file"):
        refine(job_of(corpus, tmp_path / "mine" / "thesis.txt"))
    once = tmp_path / "once"
    refine(job_of(corpus, once, "stages: []"))
    report = refine(job_of(corpus, once, "stages: [length: {min_words: 5}]", overwrite=True))
    assert report.kept == 320 and len(documents_of(once)) == 320


def test_input_that_changed_under_a_job_is_refused(corpus, tmp_path):
    output = tmp_path / "out"
    texts = [json.dumps({"text": f"{number} " * 50}) for number in range(100)]
    pipe = tmp_path / "a.jsonl"
    pipe.write_text("\n".join(texts))
    marks = tmp_path / "marks"
    marks.mkdir()
    recipe = f"stages: [score: {{function: 'stages_for_tests:Dies', arguments: {{folder: '{marks}', times: 1}}}}]"
    stamp = pipe.stat()
    pipe.write_text("\n".join([*texts, json.dumps({"text": "KILL"})]))
    os.utime(pipe, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    job = job_of(pipe, output, recipe, workers=2, unit_bytes=2000)
    with pytest.raises(DataError, match="killed by signal 9"):
        refine(job)
    pipe.write_text("\n".join([texts[0].replace("0", "1"), *texts[1:], json.dumps({"text": "KILL"})]))
    os.utime(pipe, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(DataError, match="the input is not what it was when"):
        refine(job)


def test_a_report_without_documents_is_no_finished_job(corpus, tmp_path):
    output = tmp_path / "out"
    job = job_of(corpus, output, "stages: []")
    refine(job)
    expected = contents(output)
    shutil.rmtree(output / "documents")
    refine(job)
    assert contents(output) == expected


def test_units_without_their_job_are_made_again(corpus, tmp_path):
    output = tmp_path / "out"
    (output / ".work" / "pass-0").mkdir(parents=True)
    (output / ".work" / "lock").touch()
    (output / ".work" / "pass-0" / "000000000.unit").write_bytes(b"of another job")
    assert refine(job_of(corpus, output, "stages: []")).kept == 360


def test_a_mistake_before_the_first_unit_leaves_no_folder(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError):
        refine(job_of(tmp_path / "a.jsonl.gz", tmp_path / "out", "stages: []"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_output_in_shards_of_a_format(corpus, tmp_path, form):
    from megatron_lite.data.text_blocks import read_blocks
    from megatron_lite.data.text_documents import parse_block
    from megatron_lite.data.text_input import find_sources

    output = tmp_path / "out"
    refine(job_of(corpus, output, "stages: []", output_format=form, shard_bytes=20_000, save_dropped=False))
    shards = sorted((output / "documents").iterdir())
    assert len(shards) > 1 and shards[0].name == f"00000.{form}"
    sources = find_sources([str(output / "documents")])
    texts = [found for source in sources for block in read_blocks(source) for found in parse_block(block, ("text",))]
    assert len(texts) == 360
    assert {path.name for path in output.iterdir()} == {"documents", "report.json", "report.html"}


def test_a_limit_and_all_metadata(corpus, tmp_path):
    output = tmp_path / "out"
    job = job_of(corpus, output, "stages: []", limit=Limit(documents=30), keep_metadata=("all",))
    assert refine(job).documents == 30
    assert documents_of(output)[3] == {"text": "too short", "id": 3, "by": {"name": "x"}}


def test_metadata_by_dotted_path_comes_through_all_passes(corpus, tmp_path):
    refine(job_of(corpus, tmp_path / "out", "stages: [exact_duplicates]", keep_metadata=("by.name", "by.none")))
    assert all(item["by.name"] == "x" and set(item) == {"text", "by.name"} for item in documents_of(tmp_path / "out"))


def test_a_document_that_cannot_be_written_is_accounted_for(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two", "n": 99999999999999999999999, "known": NaN}\n')
    report = refine(job_of(path, tmp_path / "out", "stages: []", keep_metadata=("all",)))
    assert (report.documents, report.kept, report.quarantined) == (2, 1, 1)
    assert json.loads((tmp_path / "out" / "quarantine.jsonl").read_bytes())["stage"] == "write"


def test_nothing_in_gives_nothing_out(tmp_path):
    (tmp_path / "a.jsonl").touch()
    report = refine(job_of(tmp_path / "a.jsonl", tmp_path / "out"))
    assert (report.documents, report.kept) == (0, 0)
    assert documents_of(tmp_path / "out") == []


def test_memory_that_workers_need_is_asked_for(corpus, tmp_path):
    job = job_of(corpus, tmp_path / "out", workers=8, max_memory=500 << 20)
    (problem,) = job.problems()
    assert "--max-memory-mb 500 is less than the" in problem and "--workers 8" in problem
    assert not dataclasses.replace(job, max_memory=job.memory_needed()).problems()
