"""The grammar of --input: what files, folders, patterns, addresses and data sets are read, and as what."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from megatron_lite import log
from megatron_lite.credentials import stay_in, without_credentials
from megatron_lite.data.named_sources import BY_NAME, NAMED
from megatron_lite.errors import DataError

STANDARD_INPUT = "-"
PACKINGS = ("gz", "zst", "bz2", "xz")
_FORMAT_OF_SUFFIX = {
    **dict.fromkeys(("txt", "text", "md"), "txt"),
    **dict.fromkeys(("html", "htm", "xhtml"), "html"),
    **dict.fromkeys(("jsonl", "json", "ndjson"), "jsonl"),
    "parquet": "parquet",
    "warc": "warc",
}
FORMATS = tuple(dict.fromkeys(_FORMAT_OF_SUFFIX.values()))
_DATA_SET = "hf:"

TxtDocuments = Literal["file", "line", "paragraph"]
Documents = Literal["jsonl", "file", "line", "paragraph", "html", "warc", "parquet", "dataset"]
"""What one document is: a JSON object on a line; a whole plain text, a line or a paragraph of it; a page; a response
record of a web archive; a row of a Parquet file or of a Hugging Face data set."""

KEYLESS = ("file", "line", "paragraph", "html", "warc")
"""Documents that are their text; the others are fields, of which one holds it."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One input: its path, address or data set, what a document of it is, and how it is packed.

    `text_key`: the field that holds the text, where the source itself says so.
    """

    path: str
    documents: Documents
    packing: str = ""
    text_key: str | None = None

    @property
    def name(self) -> str:
        """What messages, documents and reports call it: its path or address without credentials."""
        return "standard input" if self.path == STANDARD_INPUT else without_credentials(self.path)

    @property
    def is_file(self) -> bool:
        """Whether it is a local file: standard input is none, whatever has its name."""
        return self.path != STANDARD_INPUT and os.path.isfile(self.path)

    @property
    def size(self) -> int | None:
        """Bytes on disk; None for what is no local file."""
        return os.stat(self.path).st_size if self.is_file else None

    @property
    def is_repeatable(self) -> bool:
        """Whether it gives the same once more: it is no pipe and not standard input."""
        return self.path != STANDARD_INPUT and (os.path.isfile(self.path) or not os.path.exists(self.path))

    @property
    def is_remote(self) -> bool:
        """Whether fsspec opens it."""
        return _is_address(self.path)

    def place(self, number: int) -> str:
        """The name of its line, row or record of that number, counted from 1."""
        kind = {"warc": "record", "parquet": "row", "dataset": "row"}.get(self.documents, "line")
        return f"{self.name}, {kind} {number}"


def format_problems(text: str) -> list[str]:
    """What is wrong with a --format, one sentence each."""
    kind, _, packing = text.partition(".")
    if kind not in ("auto", *FORMATS) or (packing and packing not in PACKINGS) or text.endswith("."):
        return [
            f"--format {text} is not known; give auto, {', '.join(FORMATS)}, with .{', .'.join(PACKINGS)} behind it "
            "for packed input whose name does not end so, as in jsonl.gz."
        ]
    return []


def find_sources(
    patterns: Sequence[str], form: str = "auto", txt_documents: TxtDocuments = "file", own: Sequence[str] = ()
) -> list[Source]:
    """The inputs that paths, patterns, folders and addresses name, in the order given, by name within one.

    `form` is a --format. By "auto" the suffix tells, and what has none that is known is JSON lines. Files in folders
    and of patterns whose paths begin as one of `own`, what the job itself writes, are left out, which is said. Raises
    DataError for a pattern without a file.
    """
    found: list[Source] = []
    for pattern in patterns:
        found += _expand(pattern, form, txt_documents, own)
    if not found:
        raise DataError(f"{' '.join(patterns)} matches folders alone; name files, as in 'FOLDER/**/*.jsonl'")
    sources = list({source.path: source for source in found}.values())
    if len(sources) < len(found):
        log.warn(f"{len(found) - len(sources)} inputs are named more than once and read once")
    return sources


def warn_of_pages(sources: Sequence[Source]) -> None:
    """Say that pages are read with their tags, where nothing takes the text out of them."""
    page = next((source for source in sources if source.documents in ("html", "warc")), None)
    if page is not None:
        log.warn(f"{page.name} is read as it stands, tags and all; tools/refine_data.py takes the text out of pages")


def _expand(pattern: str, form: str, txt_documents: TxtDocuments, own: Sequence[str]) -> list[Source]:
    if pattern.startswith(NAMED):
        return _named(pattern)
    if pattern.startswith(_DATA_SET):
        if not pattern.removeprefix(_DATA_SET).partition(":")[0]:
            raise DataError(f"{pattern} names no data set; give hf:NAME, hf:NAME:CONFIG:SPLIT or hf:FOLDER")
        return [Source(pattern, "dataset")]
    if _is_address(pattern):
        paths = _remote_paths(pattern)
    elif pattern == STANDARD_INPUT or os.path.isfile(pattern):
        paths = [pattern]
    elif os.path.isdir(pattern):
        paths = _inside(pattern, _foreign(_files_below(pattern), own))
    elif os.path.exists(pattern):  # a pipe or a device
        paths = [pattern]
    else:
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise DataError(f"{pattern}: no such file, and no file matches it as a pattern")
        paths = _foreign([path for path in matches if not os.path.isdir(path)], own)
    return [_source(path, form, txt_documents) for path in paths]


def _files_below(folder: str) -> list[str]:
    """The files in a folder and in those inside it, linked ones too, by name; links that lead nowhere are among them.

    A folder counts once, by its own name where it lies inside, so that links may lead round. Hidden ones do not.
    """
    files: list[str] = []
    seen: set[tuple[int, int]] = set()
    tops = [str(Path(folder))]
    for top in tops:
        for here, folders, names in os.walk(top, onerror=_warn_of_folder):
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            paths = [os.path.join(here, name) for name in folders]
            tops += filter(os.path.islink, paths)
            paths = [str(Path(here, name)) for name in names]
            files += [path for path in paths if os.path.isfile(path) or not os.path.exists(path)]
    return sorted(files)


def _warn_of_folder(error: OSError) -> None:
    log.warn(f"{error.filename} is left out: it cannot be read: {error.strerror}")


def _foreign(paths: list[str], own: Sequence[str]) -> list[str]:
    """The paths that do not begin as one of `own`."""
    begins = tuple(os.path.abspath(path) + "/" * path.endswith("/") for path in own)
    left = [path for path in paths if os.path.abspath(path).startswith(begins)]
    if left:
        log.note(f"{len(left):,} files that the job itself writes are not read, as {left[0]}")
    return [path for path in paths if path not in set(left)]


def _inside(folder: str, paths: list[str]) -> list[str]:
    """The files of a folder that hold text by their suffix; what is left out is said aloud."""
    shown = [path for path in paths if not any(part.startswith(".") for part in _relative(path, folder))]
    taken = [path for path in shown if _suffixes(path)[0] in _FORMAT_OF_SUFFIX]
    if not taken:
        raise DataError(
            f"{folder} is a folder without a file of text (.{', .'.join(_FORMAT_OF_SUFFIX)}, also packed); "
            f"name its files, as in '{folder}/*'"
        )
    if len(taken) < len(shown):
        left = next(path for path in shown if path not in set(taken))
        log.note(f"{folder}: {len(shown) - len(taken):,} files are no text by their suffix and left out, as {left}")
    return taken


def _relative(path: str, folder: str) -> tuple[str, ...]:
    return PurePosixPath(path).relative_to(folder).parts if path.startswith(folder) else (PurePosixPath(path).name,)


def _is_address(text: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", text) is not None


def _remote_paths(address: str) -> list[str]:
    if address.startswith(("http://", "https://")):
        return [address]  # without a way to list: "?" belongs to the query
    with reading(address):
        system, path = _file_system(address)
        if re.search(r"[*?[]", address):
            found = sorted(system.glob(path))
        elif system.isdir(path):
            found = _inside(path, sorted(system.find(path)))
        else:
            return [address]
    if not found:
        raise DataError(f"{address}: no file matches it as a pattern")
    return [system.unstrip_protocol(path) for path in found]


def _file_system(address: str) -> tuple[Any, str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(address)
    except ValueError as error:
        raise DataError(f"{address}: {error}") from None
    if stay_in(path):
        raise DataError(
            f"{address} has credentials, and addresses of this kind take none; leave them to the environment "
            "or a file of the service"
        )
    return system, path


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Errors of opening and reading in this block become a DataError that names the source and the way out."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise DataError(f"{name} needs the package {error.name}: pip install {error.name}") from None
    except ImportError as error:
        raise DataError(f"{name} needs a package: {error}") from None
    except EOFError as error:
        raise DataError(f"{name} ends early ({error}); it is truncated, copy it again") from None
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}") from None
    except Exception as error:
        # A service has errors of its own kinds, with the address in them.
        if not _is_address(name) or isinstance(error, DataError):
            raise
        raise DataError(f"{name} cannot be read: {type(error).__name__}: {error}") from None


def _named(pattern: str) -> list[Source]:
    name = pattern.removeprefix(NAMED)
    if name not in BY_NAME:
        known = "; ".join(f"{key} ({entry.what})" for key, entry in BY_NAME.items())
        raise DataError(f"{pattern}: there is no source of that name; there are {known}")
    entry = BY_NAME[name]
    log.note(f"{pattern} is {entry.input}: {entry.what}; its text is in {entry.text_key!r}")
    return [dataclasses.replace(source, text_key=entry.text_key) for source in _expand(entry.input, "auto", "file", ())]


def _suffixes(path: str) -> tuple[str, str]:
    """The suffix that tells the format and the one that tells the packing, each without its dot or empty."""
    if _is_address(path):
        path = urllib.parse.urlsplit(path).path
    name = PurePosixPath(path)
    packing = name.suffix.lower().removeprefix(".")
    if packing in PACKINGS:
        return name.with_suffix("").suffix.lower().removeprefix("."), packing
    return packing, ""


def _source(path: str, form: str, txt_documents: TxtDocuments) -> Source:
    kind, _, packing = form.partition(".")
    suffix, packed = _suffixes(path)
    if kind == "auto":
        kind = _FORMAT_OF_SUFFIX.get(suffix, "jsonl")
    return Source(path, txt_documents if kind == "txt" else kind, packing or packed)
