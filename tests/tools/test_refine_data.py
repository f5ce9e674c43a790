"""The command: text in, documents and a report out, mistakes in sentences, memory within what was asked."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "refine_data.py"


def run(*arguments: str, tool: Path = TOOL, **how) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(tool), *map(str, arguments)], capture_output=True, **how)


def read(folder: Path) -> list[dict]:
    data = b"".join(path.read_bytes() for path in sorted((folder / "documents").iterdir()))
    return [
        json.loads(line)
        for line in zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).readall().splitlines()
    ]


NOUNS = "committee garden river teacher engine museum harbour library winter kitchen market village".split()
VERBS = "described painted repaired visited measured opened crossed remembered questioned planted sold watched".split()
PLACES = "north valley island capital border forest station college bridge castle coast mountain".split()


def prose(number: int) -> str:
    """Twelve sentences that no other number has."""
    draw = random.Random(number)
    lines = []
    for _ in range(12):
        one, other, more = (draw.choice(NOUNS) for _ in range(3))
        verb, place = draw.choice(VERBS), draw.choice(PLACES)
        lines.append(f"The {one} that they {verb} near the {place} of a {other} is to be seen with {more}{number}.")
    return "</p><p>".join(lines)


def test_pages_become_clean_documents(tmp_path):
    pages = tmp_path / "pages"
    pages.mkdir()
    for number in range(5):
        page = f"<html><body><main><article><h1>Title</h1><p>{prose(number)}</p></article></main></body></html>"
        (pages / f"{number}.html").write_text(page, encoding="utf-8")
    (pages / "5.html").write_text((pages / "4.html").read_text())
    (pages / "6.html").write_text("<html><body><main><p>Hardly anything.</p></main></body></html>")
    loose = [f"gopher_repetition.top_{n}=1" for n in (2, 3, 4)]
    loose += [f"gopher_repetition.repeated_{n}=1" for n in range(5, 11)]
    changes = [word for change in loose for word in ("--set", change)]
    options = ["--input", pages, "--recipe", "web", "--output", tmp_path / "out", "--keep-metadata", "language"]
    done = run(*options, *changes, "--workers", "2")
    assert done.returncode == 0, done.stderr.decode()
    found = read(tmp_path / "out")
    assert [item["language"] for item in found] == ["en"] * 5, done.stdout
    assert all(item["text"].count("is to be seen with") == 12 and "<" not in item["text"] for item in found)
    assert b"7 documents in, 5 kept (71.4%), 2 dropped" in done.stdout
    assert (tmp_path / "out" / "report.html").exists()


def test_standard_input_and_a_recipe_of_ones_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("stages: [length: {min_words: 2}, score: {function: 'mine:score', min: 3}]\n")
    (tmp_path / "mine.py").write_text("def score(text):\n    return len(text.split())\n")
    text = b'{"a": {"b": "one"}}\n{"a": {"b": "one two"}}\n{"a": {"b": "one two three"}, "id": 3}\n'
    options = [
        "--input",
        "-",
        "--text-key",
        "a.b",
        "--recipe",
        "mine.yaml",
        "--output",
        "out",
        "--keep-metadata",
        "all",
    ]
    done = run(*options, input=text, cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert read(tmp_path / "out") == [{"text": "one two three", "a": {"b": "one two three"}, "id": 3, "score": 3.0}]
    again = run(*options, input=text, cwd=tmp_path)
    assert again.returncode == 0 and b"is complete already" in again.stderr


def test_mistakes_are_told_in_sentences(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    options = ["--input", tmp_path / "a.jsonl", "--output", tmp_path / "out"]
    for more, told in {
        ("--recipe", "wbe"): "--recipe wbe is no preset; perhaps you meant web",
        ("--recipe", "web", "--set", "language.keep"): "give STAGE.OPTION=VALUE",
        ("--recipe", "none", "--limit", "ten"): "--limit ten is not known",
        ("--recipe", "none", "--format", "csv"): "--format csv is not known",
        ("--recipe", "none", "--workers", "0"): "--workers 0 is below 1",
        ("--recipe", "none", "--max-memory-mb", "10"): "--max-memory-mb 10 is less than",
        ("--recipe", "none", "--wrokers", "2"): "perhaps you meant --workers",
        (): "--recipe is needed",
    }.items():
        done = run(*options, *more)
        assert done.returncode == 2 and told in done.stderr.decode() and "Traceback" not in done.stderr.decode()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_an_interrupted_tool_goes_on_with_the_same_command(tmp_path, number, workers):
    line = json.dumps({"text": "the cat sat on the mat and looked at the dog " * 1000}).encode() + b"\n"
    options = ["--input", "-", "--recipe", "none", "--workers", str(workers), "--output"]
    process = subprocess.Popen(
        [sys.executable, str(TOOL), *options, str(tmp_path / "out")], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    # More than a unit, after which the tool waits for what does not come.
    process.stdin.write(line * 120)
    process.stdin.flush()
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out" / ".work").glob("pass-0/*.unit")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and b"stopped; the same command goes on from here" in said
    assert b"Traceback" not in said and not (tmp_path / "out" / "report.json").exists()
    for name in ("out", "anew"):
        assert run(*options, tmp_path / name, input=line * 120).returncode == 0
    assert read(tmp_path / "out") == read(tmp_path / "anew") and len(read(tmp_path / "out")) == 120


def test_stages_are_listed():
    done = run("--list-stages")
    assert done.returncode == 0
    assert b"- of: 'document' or 'paragraph' or 'line' = 'document'" in done.stdout
    assert b"gopher_quality" in done.stdout and b"- min_words: int | None = 50" in done.stdout


def test_a_classifier_drops_offensive_text(tmp_path):
    """By the tool: what the classifier brings along has threads that this process is to be without."""
    (tmp_path / "r.yaml").write_text("stages: [harmful_classifier]")
    (tmp_path / "a.txt").write_text("you fucking idiot, go to hell\nThe harbour was described by a teacher.\n")
    options = ["--input", tmp_path / "a.txt", "--txt-documents", "line", "--recipe", tmp_path / "r.yaml"]
    done = run(*options, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr.decode()
    assert read(tmp_path / "out") == [{"text": "The harbour was described by a teacher."}]


def test_a_scorer_is_trained(tmp_path):
    tool = ROOT / "tools" / "train_scorer.py"
    (tmp_path / "good.txt").write_text("the cat sat on the mat\n" * 10)
    (tmp_path / "raw.txt").write_text("buy cheap shoes now\n" * 10)
    done = run(
        "--good", tmp_path / "good.txt", "--raw", tmp_path / "raw.txt", "--output", tmp_path / "w.npy", tool=tool
    )
    assert done.returncode == 0 and (tmp_path / "w.npy").exists(), done.stderr.decode()
    done = run(
        "--good", tmp_path / "none.txt", "--raw", tmp_path / "raw.txt", "--output", tmp_path / "w.npy", tool=tool
    )
    assert done.returncode == 2 and b"no such file" in done.stderr


WATCHED = """
import pathlib, re, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    # Not ru_maxrss, which begins with the peak of the process that started this one.
    status = pathlib.Path("/proc/self/status").read_text()
    print("peak", int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) >> 10, file=sys.stderr)
    raise
"""


def test_memory_stays_within_its_bound_on_an_input_several_times_larger(tmp_path):
    """630 MB through a process that may take 210 MiB; the text comes on standard input and packs well."""
    (tmp_path / "r.yaml").write_text("stages: [exact_duplicates]")
    (tmp_path / "watched.py").write_text(WATCHED)
    options = ["--input", "-", "--recipe", tmp_path / "r.yaml", "--output", tmp_path / "out", "--max-memory-mb", "210"]
    command = [sys.executable, tmp_path / "watched.py", TOOL, *options, "--longest-document-mb", "1"]
    said = tmp_path / "said"
    with open(said, "wb") as log:
        process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stderr=log)
        filler = b"the cat sat on the mat and looked at the dog " * 2000
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            for number in range(7_000):
                pipe.write(b'{"text": "%d %s"}\n' % (number // 2, filler))
        assert process.wait() == 0, said.read_text()
    # The tool's own limit is an estimate of what it takes: some of it is the interpreter's and the allocator's.
    assert 20 < int(said.read_text().rsplit("peak", 1)[1]) < 1.15 * 210
    assert json.loads((tmp_path / "out" / "report.json").read_bytes())["kept"] == 3500
