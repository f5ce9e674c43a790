"""Ids of documents as a token set has them: in its dtype, in frames of the tokens that begin and end a document."""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_lite.errors import DataError
from megatron_lite.kernels import host


@dataclasses.dataclass(frozen=True)
class Frame:
    """The ids that begin each document, and end each that is not empty then (as in Megatron), where there are any."""

    bos: int | None = None
    eod: int | None = None


def framed(
    ids: np.ndarray, lengths: np.ndarray, frame: Frame, dtype: np.dtype, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Documents end to end (int32 ids, int64 [D] lengths) in their frames: ids in `dtype`, int32 [D] lengths.

    How often each id occurs is added to `counts`, uint32 [vocabulary]. csrc/host/framed.h does the same in a fifth of
    the time, and is used where it is compiled. Raises DataError for an id outside the vocabulary, of which nothing is
    to be used then, nor of the counts.
    """
    compiled = host.module()
    if compiled is None:
        return _framed(ids, lengths, frame, dtype, counts)
    made, made_lengths, outside = compiled.framed(ids, lengths, frame.bos, frame.eod, dtype.itemsize, counts)
    if outside >= 0:
        raise _outside(outside, len(counts))
    return made.view(dtype), made_lengths.view("<i4")


def _framed(
    ids: np.ndarray, lengths: np.ndarray, frame: Frame, dtype: np.dtype, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(counts):
        raise _outside(int(ids[(ids < 0) | (ids >= len(counts))][0]) & 0xFFFFFFFF, len(counts))
    if frame.bos is not None:
        ids = np.insert(ids, np.cumsum(lengths) - lengths, frame.bos)
        lengths = lengths + 1
    if frame.eod is not None:
        filled = lengths > 0
        ids = np.insert(ids, np.cumsum(lengths)[filled], frame.eod)
        lengths = lengths + filled
    counts += np.bincount(ids, minlength=len(counts)).astype(np.uint32)
    return ids.astype(dtype), lengths.astype("<i4")


def _outside(id: int, vocab_size: int) -> DataError:
    return DataError(f"token id {id:,} is outside the vocabulary of {vocab_size:,} ids")
