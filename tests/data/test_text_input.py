"""Text in every packing gives the same documents; what is damaged is named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.data.text_blocks import Block, BlockInFile, read_blocks, to_send
from megatron_lite.data.text_documents import BadDocument, parse_block
from megatron_lite.data.text_input import Source, find_sources
from megatron_lite.data.text_streams import chunks, opened
from megatron_lite.data.work_folder import job_facts
from megatron_lite.errors import DataError

PACKINGS = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data[:500]) + gzip.compress(data[500:]),
    ".bz2": lambda data: bz2.compress(data[:500]) + bz2.compress(data[500:]),
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.compress(data[:500]) + zstandard.compress(data[500:]),
}


def documents(path: Path, block_bytes: int = 1 << 20, keys=("text",), **how) -> list:
    (source,) = find_sources([str(path)], **how)
    return [found for block in read_blocks(source, block_bytes) for found in parse_block(block, keys)]


@pytest.mark.parametrize("suffix", PACKINGS)
def test_packings_give_the_same_documents(tmp_path, suffix):
    texts = [f"document {i} é\n\n😀" for i in range(300)]
    data = "".join(json.dumps({"text": text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts)).encode()
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACKINGS[suffix](data))
    assert documents(path) == documents(path, block_bytes=64) == [(text,) for text in texts]
    (source,) = find_sources([str(path)])
    assert sum(block.read for block in read_blocks(source, 64)) == source.size == path.stat().st_size


def test_little_that_unpacks_to_much_comes_in_pieces(tmp_path):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b"ab\n") + zstandard.compress(bytes(64 << 20)) + zstandard.compress(b"end"))
    (source,) = find_sources([str(path)])
    with opened(source) as raw:
        sizes = [len(chunk) for chunk in chunks(raw, source)]
    assert sum(sizes) == (64 << 20) + 6
    assert max(sizes) <= 8 << 20


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_packed_file_that_is_cut_off_or_damaged_is_named(tmp_path, suffix):
    data = b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(3000))
    packed = PACKINGS[suffix](data)
    path = tmp_path / f"a.jsonl{suffix}"
    for cut in (packed[: len(packed) // 2], packed[:-3]):
        path.write_bytes(cut)
        with pytest.raises(DataError, match=f"a.jsonl{suffix} (ends early|cannot be read)"):
            documents(path)
    path.write_bytes(b"this is not packed")
    with pytest.raises(DataError, match=f"a.jsonl{suffix} cannot be read"):
        documents(path)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_later_stream_that_is_damaged_or_cut_off_is_no_end(tmp_path, suffix):
    pack = {".gz": gzip, ".bz2": bz2, ".xz": lzma, ".zst": zstandard}[suffix].compress
    first, second, third = (pack(b'{"text": "%d"}\n' % i * 100) for i in range(3))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(first + second + third)
    assert len(documents(path)) == 300
    for wrong in (first + b"?" + second[1:] + third, first + second[:3], first + second[:-1], first + b"more"):
        path.write_bytes(wrong)
        with pytest.raises(DataError, match=f"a.jsonl{suffix} (ends early|cannot be read)"):
            documents(path)


def test_streams_of_xz_are_padded_by_fours(tmp_path):
    stream = lzma.compress(b'{"text": "one"}\n')
    path = tmp_path / "a.jsonl.xz"
    for zeros, closing in ((4, 0), (8, 1 << 18), (1 << 18, 4)):
        path.write_bytes(stream + bytes(zeros) + stream + bytes(closing))
        assert documents(path) == [("one",)] * 2
        for wrong in (bytes(zeros + 1) + stream, bytes(closing + 3), stream + bytes(2)):
            path.write_bytes(stream + wrong)
            with pytest.raises(DataError, match=r"a\.jsonl\.xz cannot be read: \d+ zeros follow a stream"):
                documents(path)
    path.write_bytes(bytes(4) + stream)
    with pytest.raises(DataError, match=r"a\.jsonl\.xz cannot be read"):
        documents(path)
    path.write_bytes(lzma.compress(b'{"text": "of old"}\n', lzma.FORMAT_ALONE))
    assert documents(path) == [("of old",)]


@pytest.mark.parametrize("kind", [bz2, lzma])
def test_streams_come_in_small_pieces_however_packed(tmp_path, kind):
    path = tmp_path / "a"
    path.write_bytes(kind.compress(bytes(3_000_000)) * 2)
    source = Source(str(path), "file", {bz2: "bz2", lzma: "xz"}[kind])
    with opened(source) as raw:
        sizes = [len(chunk) for chunk in chunks(raw, source)]
    assert sum(sizes) == 6_000_000 and max(sizes) <= 1 << 17


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_packed_file_that_is_not_named_so_is_refused(tmp_path, suffix):
    path = tmp_path / "a"
    path.write_bytes(PACKINGS[suffix](b'{"text": "one"}\n' * 100))
    assert len(documents(path, form=f"jsonl{suffix}")) == 100
    for form, kind in (("auto", "jsonl"), ("txt", "txt"), ("html", "html")):
        with pytest.raises(DataError, match=rf"begins as {suffix[1:]} does; .* --format {kind}\{suffix}$"):
            documents(path, form=form)
    path.write_bytes(b"PAR1 of a table")
    with pytest.raises(DataError, match="give --format parquet"):
        documents(path)


@given(
    lines=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\ufeff"), max_size=12)),
    block_bytes=st.integers(1, 40),
    ends=st.sampled_from(["\n", "\r\n"]),
    closed=st.booleans(),
)
def test_cutting_into_blocks_changes_nothing(tmp_path_factory, lines, block_bytes, ends, closed):
    path = tmp_path_factory.mktemp("blocks") / "a.txt"
    path.write_bytes((ends.join(lines) + ends * closed).encode())
    expected = [(line,) for line in lines if line.encode().strip()]
    assert documents(path, block_bytes, txt_documents="line") == expected
    for kind in ("file", "paragraph"):
        assert documents(path, block_bytes, txt_documents=kind) == documents(path, txt_documents=kind)


def test_documents_of_plain_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo\r\n\r\n  \n\n three\n\nfour")
    assert documents(path) == [("one\ntwo\r\n\r\n  \n\n three\n\nfour",)]
    assert documents(path, txt_documents="line") == [("one",), ("two",), (" three",), ("four",)]
    assert documents(path, txt_documents="paragraph") == [("one\ntwo",), (" three",), ("four",)]
    path.write_bytes(b"")
    assert all(documents(path, txt_documents=kind) == [] for kind in ("file", "line", "paragraph"))


def test_suffix_tells_text_from_json(tmp_path):
    for name, kind in {
        "a.txt": "file",
        "b.md.gz": "file",
        "c.jsonl": "jsonl",
        "d.json.zst": "jsonl",
        "e": "jsonl",
    }.items():
        (tmp_path / name).touch()
        assert find_sources([str(tmp_path / name)])[0].documents == kind
    assert find_sources([str(tmp_path / "a.txt")], "jsonl")[0].documents == "jsonl"
    assert find_sources(["-"], "txt", "line")[0].documents == "line"


def test_bad_lines_are_told_apart(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = {
        b'{"text": "good"}': None,
        b"": None,
        b'{"text": "cut': "invalid JSON",
        b"[1, 2]": "not an object",
        b'{"body": "x"}': "missing key",
        b'{"text": null}': "not a string",
        b'{"text": "\xff"}': "invalid UTF-8",
        b'{"text": "\\ud800"}': "invalid UTF-8",
        b"[" * 100_000: "invalid JSON",
        b'{"text": "not a number is fine", "score": NaN}': None,
    }
    path.write_bytes(b"\n".join(lines))
    found = documents(path, block_bytes=16)
    assert [(bad.line, bad.reason) for bad in found if isinstance(bad, BadDocument)] == [
        (number, reason) for number, reason in enumerate(lines.values(), 1) if reason
    ]
    assert [text for text in found if isinstance(text, tuple)] == [("good",), ("not a number is fine",)]
    missing = next(bad for bad in found if isinstance(bad, BadDocument) and bad.reason == "missing key")
    assert missing.detail == "no key 'text'; the keys are 'body'"


@pytest.mark.parametrize(("kind", "line"), [("file", 5), ("line", 5), ("paragraph", 5)])
def test_invalid_utf8_in_plain_text_has_its_line(kind, line):
    block = Block(Source("a.txt", kind), 3, b"one\n\nok \xc3( x\nmore\n", 0)
    bad = [found for found in parse_block(block, ("text",)) if isinstance(found, BadDocument)]
    assert [(found.line, found.reason) for found in bad] == [(line, "invalid UTF-8")]


def test_inputs_are_found_or_named(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", "odd[1].jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(*patterns: str) -> list[str]:
        return [
            str(Path(source.path).relative_to(tmp_path))
            for source in find_sources([f"{tmp_path}/{p}" for p in patterns])
        ]

    assert found("*.jsonl") == ["a.jsonl", "b.jsonl", "odd[1].jsonl"]
    assert found("b.jsonl", "*/*.jsonl", "[ab].jsonl") == ["b.jsonl", "sub/c.jsonl", "a.jsonl"]
    assert found("odd[1].jsonl") == ["odd[1].jsonl"]
    assert "sub/c.jsonl" in found("**/*.jsonl") and "a.jsonl" in found("*")
    for pattern, match in {"none*": "no file matches", "su?": "matches folders alone"}.items():
        with pytest.raises(DataError, match=match):
            found(pattern)


def test_standard_input_is_no_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("-").write_bytes(b'{"text": "of the file"}\n' * 3)
    Path("piped").write_bytes(b'{"text": "of the pipe"}\n' * 3)
    with open("piped") as piped:
        monkeypatch.setattr("sys.stdin", piped)
        (source,) = find_sources(["-"])
        block, *_ = read_blocks(source, 30)
    assert b"of the pipe" in block.data and to_send(block) is block and source.size is None
    assert "modified" not in job_facts([source])["sources"][0]
    assert isinstance(to_send(next(read_blocks(*find_sources(["./-"]), 30))), BlockInFile)


def test_blocks_that_lie_in_a_file_are_read_there_by_another_process(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [b'{"text": "%d %s"}\n' % (number, b"x" * (number * 37 % 300)) for number in range(200)]
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(lines))
    blocks = list(read_blocks(Source(str(path), "jsonl"), 1000, longest=250))
    assert len(blocks) > 20 and any(block.too_long for block in blocks)
    sent = [to_send(block) for block in blocks]
    assert sum(isinstance(each, BlockInFile) for each in sent) > 20
    assert [each if isinstance(each, Block) else each.block() for each in sent] == blocks
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(b"".join(lines)))
    assert all(isinstance(to_send(block), Block) for block in read_blocks(Source(str(packed), "jsonl", "gz"), 1000))
    path.write_bytes(path.read_bytes().replace(b'"0 ', b'"1 '))
    with pytest.raises(
        DataError, match=r"a\.jsonl, line 1: the file was changed while it was read; --overwrite begins"
    ):
        sent[0].block()
