"""Stages that repair a text: broken encodings, white space, addresses, repeated lines, personal data."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, Literal

from megatron_lite.data.refine.document import Document, Drop
from megatron_lite.data.refine.stage import DocumentStage, Step, required

_BEGINS_A_PAGE = re.compile(r"\s{0,100}<(?:!doctype\s+html|html|head|body)\b", re.I)
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\ufeff\ufffe\uffff]")
_LINE_END = re.compile("\r\n?|[\x85\u2028\u2029]")
# What is a single blank already is not matched: most of a text is left alone.
_INNER_SPACE = re.compile(r"[^\S\n]{2,}|[^\S\n ]")
_EDGES_OF_LINES = re.compile(r" \n ?|\n ")
_TRAILING_SPACE = re.compile(r"[^\S\n]+$", re.M)
_URL = re.compile(r"(?:https?|ftp)://[^\s<>\"'`\u201c\u201d()\[\]{}]+|\bwww\.[^\s<>\"'`\u201c\u201d()\[\]{}]+", re.I)
_URL_TAIL = ".,;:!?*_~"
# Bounded repetitions keep the time linear in the text.
_EMAIL = re.compile(
    r"(?<![\w.%+-])[A-Za-z0-9_%+-]{1,64}(?:\.[A-Za-z0-9_%+-]{1,64}){0,8}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"
)
_IPV4 = re.compile(r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}(?!\.?\d)")
_MAY_BE_MOJIBAKE = re.compile(r"[^\x00-\x7f\xa0©®•–—‘’“”…™]")
"""Mojibake has such characters: what begins a character in UTF-8 is a letter, not a quote, in other encodings."""
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")


@dataclasses.dataclass(frozen=True)
class HtmlToText(DocumentStage):
    """Takes the text out of pages: what is read as HTML or a web archive, and what begins as HTML does."""

    name: ClassVar[str] = "html_to_text"
    extractor: Literal["resiliparse", "selectolax"] = "resiliparse"
    """resiliparse finds the main content; selectolax takes all visible text, five times as fast."""
    main_content: bool = True
    """Without menus, side bars, footers and comments; of resiliparse alone."""
    links: bool = False
    """Keep the addresses of links; of resiliparse alone."""

    def problems(self) -> Iterator[str]:
        if self.extractor == "selectolax" and self.links:
            yield "links is of the extractor resiliparse; selectolax gives text alone."

    def open(self, folder: Path) -> Step:
        extract = self._resiliparse() if self.extractor == "resiliparse" else self._selectolax()

        def step(document: Document) -> Drop | None:
            if document.is_page or _BEGINS_A_PAGE.match(document.text):
                document.text = extract(document.text).strip()
                document.is_page = False
            return None if document.text.strip() else Drop("no text")

        return step

    def _resiliparse(self) -> Callable[[str], str]:
        library = required("resiliparse.extract.html2text", "resiliparse", self.name)
        options = {"main_content": self.main_content, "links": self.links, "alt_texts": False}
        return lambda page: library.extract_plain_text(page, preserve_formatting=True, **options)

    def _selectolax(self) -> Callable[[str], str]:
        library = required("selectolax.lexbor", "selectolax", self.name)

        def extract(page: str) -> str:
            tree = library.LexborHTMLParser(page)
            tree.strip_tags(["script", "style", "noscript", "template"])
            return tree.body.text(separator="\n", strip=True) if tree.body else ""

        return extract


@dataclasses.dataclass(frozen=True)
class RepairText(DocumentStage):
    """Undoes mojibake ("Ã©" for "é"), removes control characters, makes line ends \\n, and normalises Unicode."""

    name: ClassVar[str] = "repair_text"
    mojibake: bool = True
    """By ftfy (Speer 2019)."""
    control_characters: bool = True
    normalization: Literal["none", "NFC", "NFKC"] = "NFC"
    """NFKC also turns ligatures and full-width letters into plain ones, and ² into 2."""

    def open(self, folder: Path) -> Step:
        fix = required("ftfy", "ftfy", self.name).fix_encoding if self.mojibake else None

        def step(document: Document) -> None:
            text = document.text
            if not text.isascii():
                if fix is not None and _MAY_BE_MOJIBAKE.search(text):
                    text = fix(text)
                if self.normalization != "none":
                    text = unicodedata.normalize(self.normalization, text)
            if _LINE_END.search(text):
                text = _LINE_END.sub("\n", text)
            if self.control_characters:
                text = _CONTROL.sub("", text)
            document.text = text

        return step


@dataclasses.dataclass(frozen=True)
class WhiteSpace(DocumentStage):
    """Takes away white space that means nothing: at the ends of lines and texts, doubled, and in empty lines."""

    name: ClassVar[str] = "white_space"
    inside_lines: bool = True
    """Make any run of blanks in a line one, and begin lines at the margin; no for code, whose indentation means
    something."""
    most_empty_lines: int = 1

    def problems(self) -> Iterator[str]:
        if self.most_empty_lines < 0:
            yield f"most_empty_lines {self.most_empty_lines} is below 0; give 0 or more."

    def open(self, folder: Path) -> Step:
        most = "\n" * (self.most_empty_lines + 1)
        empty = re.compile(f"\n{{{self.most_empty_lines + 2},}}")

        def step(document: Document) -> None:
            if self.inside_lines:
                text = _EDGES_OF_LINES.sub("\n", _INNER_SPACE.sub(" ", document.text)).strip()
            else:
                text = _TRAILING_SPACE.sub("", document.text).strip("\n")
            text = empty.sub(most, text)
            document.text = text

        return step


@dataclasses.dataclass(frozen=True)
class Urls(DocumentStage):
    """Removes addresses of the web, or puts one word in the place of each."""

    name: ClassVar[str] = "urls"
    replacement: str = ""

    def open(self, folder: Path) -> Step:
        def replaced(match: re.Match) -> str:
            address = match[0]
            return self.replacement + address[len(address.rstrip(_URL_TAIL)) :]

        def step(document: Document) -> None:
            if "://" in document.text or "www." in document.text.lower():
                text = _URL.sub(replaced, document.text)
                document.text = text

        return step


@dataclasses.dataclass(frozen=True)
class RepeatedLines(DocumentStage):
    """Leaves one of lines that a document has several times."""

    name: ClassVar[str] = "repeated_lines"
    which: Literal["following", "all"] = "following"
    """following: lines equal to the one before, empty ones between them left out of account; all: to any before."""
    min_characters: int = 1
    """Shorter lines may repeat."""

    def open(self, folder: Path) -> Step:
        def step(document: Document) -> None:
            lines = document.text.split("\n")
            kept: list[str] = []
            seen: set[str] = set()
            for line in lines:
                bare = line.strip()
                if len(bare) >= max(self.min_characters, 1):
                    if bare in seen:
                        continue
                    if self.which == "following":
                        seen.clear()
                    seen.add(bare)
                elif bare and self.which == "following":
                    seen.clear()
                kept.append(line)
            if len(kept) < len(lines):
                document.text = "\n".join(kept)

        return step


@dataclasses.dataclass(frozen=True)
class MaskPersonal(DocumentStage):
    """Puts a fixed text in the place of e-mail addresses and of addresses of machines on the internet."""

    name: ClassVar[str] = "mask_personal"
    email: str = "email@example.com"
    ip: str = "192.0.2.1"
    """In place of IPv4 addresses; 2001:db8::1 in place of IPv6. Both are reserved for documentation."""
    public_only: bool = True
    """Let addresses be that mean something on a local network alone, as 127.0.0.1."""

    def open(self, folder: Path) -> Step:
        def address(match: re.Match) -> str:
            if match.start() and match.string[match.start() - 1] in "0123456789.":
                return match[0]  # the end of a longer number, as of a version
            try:
                found = ipaddress.ip_address(match[0])
            except ValueError:
                return match[0]
            if self.public_only and not found.is_global:
                return match[0]
            return self.ip if found.version == 4 else "2001:db8::1"

        def step(document: Document) -> None:
            text = document.text
            if "@" in text:
                text = _EMAIL.sub(lambda _: self.email, text)
            text = _IPV4.sub(address, text)
            if "::" in text or text.count(":") >= 7:
                text = _IPV6.sub(address, text)
            document.text = text

        return step
