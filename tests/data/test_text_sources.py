"""The grammar of --input: folders, addresses, archives, tables, data sets, names; and limits on what is read."""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import fsspec
import pyarrow
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from megatron_lite.data.text_blocks import Limit, limited, parse_limit, read_blocks
from megatron_lite.data.text_documents import BadDocument, decoded_page, parse_block, parse_records
from megatron_lite.data.text_input import Source, find_sources, format_problems, warn_of_pages
from megatron_lite.errors import ConfigError, DataError

REPOSITORY = Path(__file__).parents[2]


def read(*inputs: str, form="auto", keys=("text",), block_bytes=1 << 20, limit=Limit(), longest=None, **how) -> list:  # noqa: B008
    blocks = itertools.chain.from_iterable(
        read_blocks(source, block_bytes, keys, longest) for source in find_sources(inputs, form, **how)
    )
    return [found for block in limited(blocks, limit) for found in parse_block(block, keys)]


def jsonl(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def test_a_folder_is_its_files_of_text_in_order(tmp_path, capsys):
    (tmp_path / "b.jsonl").write_bytes(jsonl("3"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl.gz").write_bytes(gzip.compress(jsonl("1", "2")))
    (tmp_path / "c.txt").write_text("4")
    (tmp_path / "picture.png").write_bytes(b"no text")
    (tmp_path / ".hidden.jsonl").write_bytes(jsonl("hidden"))
    assert read(str(tmp_path)) == [("1",), ("2",), ("3",), ("4",)]
    assert "1 files are no text by their suffix and left out, as" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is a folder without a file of text"):
        read(str(tmp_path / "empty"))


def test_a_folder_is_read_through_links(tmp_path, capsys, monkeypatch):
    for name in ("there/shard/b.jsonl", "corpus/a.jsonl", "corpus/own/c.jsonl", "corpus/.v1/d.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jsonl(Path(name).stem))
    corpus = tmp_path / "corpus"
    for name, target in {
        "linked": "../there/shard",
        "current": ".v1",
        "back": ".",
        "also": "own",
        "own/up": "..",
        "round": "round",
        "e.jsonl": "a.jsonl",
        ".#a.jsonl": "nowhere",
    }.items():
        (corpus / name).symlink_to(target)
    expected = ["a.jsonl", "current/d.jsonl", "e.jsonl", "linked/b.jsonl", "own/c.jsonl"]
    monkeypatch.chdir(tmp_path)
    for folder in (corpus, "corpus", "./corpus/"):
        found = [source.path for source in find_sources([str(folder)])]
        assert found == [str(Path(folder, name)) for name in expected]
    (corpus / "lost.jsonl").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"lost\.jsonl cannot be read: No such file"):
        read("corpus")


def test_a_folder_that_cannot_be_looked_into_is_told(tmp_path, capsys, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.jsonl").write_bytes(jsonl("1"))
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert read(str(tmp_path)) == [("1",)]
    assert "closed is left out: it cannot be read: Permission denied" in capsys.readouterr().err


def test_a_format_says_what_a_name_does_not(tmp_path):
    path = tmp_path / "dump"
    path.write_bytes(zstandard.compress(b"<p>page</p>"))
    assert read(str(path), form="html.zst") == [("<p>page</p>",)]
    assert not format_problems("jsonl.gz") and not format_problems("auto") and not format_problems("warc")
    for wrong in ("csv", "jsonl.zip", "jsonl."):
        assert "is not known; give auto, txt, html, jsonl" in format_problems(wrong)[0]


def test_an_address_is_opened_by_fsspec():
    system = fsspec.filesystem("memory")
    system.pipe("/corpus/a.jsonl", jsonl("1"))
    system.pipe("/corpus/b.jsonl.gz", gzip.compress(jsonl("2", "3")))
    system.pipe("/corpus/c.bin", b"no text")
    try:
        assert read("memory://corpus/a.jsonl") == [("1",)]
        assert read("memory://corpus/*.jsonl*") == read("memory://corpus") == [("1",), ("2",), ("3",)]
        with pytest.raises(DataError, match="no file matches it"):
            read("memory://corpus/*.txt")
        with pytest.raises(DataError, match=r"memory://corpus/missing\.jsonl cannot be read"):
            read("memory://corpus/missing.jsonl")
        with pytest.raises(DataError, match="Protocol not known: nowhere"):
            read("nowhere://a.jsonl")
    finally:
        system.rm("/corpus", recursive=True)


def test_a_dotted_path_leads_into_an_object_unless_a_key_has_its_name(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": {"b": "in"}}\n{"a.b": "plain", "a": {"b": "in"}}\n{"a": "text"}\n')
    found = read(str(path), keys=("a.b",))
    assert found[:2] == [("in",), ("plain",)]
    assert isinstance(found[2], BadDocument) and found[2].detail == "no key 'a.b'; the keys are 'a'"


def test_pages_are_not_taken_for_text_in_silence(capsys):
    warn_of_pages(find_sources(["hf:a/b"]))
    assert not capsys.readouterr().err
    warn_of_pages([Source("a.html", "html")])
    assert "a.html is read as it stands, tags and all; tools/refine_data.py" in capsys.readouterr().err


def test_a_page_is_read_in_the_charset_it_names():
    assert decoded_page("é".encode()) == "é"
    assert decoded_page(b'<meta charset="iso-8859-2">\xe8') == '<meta charset="iso-8859-2">č'
    assert decoded_page(b"\xe8", "iso-8859-5") == "ш"
    assert decoded_page(b"\x93quoted\x94", "no-such-charset") == "“quoted”"
    for odd in ("undefined", "punycode", "idna", "a\0b", "unicode_escape\0", "base64"):
        assert decoded_page("é".encode(), odd) == "é" and decoded_page(b"\xe8", odd) == "è"
    assert decoded_page(b"+2AA-", "utf-7") == "+2AA-"
    assert decoded_page(b'<meta charset="utf-7">\xe8+2AA-') == '<meta charset="utf-7">è+2AA-'


def archive(*bodies: bytes, kind=b"response", content_type=b"text/html; charset=ISO-8859-1", more=b"") -> bytes:
    records = []
    for number, body in enumerate(bodies):
        http = b"HTTP/1.1 200 OK\r\nContent-Type: " + content_type + b"\r\n" + more + b"\r\n" + body
        records.append(
            b"WARC/1.0\r\nWARC-Type: %s\r\nWARC-Target-URI: http://site/%d\r\nWARC-Date: 2026-01-01T00:00:00Z\r\n"
            b"Content-Type: application/http; msgtype=response\r\nContent-Length: %d\r\n\r\n"
            % (kind, number, len(http))
            + http
            + b"\r\n\r\n"
        )
    return b"".join(records)


def test_a_web_archive_gives_its_pages(tmp_path):
    path = tmp_path / "crawl.warc.gz"
    parts = [
        archive(b"asked", kind=b"request"),
        archive(b"<p>caf\xe9</p>", b"<p>two\r\n\r\nWARC/1.0\r\n</p>"),
        archive(b"\x89PNG", content_type=b"image/png"),
        archive(b"<p>last</p>"),
    ]
    path.write_bytes(b"".join(map(gzip.compress, parts)))
    expected = [("<p>café</p>",), ("<p>two\r\n\r\nWARC/1.0\r\n</p>",), ("<p>last</p>",)]
    assert read(str(path)) == read(str(path), block_bytes=1) == expected
    (source,) = find_sources([str(path)])
    first = next(iter(parse_records(next(block for block in read_blocks(source, 1) if block.first_line == 2))))
    assert (first.line, first.fields) == (2, {"url": "http://site/0", "date": "2026-01-01T00:00:00Z"})
    assert read(str(path), limit=Limit(documents=2)) == expected[:2]
    assert [type(found) for found in read(str(path), block_bytes=1, longest=90)] == [tuple, BadDocument, tuple]
    whole = b"".join(parts)
    path.write_bytes(gzip.compress(whole[:-20]))
    with pytest.raises(DataError, match="record 5 ends early"):
        read(str(path))
    path.write_bytes(gzip.compress(whole + b"something else"))
    with pytest.raises(DataError, match="record 6 does not begin as a record"):
        read(str(path))


@pytest.mark.parametrize(
    "lie", ["Content-Encoding: gzip", "Content-Encoding: deflate", "Content-Encoding: br", "Transfer-Encoding: chunked"]
)
def test_a_body_that_is_not_what_its_headers_say_is_one_bad_document(tmp_path, lie):
    path = tmp_path / "crawl.warc"
    lying = archive(b"<p>a plain body</p>", more=lie.encode() + b"\r\n")
    picture = lying.replace(b"text/html; charset=ISO-8859-1", b"image/png; name=an-image.png1")
    path.write_bytes(archive(b"first") + archive(b"asked", kind=b"request") + lying + picture + archive(b"last"))
    first, bad, last = read(str(path))
    assert (first, last) == (("first",), ("last",))
    assert (bad.line, bad.reason) == (3, "damaged body")


def test_rows_of_parquet(tmp_path):
    rows = [{"text": f"row {i}", "meta": {"url": f"u{i}"}, "data": b"\xff"} for i in range(1000)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
    assert read(str(path), block_bytes=200) == [(row["text"],) for row in rows]
    assert read(str(path), keys=("meta.url",)) == [(row["meta"]["url"],) for row in rows]
    packed = tmp_path / "b.parquet.zst"
    packed.write_bytes(zstandard.compress(path.read_bytes()))
    assert read(str(packed), limit=Limit(documents=3)) == [("row 0",), ("row 1",), ("row 2",)]
    path.write_bytes(b"no table")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        read(str(path))


def test_a_row_that_is_no_utf8_is_one_bad_document(tmp_path):
    texts = pyarrow.array([b"one", b"t\n\xffwo", "drei é".encode()], pyarrow.binary())
    spoilt = pyarrow.StringArray.from_buffers(3, texts.buffers()[1], texts.buffers()[2])
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": spoilt, "other": ["1", "2", "3"]}), path)
    first, bad, last = read(str(path))
    assert (first, last) == (("one",), ("drei é",))
    assert (bad.line, bad.reason, bad.detail) == (2, "invalid UTF-8", "byte 0xff: invalid start byte")
    assert read(str(path), keys=("other",)) == [("1",), ("2",), ("3",)]


@pytest.mark.parametrize("damage", [ValueError("a wrong line"), KeyError("a"), pyarrow.ArrowNotImplementedError("no")])
def test_a_data_set_that_is_damaged_further_on_is_named(monkeypatch, damage):
    def load_dataset(*arguments, **options):
        yield {"text": "good"}
        raise damage

    errors = types.SimpleNamespace(DatasetsError=RuntimeError)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, exceptions=errors))
    with pytest.raises(DataError, match="hf:owner/name cannot be read: "):
        read("hf:owner/name")


def test_data_sets_are_streamed_and_names_stand_for_them(monkeypatch, capsys):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return ({"text": f"row {i}", "content": f"code {i}"} for i in range(10**12))

    errors = types.SimpleNamespace(DatasetsError=RuntimeError)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, exceptions=errors))
    assert read("hf:owner/name:en:validation", limit=Limit(documents=2)) == [("row 0",), ("row 1",)]
    assert read("hf:owner/name", limit=Limit(documents=1)) == [("row 0",)]
    assert read("source:code", limit=Limit(documents=1)) == [("code 0",)]
    assert asked[:2] == [
        (("owner/name", "en"), {"split": "validation", "streaming": True}),
        (("owner/name", None), {"split": "train", "streaming": True}),
    ]
    assert "source:code is hf:codeparrot/codeparrot-clean" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"there is no source of that name; there are web \("):
        read("source:none")
    for nameless in ("hf:", "hf::en"):
        with pytest.raises(DataError, match=f"{nameless} names no data set; give hf:NAME"):
            find_sources([nameless])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="hf:owner/name needs the package datasets: pip install datasets"):
        read("hf:owner/name")


