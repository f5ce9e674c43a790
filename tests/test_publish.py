"""A file appears whole or not at all, and what is left behind is nothing."""

from __future__ import annotations

import pytest

from megatron_lite.publish import insist_on_place, publish, published


def test_text_and_bytes_replace_what_was_there(tmp_path):
    path = tmp_path / "deep" / "file"
    for content, raw in (("ä\n", b"\xc3\xa4\n"), (b"\0", b"\0")):
        publish(path, content)
        assert path.read_bytes() == raw
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_what_was_there(tmp_path):
    publish(tmp_path / "file", "old")
    with pytest.raises(RuntimeError), published(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_place_is_looked_at_and_left_as_it_is(tmp_path):
    insist_on_place(tmp_path / "a" / "b" / "file")
    assert not list(tmp_path.iterdir())
    publish(tmp_path / "file", "")
    for path, error in ((tmp_path, IsADirectoryError), (tmp_path / "file" / "x" / "y", NotADirectoryError)):
        with pytest.raises(error):
            insist_on_place(path)
