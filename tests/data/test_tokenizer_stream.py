"""Text out of tokens that arrive one at a time: the same as of all at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import ENGLISH, HARD, KINDS

from megatron_lite.data.tokenizer_stream import StreamDecoder


def streamed(tokenizer, ids, skip_special=True) -> list[str]:
    stream = StreamDecoder(tokenizer, skip_special)
    return [*(stream.push(id) for id in ids), stream.finish()]


@pytest.mark.parametrize("skip_special", [True, False])
def test_stream_joins_to_the_decoded_text(tokenizer, skip_special):
    for text in [*HARD, ENGLISH[0][:1500]]:
        ids = tokenizer.encode(text)
        ids = [*ids[:7], tokenizer.eod, *ids[7:]]
        assert "".join(streamed(tokenizer, ids, skip_special)) == tokenizer.decode(ids, skip_special)


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
def test_stream_of_any_ids_joins_to_the_decoded_text(built, name, data):
    tokenizer = built[name]
    common = st.integers(0, min(tokenizer.vocab_size, 700) - 1)
    ids = data.draw(st.lists(common | st.sampled_from(tokenizer.encode("日 é😀 x")), max_size=40))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@given(
    ids=st.lists(st.sampled_from([0x41, 0x80, 0xBD, 0xA0, 0xC3, 0xE4, 0xED, 0xF0, 0x9F, 0x98, 0xFF, 256]), max_size=24)
)
def test_stream_of_broken_bytes(built, ids):
    assert "".join(streamed(built["byte"], ids)) == bytes(i for i in ids if i < 256).decode(errors="replace")


def test_stream_tells_a_character_with_its_last_byte(built):
    assert streamed(built["byte"], "a€b".encode()) == ["a", "", "", "€", "b", ""]
    assert streamed(built["byte"], "€".encode()[:2]) == ["", "", "\ufffd"]
    garbage = streamed(built["byte"], [0x80] * 10)
    assert "".join(garbage[:-1]) == "\ufffd" * 7 and garbage[-1] == "\ufffd" * 3