OF_FOLDERS = """
import sys

import datasets

from megatron_lite.data.text_blocks import read_blocks
from megatron_lite.data.text_documents import texts_of
from megatron_lite.data.text_input import find_sources
from megatron_lite.errors import DataError

rows, more = (datasets.Dataset.from_list([{"text": text} for text in texts]) for texts in ("12", "3"))
rows.save_to_disk("stored")
datasets.DatasetDict(train=rows, test=more).save_to_disk("divided")
for name in ("stored", "stored::train", "divided", "divided::test", "files", "files::train", "files::test", "none"):
    (source,) = find_sources([f"hf:{name}"])
    try:
        print(name, *texts_of(read_blocks(source), ["text"]))
    except DataError as error:
        print(name, error)
"""


def test_data_sets_in_folders(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.jsonl").write_bytes(jsonl("4"))
    # A process of its own: the library starts threads, and keeps copies where these variables say.
    ours = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", OF_FOLDERS], cwd=tmp_path, env=os.environ | ours, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *found, wrong_split, no_folder = done.stdout.splitlines()
    assert found == ["stored 1 2", "stored::train 1 2", "divided 1 2", "divided::test 3", "files 4", "files::train 4"]
    assert wrong_split.startswith("files::test hf:files::test cannot be opened: ")
    assert no_folder.startswith("none hf:none cannot be")


def test_a_limit_is_a_count_or_a_size():
    assert parse_limit("10_000") == Limit(documents=10_000)
    assert parse_limit("1.5kB") == parse_limit("1500B") == Limit(bytes=1500)
    assert parse_limit("2GiB") == Limit(bytes=2 << 30) and parse_limit("1MB") == Limit(bytes=10**6)
    assert parse_limit(None) == Limit()
    for wrong in ("ten", "5M", "0", "1.5", "-1", "2 apples", ""):
        with pytest.raises(ConfigError, match="--limit"):
            parse_limit(wrong)


@given(
    texts=st.lists(st.sampled_from(["", " ", "a", "bb", "ccc dd", "é", "\t\r"]), max_size=12),
    block_bytes=st.integers(1, 40),
    count=st.integers(1, 8),
    kind=st.sampled_from(["line", "paragraph", "jsonl"]),
)
def test_a_limit_does_not_depend_on_blocks(tmp_path_factory, texts, block_bytes, count, kind):
    path = tmp_path_factory.mktemp("limit") / "a.txt"
    ends = {"line": "\n", "paragraph": "\n\n", "jsonl": "\n"}[kind]
    path.write_text(ends.join(f'{{"text": "{text.strip()}"}}' if kind == "jsonl" else text for text in texts))
    how = {"form": "jsonl"} if kind == "jsonl" else {"txt_documents": kind}
    everything = read(str(path), **how)
    assert read(str(path), block_bytes=block_bytes, limit=Limit(documents=count), **how) == everything[:count]
    by_size = read(str(path), block_bytes=block_bytes, limit=Limit(bytes=count), **how)
    assert by_size == read(str(path), limit=Limit(bytes=count), **how) == everything[: len(by_size)]


def test_a_limit_on_bytes_takes_documents_that_begin_within_it(tmp_path):
    path = Path(tmp_path / "a.txt")
    path.write_text("aaaa\nbbbb\ncccc\n")
    for size, lines in {1: 1, 5: 1, 6: 2, 10: 2, 11: 3, 100: 3}.items():
        assert len(read(str(path), limit=Limit(bytes=size), txt_documents="line")) == lines


@pytest.mark.parametrize("block_bytes", [10, 1 << 20])
def test_a_document_that_is_too_long_is_told_and_not_held(tmp_path, block_bytes):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl("1") + jsonl("x" * 3_000_000) + jsonl("2"))
    first, long, last = read(str(path), block_bytes=block_bytes, longest=1_000_000)
    assert (first, last) == (("1",), ("2",))
    assert (long.line, long.reason) == (2, "too long")
    path.write_bytes(jsonl("x" * 3_000_000))
    (only,) = read(str(path), block_bytes=block_bytes, longest=1_000_000)
    assert (only.line, only.reason) == (1, "too long")


@pytest.mark.parametrize("block_bytes", [10, 1 << 20])
@pytest.mark.parametrize("blank", ["\n\n", "\n \t\r\n", "\n" + " " * 300_000 + "\n"])
def test_a_paragraph_that_is_too_long_is_dropped_whole(tmp_path, block_bytes, blank):
    path = tmp_path / "a.txt"
    long = "a line of many\n" * 60_000
    path.write_text(f"one\n\n{long}its tail{blank}two\n\nthree")
    first, bad, *rest = found = read(str(path), block_bytes=block_bytes, longest=500_000, txt_documents="paragraph")
    assert [first, *rest] == [("one",), ("two",), ("three",)], found
    assert (bad.line, bad.reason) == (3, "too long")
    (source,) = find_sources([str(path)], "auto", txt_documents="paragraph")
    records = parse_records(list(read_blocks(source, block_bytes, longest=500_000))[-1])
    assert list(records)[-1].line == 3 + 60_000 + 4
    path.write_text(long)
    (only,) = read(str(path), block_bytes=block_bytes, longest=500_000, txt_documents="paragraph")
    assert (only.line, only.reason) == (1, "too long")
