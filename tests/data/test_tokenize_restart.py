"""Preprocessing that is killed and run again, shuffled, scored: the same bytes, whatever the workers and the memory."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.config.data import DataConfig
from megatron_lite.data.corpus_job import CorpusJob
from megatron_lite.data.indexed import IndexedReader, IndexedWriter
from megatron_lite.data.provenance import read_manifest
from megatron_lite.data.text_blocks import Limit
from megatron_lite.data.tokenize_corpus import tokenize_corpus
from megatron_lite.data.unit_file import open_unit, write_unit
from megatron_lite.errors import DataError

BYTES = DataConfig(tokenizer_type="ByteTokenizer")
ROOT = Path(__file__).resolve().parents[2]


def write_corpus(path: Path, documents: int = 60) -> Path:
    draw = random.Random(3)
    lines = [
        json.dumps(
            {"text": f"{number} " + "word " * draw.randrange(40), "title": f"title {number}", "by": {"n": number}}
        )
        for number in range(documents)
    ]
    lines[documents // 3] = "{bad"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "a.jsonl")


def job_of(corpus: Path, prefix: Path, **changes) -> CorpusJob:
    job = CorpusJob(
        (str(corpus),),
        str(prefix),
        BYTES,
        json_keys=("text", "title"),
        append_eod=True,
        on_error="skip",
        score_key="by.n",
        shuffle_seed=11,
        block_bytes=512,
        unit_bytes=1500,
    )
    return dataclasses.replace(job, **changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("expected")
    tokenize_corpus(job_of(corpus, folder / "out"))
    return contents(folder)


def test_all_sets_are_shuffled_alike_and_scored(corpus, expected, tmp_path):
    sets = [f"out_{key}_document" for key in ("text", "title")]
    assert sorted(expected) == sorted(
        f"{name}.{kind}" for name in sets for kind in ("bin", "idx", "manifest.json", "scores.npy")
    )
    for name, content in expected.items():
        (tmp_path / name).write_bytes(content)
    orders = []
    for name, begins in zip(sets, (b"%d ", b"title %d"), strict=True):
        reader = IndexedReader(tmp_path / name)
        scores = np.load(tmp_path / f"{name}.scores.npy")
        assert scores.dtype == np.float32 and len(scores) == reader.num_documents == 59
        for document, score in enumerate(scores):
            start = reader.document_token(document)
            begin = begins % int(score)
            assert bytes(reader.tokens(start, start + len(begin)).astype(np.uint8)) == begin
        orders.append(scores.tolist())
    assert orders[0] == orders[1] != sorted(orders[0])
    assert sorted(orders[0]) == [number for number in range(60) if number != 20]


@pytest.mark.parametrize(
    "changes",
    [{"workers": 2}, {"block_bytes": 100, "unit_bytes": 1}, {"max_memory": 2000}, {"unit_bytes": 1 << 20}],
    ids=str,
)
def test_the_bytes_do_not_depend_on_workers_units_or_memory(corpus, expected, tmp_path, changes):
    tokenize_corpus(job_of(corpus, tmp_path / "out", **changes))
    found = contents(tmp_path)
    assert found.keys() == expected.keys()
    for name, content in found.items():
        if name.endswith("manifest.json"):
            one, other = json.loads(content), json.loads(expected[name])
            # The job says how the work is cut, which decides what of it can be used again.
            assert one | {"job": ""} == other | {"job": ""}
        else:
            assert content == expected[name], name


KILLER = """
import dataclasses, json, os, signal, sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
import test_tokenize_restart as tests
from megatron_lite.data.tokenize_corpus import tokenize_corpus
from megatron_lite.errors import DataError

WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")

def killed_at(event, job, folder):
    "Whether a run of the job was killed before its event of that number that changes something in a folder."
    child = os.fork()
    if child == 0:
        seen = 0
        def hook(name, arguments):
            nonlocal seen
            if name not in WATCHED or not str(arguments[0]).startswith(folder):
                return
            if name == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
        sys.addaudithook(hook)
        tokenize_corpus(job)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

