"""The report: counts that add up, a page that is well-formed and draws what the counts say."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_lite.data.refine.job import RefineJob, refine
from megatron_lite.data.refine.recipe import parse_recipe
from megatron_lite.data.refine.tally import SAMPLES, StageTally

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and keeps bars and texts."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.bars: list[tuple[float, float, float]] = []
        self.titles: list[str] = []
        self.words = ""
        self.text = text
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert not {"src", "href", "onload"} & set(values), "nothing is loaded"
        if tag == "rect":
            self.bars.append((float(values["y"]), float(values["x"]), float(values["width"])))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "title":
            self.titles.append(data)
        self.words += data


def test_a_stage_that_fails_on_all_it_sees_is_told(tmp_path, capsys):
    def told(*stages: str) -> str:
        (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "none"}\n')
        stages = parse_recipe(f"stages: [{', '.join(stages)}]", "r")
        refine(RefineJob((str(tmp_path / "a.jsonl"),), str(tmp_path / "out"), stages, overwrite=True))
        return capsys.readouterr().err

    fails, short = "score: {function: 'json:loads'}", "length: {max_words: 9}"
    assert "score set aside all of the 2 documents it saw, as " in told(short, fails, "exact_duplicates")
    assert "a.jsonl:1: JSONDecodeError: " in told("length: {max_characters: 3}", fails)
    assert "set aside all" not in told(short, "exact_duplicates")
    assert "set aside all" not in told("length: {min_characters: 9}", fails)


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    texts = ["<script>alert('short')</script>", "x" * 50] * 6 + [f"document {i} " * 20 for i in range(20)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "bad\n")
    recipe = "stages: [length: {min_words: 3, max_characters: 10000}, exact_duplicates, length: {min_words: 41}]"
    job = RefineJob((str(folder / "a.jsonl"),), str(folder / "out"), parse_recipe(recipe, "r"))
    refine(job)
    return folder / "out"


def test_the_page_draws_the_counts(output):
    report = json.loads((output / "report.json").read_bytes())
    page = Page((output / "report.html").read_text())
    rows = sorted({y for y, _, _ in page.bars})
    assert len(rows) == len(report["stages"]) == 4
    scale = next(width for y, _, width in page.bars if y == rows[0]) / report["stages"][0]["kept"]
    for row, stage in zip(rows, report["stages"], strict=True):
        bars = sorted((x, width) for y, x, width in page.bars if y == row)
        assert sum(width for _, width in bars) == pytest.approx(stage["documents"] * scale, abs=0.1)
        for (x, width), (following, _) in itertools.pairwise(bars):
            assert x + width == pytest.approx(following, abs=0.02)
    assert "too few words: 12 (37.5%)" in page.titles
    why = re.findall(r'<td>(\w+)</td><td>([^<]+)</td><td class="bar"><div style="width:([\d.]+)%', page.text)
    counts = [(n, stage["name"], reason) for stage in report["stages"] for reason, n in stage["dropped"].items()]
    assert len(why) == len(counts) == 3
    most = max(counts)[0]
    for (*named, width), (count, *expected) in zip(why, sorted(counts, reverse=True), strict=True):
        assert named == expected and float(width) == pytest.approx(100 * count / most, abs=0.1)
    assert "33 documents were read" in page.words and f"{report['kept']} kept" in page.words


def test_what_a_stage_failed_on_is_shown(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "ZERO & <b>"}\n')
    recipe = parse_recipe("stages: [score: {function: 'stages_for_tests:fails'}]", "r")
    refine(RefineJob((str(tmp_path / "a.jsonl"),), str(tmp_path / "out"), recipe))
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert "1 kept, 1 set aside" in page.words and "the stage failed: 1 (50.0%)" in page.titles
    assert "a.jsonl:2: ZeroDivisionError: division by zero" in page.words and "ZERO &amp; &lt;b&gt;" in text


def test_samples_of_what_was_dropped_are_shown_and_cannot_run(output):
    text = (output / "report.html").read_text()
    assert "<script" not in text and "&lt;script&gt;alert(" in text
    assert re.search(r"a\.jsonl:\d+: 1 &lt; 3", text)
    report = json.loads((output / "report.json").read_bytes())
    assert len(report["stages"][1]["samples"]["too few words"]) == SAMPLES


def test_samples_are_the_same_however_documents_are_shared_out():
    def tally_of(places) -> StageTally:
        tally = StageTally()
        for place in places:
            tally.drop("why", "", f"file:{place}", f"text {place}")
        return tally

    whole = tally_of(range(100)).plain()
    for size in (1, 7, 50):
        parts = StageTally()
        for start in reversed(range(0, 100, size)):
            parts.add(json.loads(json.dumps(tally_of(range(start, min(start + size, 100))).plain())))
        assert parts.plain() == whole
