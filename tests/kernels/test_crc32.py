"""zlib's checksum, computed faster."""

import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.kernels import host
from megatron_lite.kernels.crc32 import crc32

BYTES = bytes(range(256)) * 5


def test_the_compiled_one_is_used():
    assert hasattr(host.module(), "crc32")


@pytest.mark.parametrize("value", [0, 1, 0xFFFFFFFF])
def test_every_length_and_alignment(value):
    for size in [*range(300), 1100]:
        for first in range(3):
            part = memoryview(BYTES)[first : first + size]
            assert crc32(part, value) == zlib.crc32(part, value)


@given(st.binary(max_size=3000), st.integers(0, 2**32 - 1), st.integers(0, 3000))
def test_it_goes_on_from_the_bytes_before(data, value, cut):
    assert crc32(data[cut:], crc32(data[:cut], value)) == zlib.crc32(data, value)


def test_a_buffer_with_gaps_is_refused():
    with pytest.raises((ValueError, BufferError)):
        crc32(memoryview(BYTES)[::2])


def test_threads_that_ask_at_once_load_it_once(monkeypatch):
    """To a second one a module that is being initialised would be there, and empty."""
    loads = []

    def load():
        loads.append(threading.get_ident())
        time.sleep(0.2)
        return host

    monkeypatch.setattr(host, "_load", load)
    host._module.cache_clear()
    try:
        with ThreadPoolExecutor(4) as pool:
            found = [asked.result() for asked in [pool.submit(host.module) for _ in range(4)]]
    finally:
        host._module.cache_clear()
    assert found == [host] * 4 and len(loads) == 1
