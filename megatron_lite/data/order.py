"""The order of samples as arithmetic: a keyed permutation of 0 .. n - 1 that is computed, not stored.

An alternating Feistel network over the bits of an index is a permutation of a power of two below 2n;
indices that land at n or above walk on until they fall below it, which keeps it a permutation of n
(Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
"""

from __future__ import annotations

import hashlib
import json
from typing import TypeVar

import numpy as np

from megatron_lite.kernels import host

_ROUNDS = 8
_LOW32 = 0xFFFFFFFF
_LARGEST = 1 << 63

Index = TypeVar("Index", int, np.ndarray)


def keys(count: int, *name: int | str) -> list[int]:
    """`count` 32-bit numbers (at most 16) drawn from a name such as ("order", seed, "train", epoch)."""
    digest = hashlib.blake2b(json.dumps(name).encode(), digest_size=4 * count).digest()
    return np.frombuffer(digest, "<u4").tolist()


def scramble(value: Index, key: int) -> Index:
    """32 well-mixed bits of a 32-bit value and a 32-bit key; int to int, uint64 array to uint64 array.

    Two multiply-and-shift rounds, with the constants of C. Wellons' hash prospector. Products of 32-bit
    factors fit 64 bits, so plain integers and arrays agree.
    """
    value = value ^ key
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & _LOW32
    value = ((value ^ (value >> 15)) * 0x846CA68B) & _LOW32
    return value ^ (value >> 16)


class Permutation:
    """A permutation of 0 .. n - 1, the same for the same n and name; 8 rounds, 64 bytes of keys.

    Called with an int it gives an int, with an array an int64 array: `permutation(3)`,
    `permutation(np.arange(8))`. 1 <= n <= 2^63. csrc/host/permutation.h computes the same numbers, 30 times as fast
    for one index and 10 times for an array, and is used where it is compiled.
    """

    def __init__(self, n: int, *name: int | str):
        if not 1 <= n <= _LARGEST:
            raise ValueError(f"a permutation of {n} indices; 1 to 2^63 are possible")
        self.n, self._name = n, name
        # At least two bits a side: on fewer the network reaches only a few of the permutations.
        bits = max(4, (n - 1).bit_length())
        self._low_bits = bits // 2
        self._low_mask = (1 << self._low_bits) - 1
        self._high_mask = (1 << (bits - self._low_bits)) - 1
        numbers = keys(2 * _ROUNDS, *name)
        self._keys = list(zip(numbers[::2], numbers[1::2], strict=True))
        compiled = host.module()
        self._compiled = compiled.Permutation(n, numbers) if compiled else None

    def __reduce__(self) -> tuple:
        return Permutation, (self.n, *self._name)

    def _network(self, index: Index) -> Index:
        high, low = index >> self._low_bits, index & self._low_mask
        for i, (before, after) in enumerate(self._keys):
            if i % 2:
                high = high ^ ((scramble(low, before) + after) & self._high_mask)
            else:
                low = low ^ ((scramble(high, before) + after) & self._low_mask)
        return (high << self._low_bits) | low

    def __call__(self, index: Index) -> Index:
        if isinstance(index, np.ndarray):
            return self._many(index)
        if not 0 <= index < self.n:
            raise IndexError(f"index {index} of a permutation of {self.n}")
        if self._compiled:
            return self._compiled(index)
        index = self._network(index)
        while index >= self.n:
            index = self._network(index)
        return index

    def _many(self, index: np.ndarray) -> np.ndarray:
        if index.size and not 0 <= int(index.min()) <= int(index.max()) < self.n:
            raise IndexError(f"indices {index.min()} to {index.max()} of a permutation of {self.n}")
        if self._compiled:
            return self._compiled.many(index.astype(np.uint64))
        index = self._network(index.astype(np.uint64))
        outside = np.flatnonzero(index >= self.n)
        while outside.size:
            index[outside] = self._network(index[outside])
            outside = outside[index[outside] >= self.n]
        return index.astype(np.int64)