def finish(job):
    try:
        tokenize_corpus(job)
    except DataError as error:
        assert "is of another job" in str(error)
        tokenize_corpus(dataclasses.replace(job, overwrite=True))

corpus, top = map(Path, sys.argv[1:3])
changes = json.loads(sys.argv[3])
# Half of another job, and this one in its place, killed while it clears the folder and later.
for event in range(0 if changes else 25):
    folder = top / ("another-%d" % event)
    folder.mkdir()
    job = tests.job_of(corpus, folder / "out")
    another = tests.job_of(corpus, folder / "out", append_eod=False)
    assert killed_at(20, another, str(folder))
    assert len(list(folder.glob("out.work/units/*.unit"))) > 2
    assert killed_at(event, dataclasses.replace(job, overwrite=True), str(folder))
    finish(job)
event = 0
while True:
    folder = top / str(event)
    folder.mkdir()
    job = tests.job_of(corpus, folder / "out", **changes)
    if not killed_at(event, job, str(folder)):
        break
    # Killed once more on its way, and then not.
    killed_at(event // 2, job, str(folder))
    assert not killed_at(10**9, job, str(folder)), event
    event += 1
print(event)
"""


IN_ORDER = {"shuffle_seed": None, "score_key": None, "json_keys": ["text"]}
"""Sets that are put together as units come."""


@pytest.mark.parametrize("changes", [{}, IN_ORDER], ids=["shuffled", "in order"])
def test_killed_anywhere_and_run_again_the_bytes_are_the_same(corpus, expected, tmp_path, changes):
    if changes:
        tokenize_corpus(job_of(corpus, tmp_path / "expected" / "out", **changes))
        expected = contents(tmp_path / "expected")
    script = KILLER.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script, str(corpus), str(tmp_path), json.dumps(changes)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    events = int(done.stdout)
    assert events > 20
    for event in range(events + 1):
        assert contents(tmp_path / str(event)) == expected, f"killed at event {event}"
    for folder in tmp_path.glob("another-*"):
        assert contents(folder) == expected, folder


class Stop(Exception):
    """What ends a run in the midst of it."""


@pytest.fixture
def begun(corpus, tmp_path, monkeypatch) -> CorpusJob:
    """A job that was stopped when a part of its units were done."""
    copied = tmp_path / "copy.jsonl"
    copied.write_bytes(corpus.read_bytes())
    job = job_of(copied, tmp_path / "out")
    from megatron_lite.data import tokenize_corpus as module

    original, count = module.UnitTokenizer.__call__, 0

    def call(self, unit):
        nonlocal count
        count += 1
        if count == 3:
            raise Stop
        return original(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(module.UnitTokenizer, "__call__", call)
        with pytest.raises(Stop):
            tokenize_corpus(job)
    assert len(list((tmp_path / "out.work" / "units").iterdir())) == 2
    assert not list(tmp_path.glob("out_*"))
    return job


def test_sets_in_the_making_lie_in_the_work_folder_alone(begun, tmp_path, monkeypatch):
    from megatron_lite.data import token_set_writer as module

    beside, stale = [], tmp_path / "out.work" / "out_text_document.bin.1-ab.tmp"

    class Watched(module.TokenSetWriter):
        def add(self, *documents):
            super().add(*documents)
            beside.append([path.name for path in tmp_path.glob("*_document*")])
            assert not stale.exists()

    monkeypatch.setattr(module, "TokenSetWriter", Watched)
    stale.write_bytes(b"left by a run that was killed")
    tokenize_corpus(begun)
    for path in tmp_path.glob("*_document*"):
        path.unlink()
    tokenize_corpus(dataclasses.replace(begun, **IN_ORDER))
    assert len(beside) > 4 and not any(beside)


def test_an_interrupt_while_sets_are_published_comes_too_late(corpus, expected, tmp_path, monkeypatch):
    close = IndexedWriter.close

    def interrupted(self):
        close(self)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(IndexedWriter, "close", interrupted)
    tokenize_corpus(job_of(corpus, tmp_path / "out"))
    assert contents(tmp_path) == expected


def test_work_of_another_job_is_refused(begun, expected, tmp_path):
    with pytest.raises(
        DataError, match=r"out\.work is of another job \(append_eod, shuffle_seed differ\).*--overwrite"
    ):
        tokenize_corpus(dataclasses.replace(begun, shuffle_seed=12, append_eod=False))
    tokenize_corpus(dataclasses.replace(begun, shuffle_seed=12, append_eod=False, overwrite=True))
    assert (
        read_manifest(
            tmp_path / "out_text_document", IndexedReader(tmp_path / "out_text_document").num_tokens
        ).shuffle_seed
        == 12
    )


def test_units_of_no_known_job_or_of_another_are_made_again(begun, expected, tmp_path):
    work = tmp_path / "out.work"
    for name, content in (("job.json", None), ("units/000000000.unit", b"not looked at")):
        (work / name).unlink() if content is None else (work / name).write_bytes(content)
    tokenize_corpus(begun)
    assert {name: found for name, found in contents(tmp_path).items() if name.endswith(".bin")} == {
        name: found for name, found in expected.items() if name.endswith(".bin")
    }


def test_a_unit_that_says_it_is_of_another_job_is_made_again(begun, tmp_path):
    path = tmp_path / "out.work" / "units" / "000000000.unit"
    unit = open_unit(path)
    write_unit(path, {**unit.head, "job": "another", "documents": 0}, {})
    assert tokenize_corpus(begun)[str(tmp_path / "out_text_document")].documents == 59


def test_a_damaged_note_of_the_job_is_told(begun, tmp_path):
    (tmp_path / "out.work" / "job.json").write_text('{"cut')
    with pytest.raises(DataError, match=r"job\.json is damaged .*--overwrite"):
        tokenize_corpus(begun)


def test_a_folder_of_something_else_is_left_alone(corpus, tmp_path):
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"out\.work holds files that no run has left there"):
            tokenize_corpus(job_of(corpus, tmp_path / "out", overwrite=overwrite))
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def test_a_pipe_does_not_end_the_work_of_another_job(begun, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"out\.work is of another job"):
        tokenize_corpus(dataclasses.replace(begun, inputs=("-",)))
    assert len(list((tmp_path / "out.work" / "units").iterdir())) == 2


def test_a_mistake_before_the_first_unit_leaves_no_folder(corpus, tmp_path, monkeypatch):
    from megatron_lite.data import tokenize_corpus as module

    def fail(*_):
        raise DataError("no such address")

    with monkeypatch.context() as patch:
        patch.setattr(module, "read_blocks", fail)
        with pytest.raises(DataError, match="no such address"):
            tokenize_corpus(job_of(corpus, tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_damaged_set_is_made_again(corpus, expected, tmp_path, capsys):
    job = job_of(corpus, tmp_path / "out")
    tokenize_corpus(job)
    (tmp_path / "out_text_document.idx").write_bytes(b"cut")
    tokenize_corpus(job)
    assert contents(tmp_path) == expected
    assert "It is made again" in capsys.readouterr().err


def test_input_that_has_changed_is_refused(begun, tmp_path):
    copied = Path(begun.inputs[0])
    before = copied.stat()
    copied.write_text(copied.read_text().replace("word", "WORD"))
    with pytest.raises(DataError, match=r"copy\.jsonl has changed since.*--overwrite"):
        tokenize_corpus(begun)
    # Nor does it help to hide that.
    os.utime(copied, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match=r"copy\.jsonl, line 1: the input is not what it was"):
        tokenize_corpus(begun)


def test_what_is_made_already_is_not_made_again(corpus, tmp_path, capsys):
    job = job_of(corpus, tmp_path / "out")
    made = tokenize_corpus(job)
    stamp = (tmp_path / "out_text_document.bin").stat().st_mtime_ns
    assert tokenize_corpus(job) == made
    assert "made by the same job already" in capsys.readouterr().err
    assert (tmp_path / "out_text_document.bin").stat().st_mtime_ns == stamp
    tokenize_corpus(dataclasses.replace(job, overwrite=True))
    assert (tmp_path / "out_text_document.bin").stat().st_mtime_ns > stamp
    tokenize_corpus(dataclasses.replace(job, score_key=None, shuffle_seed=None))
    assert not (tmp_path / "out_text_document.scores.npy").exists()
    assert not (tmp_path / "out.work").exists()


def test_the_manifest_says_what_was_read(corpus, tmp_path):
    import hashlib

    ((prefix, facts), _) = tokenize_corpus(job_of(corpus, tmp_path / "out")).items()
    data = corpus.read_bytes()
    assert facts.inputs == [
        {"name": str(corpus), "size": len(data), "read": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    ]
    for suffix in ("bin", "idx", "scores.npy"):
        content = Path(f"{prefix}.{suffix}").read_bytes()
        assert facts.files[suffix] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert (facts.shuffle_seed, facts.score_key, facts.skipped) == (11, "by.n", {"invalid JSON": 1})
    limited = tokenize_corpus(job_of(corpus, tmp_path / "limited", limit=Limit(documents=2)))
    first = b"".join(data.splitlines(keepends=True)[:2])
    (inputs,) = next(iter(limited.values())).inputs
    assert (inputs["read"], inputs["sha256"]) == (len(first), hashlib.sha256(first).hexdigest())


def test_a_score_that_is_no_number_is_a_bad_document(corpus, tmp_path):
    with pytest.raises(DataError, match=r"line 1: not a number: 'title' is of type str"):
        tokenize_corpus(job_of(corpus, tmp_path / "out", score_key="title", on_error="stop"))
    with pytest.raises(DataError, match=r"line 1: missing key: no key 'by.x'"):
        tokenize_corpus(job_of(corpus, tmp_path / "out", score_key="by.x", on_error="stop"))
    assert not list(tmp_path.iterdir())
    plain = tmp_path / "a.txt"
    plain.write_text("x")
    with pytest.raises(DataError, match=r"--score-key by.n: .*a.txt has no keys"):
        tokenize_corpus(job_of(plain, tmp_path / "out", json_keys=("text",)))


@pytest.mark.parametrize("number", ["9" * 401, "1e39", "-Infinity"])
def test_a_score_beyond_float32_is_a_bad_document(tmp_path, number):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "x", "n": {number}}}')
    job = CorpusJob((str(tmp_path / "a.jsonl"),), str(tmp_path / "out"), BYTES, score_key="n")
    with pytest.raises(DataError, match=r"line 1: number too large: 'n' is beyond the 3\.4e\+38 of float32"):
        tokenize_corpus(job)


@pytest.mark.parametrize("recipe", [None, "none"])
def test_what_a_job_writes_is_not_its_input(corpus, tmp_path, capsys, recipe):
    """A folder that takes the output is input of the same job after a kill, and once more."""
    (tmp_path / "a.jsonl").write_bytes(corpus.read_bytes())
    job = job_of(tmp_path, tmp_path / "x", json_keys=("text",), recipe=recipe, score_key=None)
    made = tokenize_corpus(job)
    assert tokenize_corpus(job) == made and "files that the job itself writes are not read" in capsys.readouterr().err
    tokenize_corpus(dataclasses.replace(job, inputs=(f"{tmp_path}/**/*.json*",)))
    assert [entry["name"] for entry in next(iter(made.values())).inputs] == [str(tmp_path / "a.jsonl")]
    assert IndexedReader(tmp_path / "x_text_document").num_documents == 59


def test_small_files_share_units(tmp_path):
    for number in range(50):
        (tmp_path / f"{number:02d}.txt").write_text(f"file {number}")
    job = job_of(tmp_path / "*.txt", tmp_path / "out", json_keys=("text",), score_key=None, shuffle_seed=None)
    tokenize_corpus(dataclasses.replace(job, unit_bytes=1 << 20))
    reader = IndexedReader(tmp_path / "out_text_document")
    assert reader.num_documents == 50
    start, stop = reader.document_token(31), reader.document_token(32)
    assert bytes(reader.tokens(start, stop - 1).astype(np.uint8)) == b"file 31"
