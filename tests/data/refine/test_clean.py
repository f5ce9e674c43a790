"""Stages that repair a text: what each changes, and what it lets be."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megatron_lite.data.refine.clean import HtmlToText, MaskPersonal, RepairText, RepeatedLines, Urls, WhiteSpace
from megatron_lite.data.refine.document import Document
from megatron_lite.data.refine.harmful import HarmfulWords
from megatron_lite.data.refine.language import Language
from megatron_lite.data.refine.stage import DocumentStage
from megatron_lite.errors import DataError


def through(stage: DocumentStage, text: str, is_page: bool = False):
    """The text a stage makes, or why it drops it."""
    document = Document(text, {}, "here", 1, is_page)
    drop = stage.open(Path())(document)
    return drop.reason if drop else document.text


PAGE = """<!DOCTYPE html><html><head><title>T</title><style>p {color: red}</style></head><body>
<nav><a href="/">Home</a> <a href="/b">About us</a></nav>
<main><article><h1>Fish &amp; chips</h1><p>A dish of <b>fried fish</b> &lt;with&gt; chips, which has been sold in
England since the nineteenth century and is eaten everywhere today.</p><p>Second paragraph of the page.</p></article>
</main><script>var a = 1;</script><footer>Copyright</footer></body></html>"""


def test_pages_become_their_text():
    text = through(HtmlToText(), PAGE)
    assert "Fish & chips" in text and "fried fish <with> chips" in text and "Second paragraph" in text
    assert not [word for word in ("Home", "Copyright", "var a", "color", "<p>") if word in text]
    everything = through(HtmlToText(extractor="selectolax"), PAGE)
    assert "Home" in everything and "Fish & chips" in everything and "var a" not in everything
    assert through(HtmlToText(), "a < b is no page") == "a < b is no page"
    assert through(HtmlToText(), "<p>part of one</p>", is_page=True) == "part of one"
    assert through(HtmlToText(), "<html><body> </body></html>") == "no text"


def test_broken_text_is_repaired():
    assert through(RepairText(), "schÃ¶n â€œgutâ€\x9d") == "schön “gut”"
    assert through(RepairText(), "a\r\nb\rc\u2028d\x00\x08\ufeff") == "a\nb\nc\nd"
    assert through(RepairText(), "e\u0301") == "é"
    assert through(RepairText(normalization="NFKC"), "ﬁ ２") == "fi 2"
    assert through(RepairText(normalization="none"), "e\u0301 ﬁ") == "e\u0301 ﬁ"
    assert through(RepairText(mojibake=False), "schÃ¶n") == "schÃ¶n"
    for good in ("“Ça va?” – naïve coöperation… ©2020", "Привет, мир", "日本語", "plain"):
        assert through(RepairText(), good) == good


def test_white_space_that_means_nothing_goes():
    text = "  a \t b\u00a0c \n\n\n\n\n d  \n\te\n "
    assert through(WhiteSpace(), text) == "a b c\n\nd\ne"
    assert through(WhiteSpace(most_empty_lines=0), text) == "a b c\nd\ne"
    assert through(WhiteSpace(inside_lines=False), "\n  if a:\n      b  \n\n\n\n\n  c") == "  if a:\n      b\n\n  c"


def test_addresses_are_removed_or_replaced():
    text = "see https://example.com/a?b=c#d. Or (www.site.org/x), not e.g. this: http://[odd]"
    assert through(Urls(replacement="URL"), text) == "see URL. Or (URL), not e.g. this: http://[odd]"
    assert through(Urls(), "a http://b.c d") == "a  d"
    assert through(Urls(), "no address") == "no address"


def test_repeated_lines_are_edited_out():
    text = "a\nb\nb\n\nb\na\nc"
    assert through(RepeatedLines(), text) == "a\nb\n\na\nc"
    assert through(RepeatedLines(which="all"), text) == "a\nb\n\nc"
    assert through(RepeatedLines(which="all", min_characters=2), text) == text


def test_personal_addresses_are_masked():
    stage = MaskPersonal()
    assert through(stage, "mail jane.doe+x@mail.example.org, now") == "mail email@example.com, now"
    assert through(stage, "from 8.8.8.8:53 and 2a00:1450:4001::200e.") == "from 192.0.2.1:53 and 2001:db8::1."
    for let_be in ("127.0.0.1 and 192.168.1.1", "version 1.2.3.4.5", "18.8.8.8888", "@home", "std::vector", "12:30:45"):
        assert through(stage, let_be) == let_be
    assert through(MaskPersonal(public_only=False, ip="IP"), "at 127.0.0.1") == "at IP"


@pytest.mark.parametrize(
    "text",
    [
        "a" * 200_000,
        "a@" * 100_000,
        "1." * 100_000,
        "a." * 100_000 + "@",
        ":" * 200_000,
        " \n" * 100_000,
        "www." * 50_000,
    ],
)
def test_no_text_takes_long(text):
    """Patterns that go back and forth would take minutes here."""
    started = time.process_time()
    for stage in (MaskPersonal(), Urls(), WhiteSpace(), RepeatedLines(), RepairText()):
        through(stage, text)
    assert time.process_time() - started < 20


SAMPLES = {
    "en": "The committee met on Thursday to discuss the budget, and most of the members were in favour of the plan.",
    "de": "Der Ausschuss traf sich am Donnerstag, um den Haushalt zu besprechen, und die meisten stimmten dem Plan zu.",
    "fr": "Le comité s'est réuni jeudi pour discuter du budget et la plupart des membres étaient favorables au projet.",
    "ja": "委員会は木曜日に予算について話し合い、ほとんどの委員がその計画に賛成した。",
}


def test_languages_are_told_and_noted():
    step = Language(keep=("en", "de")).open(Path())
    for language, text in SAMPLES.items():
        document = Document(text, {}, "here", 1)
        drop = step(document)
        assert document.metadata["language"] == language and document.metadata["language_score"] > 0.65
        assert (drop is None) == (language in ("en", "de"))
    assert through(Language(keep=()), SAMPLES["ja"]) == SAMPLES["ja"]
    assert through(Language(threshold=1.0), SAMPLES["en"]) == "uncertain"
    assert through(Language(min_characters=1000), SAMPLES["en"]) == "too short to tell"
    # A heading in another language does not mislead: pieces of the whole text are looked at.
    long = SAMPLES["fr"] + " " + " ".join([SAMPLES["en"]] * 100)
    assert through(Language(characters=1000), long) == long


def test_a_list_of_words_drops_what_has_them(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("# a remark\nbadword\nvery bad  phrase # and why\n")
    stage = HarmfulWords(file=str(words))
    assert through(stage, "this has a BadWord.") == "harmful words"
    assert through(stage, "a very\nbad phrase here") == "harmful words"
    assert through(stage, "badwording is another word") == "badwording is another word"
    rare = HarmfulWords(file=str(words), at_least=2, at_least_per_thousand_words=100)
    assert through(rare, "badword once in this") == "badword once in this"
    assert through(rare, "badword and badword") == "harmful words"
    long = "badword badword " + "fine " * 100
    assert through(rare, long) == long
    for wrong in (HarmfulWords(file=str(tmp_path / "none")), HarmfulWords(file=str(tmp_path))):
        with pytest.raises(DataError, match="cannot be read"):
            wrong.prepare(tmp_path)
    assert "file is not given" in next(HarmfulWords().problems())


def test_a_missing_library_is_asked_for_by_name(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(
        DataError, match=r"the stage repair_text needs the package ftfy: pip install ftfy, or -e \.\[refine\]"
    ):
        RepairText().open(Path())
