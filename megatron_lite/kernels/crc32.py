"""The CRC-32 of zlib, ten times as fast where the processor multiplies without carry."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable

from megatron_lite.kernels import host


@functools.cache
def _implementation() -> Callable[[bytes | memoryview, int], int]:
    compiled = host.module()
    return compiled.crc32 if compiled else zlib.crc32


def crc32(data: bytes | memoryview, value: int = 0) -> int:
    """`zlib.crc32(data, value)` of a contiguous buffer. Other threads run meanwhile."""
    return _implementation()(data, value)
