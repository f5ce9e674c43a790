"""Token files: a `.bin` of raw tokens and an `.idx` that says where sequences and documents lie.

The format is Megatron's MMIDIDX, version 1. `PREFIX.idx`, little-endian and unaligned: the magic
`MMIDIDX\\0\\0`; u64 version; u8 token dtype code; u64 N sequences; u64 D documents + 1; i32[N] lengths in
tokens; i64[N] byte pointers; i64[D] first sequence of each document, closed by N; in multimodal sets
i8[N] modes, which are not read.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import mmap
import os
import secrets
import struct
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lite.data.token_documents import places
from megatron_lite.errors import DataError
from megatron_lite.kernels import host

MAGIC = b"MMIDIDX\x00\x00"
_LEGACY_MAGIC = b"TNTIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
# 9 and 10 are Megatron-DeepSpeed's own. 6 and 7 are the two floats, which GPT-NeoX swaps.
_DTYPE_OF_CODE = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}
_CODE_OF_DTYPE = {np.dtype(name): code for code, name in _DTYPE_OF_CODE.items()}
_FLOAT_CODES = (6, 7)
_LARGEST_LENGTH = 2**31 - 1
_WRITTEN_BACK = 8 << 20
_CHUNK = 1 << 20

IdArray = Sequence[int] | np.ndarray


MOST_IDS = 1 << 24
"""Of a vocabulary that text is turned into: tables of all its ids are held in memory."""


def dtype_for(vocab_size: int) -> np.dtype:
    """The token dtype Megatron picks: u16 below a vocabulary of 65,500, else i32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def paths(prefix: str | os.PathLike) -> tuple[Path, Path]:
    """The `.bin` and the `.idx` of a prefix."""
    return Path(f"{os.fspath(prefix)}.bin"), Path(f"{os.fspath(prefix)}.idx")


@contextlib.contextmanager
def _refused(path: Path, action: str) -> Iterator[None]:
    """Turns what the system refuses (a full disk, a missing right) into a DataError that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be {action}: {error.strerror}.") from error


def _map(path: Path) -> mmap.mmap | bytes:
    """The bytes of a file, mapped; an empty file cannot be."""
    if not path.exists():
        bare = path.with_suffix("")
        hint = f"; leave {bare.suffix} off the prefix" if bare.suffix in (".bin", ".idx") else ""
        raise DataError(f"{path} does not exist: a data prefix names a pair of files, .bin and .idx{hint}.")
    with _refused(path, "read"), open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _chunks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(array), _CHUNK):
        yield start, array[start : start + _CHUNK]


class IndexedReader:
    """A token set, memory mapped, read as one flat stream of `num_tokens` tokens.

    Nothing in the files is trusted: opening checks magic, version, dtype, counts against file sizes,
    every length, every pointer and every document bound, so that later arithmetic cannot leave the
    file. Raises DataError, naming file and field.

    `lengths` int32 [N] in tokens, `pointers` int64 [N] in bytes, `documents` int64 [D + 1] in sequences.
    """

    def __init__(self, prefix: str | os.PathLike):
        self.prefix = os.fspath(prefix)
        self._bin_path, self._idx_path = paths(prefix)
        self._idx = _map(self._idx_path)
        self._bin = _map(self._bin_path)
        self.dtype, self.num_sequences, num_bounds = self._read_header()
        at = _HEADER.size
        self.lengths = np.frombuffer(self._idx, "<i4", self.num_sequences, at)
        self.pointers = np.frombuffer(self._idx, "<i8", self.num_sequences, at + 4 * self.num_sequences)
        self.documents = np.frombuffer(self._idx, "<i8", num_bounds, at + 12 * self.num_sequences)
        self.num_documents = num_bounds - 1
        self._check_sequences()
        self._check_documents()
        self._tokens = np.frombuffer(self._bin, self.dtype)
        self.num_tokens = len(self._tokens)
        self.release()

    def release(self) -> None:
        """Count the files' pages, which the system goes on to hold, no longer as memory of this process.

        What opening and checking has read once would else be, of many sets, gigabytes.
        """
        for mapped in (self._idx, self._bin):
            if isinstance(mapped, mmap.mmap):
                mapped.madvise(mmap.MADV_DONTNEED)

    def __reduce__(self) -> tuple:
        # Another process maps the files itself.
        return IndexedReader, (self.prefix,)

    def _read_header(self) -> tuple[np.dtype, int, int]:
        path, size = self._idx_path, len(self._idx)
        if self._idx[: len(_LEGACY_MAGIC)] == _LEGACY_MAGIC:
            raise DataError(
                f"{path}: magic is TNTIDX, the old lazy/cached format of Megatron; "
                "preprocess the text again with tools/preprocess_data.py."
            )
        if self._idx[: len(MAGIC)] != MAGIC:
            raise DataError(f"{path}: magic is {bytes(self._idx[:9])!r}, not {MAGIC!r}; this is no Megatron index.")
        if size < _HEADER.size:
            raise DataError(f"{path}: the header needs {_HEADER.size} bytes and the file has {size}; it is truncated.")
        _, version, code, num_sequences, num_bounds = _HEADER.unpack_from(self._idx)
        if version != 1:
            raise DataError(f"{path}: version is {version}; only version 1 is known.")
        if code in _FLOAT_CODES:
            raise DataError(f"{path}: dtype code {code} is a float; token ids are integers.")
        if code not in _DTYPE_OF_CODE:
            raise DataError(f"{path}: dtype code {code} is unknown; known are {sorted(_DTYPE_OF_CODE)}.")
        if num_bounds < 1:
            raise DataError(f"{path}: document count is 0; even an empty set has one bound.")
        needed = _HEADER.size + 12 * num_sequences + 8 * num_bounds
        if size not in (needed, needed + num_sequences):
            raise DataError(
                f"{path}: sequence count {num_sequences:,} and document bound count {num_bounds:,} need "
                f"{needed:,} bytes and the file has {size:,}; it is truncated or damaged, copy or make it again."
            )
        return np.dtype(_DTYPE_OF_CODE[code]), num_sequences, num_bounds

    def _check_sequences(self) -> None:
        width, end = self.dtype.itemsize, 0
        for start, lengths in _chunks(self.lengths):
            if lengths.min() < 0:
                at = int(np.argmax(lengths < 0))
                raise DataError(
                    f"{self._idx_path}: lengths[{start + at}] is {lengths[at]}, below 0; make the set again."
                )
            sizes = lengths.astype(np.int64) * width
            ends = np.cumsum(sizes) + end
            wrong = self.pointers[start : start + len(lengths)] != ends - sizes
            if wrong.any():
                at = int(np.argmax(wrong))
                raise DataError(
                    f"{self._idx_path}: pointers[{start + at}] is {self.pointers[start + at]} where the lengths before "
                    f"it, in tokens of {width} bytes, end at byte {ends[at] - sizes[at]}; sequences must lie one after "
                    "another, aligned, without gap or overlap. Make the set again."
                )
            end = int(ends[-1])
        if end != len(self._bin):
            what = "is truncated" if len(self._bin) < end else "has bytes no sequence covers"
            raise DataError(
                f"{self._bin_path}: size is {len(self._bin):,} bytes and the lengths in {self._idx_path.name} add up "
                f"to {end:,}; the file {what}, or the two are not of one set. Copy or make both again."
            )

    def _check_documents(self) -> None:
        first, last = int(self.documents[0]), int(self.documents[-1])
        if first != 0 or last != self.num_sequences:
            raise DataError(
                f"{self._idx_path}: document bounds run from {first} to {last} where the file has sequences 0 to "
                f"{self.num_sequences}; make the set again."
            )
        for start, bounds in _chunks(self.documents):
            falls = np.diff(bounds, prepend=self.documents[max(start - 1, 0)]) < 0
            if falls.any():
                at = start + int(np.argmax(falls))
                raise DataError(
                    f"{self._idx_path}: document bound {at} is {self.documents[at]}, before bound {at - 1} at "
                    f"{self.documents[at - 1]}; make the set again."
                )

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` of the flat stream, in the file's dtype, without a copy.

        Raises DataError when the file has shrunk since it was opened: touching the lost pages would
        end the process by SIGBUS.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.num_tokens} in {self.prefix}")
        self._insist_on_pages()
        return self._tokens[start:stop]

    def stretches(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """A copy of stretches of the flat stream, each given by its first token, from 0 on, and its length, end to end.

        Raises as `tokens` does.
        """
        if len(starts) and not 0 <= starts.min() <= (starts + lengths).max() <= self.num_tokens:
            raise IndexError(f"stretches from token {starts.min()} of {self.num_tokens} in {self.prefix}")
        self._insist_on_pages()
        return self._tokens[places(starts, lengths)]

    def _insist_on_pages(self) -> None:
        if isinstance(self._bin, mmap.mmap) and self._bin.size() < len(self._bin):
            raise DataError(
                f"{self._bin_path} shrank from {len(self._bin):,} to {self._bin.size():,} bytes while in use; "
                "do not rewrite a set in place while a run reads it."
            )

    def document_token(self, document: int) -> int:
        """Position in the flat stream at which a document starts; `num_documents` gives the end."""
        sequence = int(self.documents[document])
        if sequence == self.num_sequences:
            return self.num_tokens
        return int(self.pointers[sequence]) // self.dtype.itemsize

    @functools.cached_property
    def _bounds(self) -> Any:
        """csrc/host/document_bounds.h over the arrays in the file; None where it is not compiled."""
        compiled, sequences = host.module(), self.num_sequences
        at = _HEADER.size + 4 * sequences
        return compiled and compiled.DocumentBounds(
            self._idx, at, sequences, at + 8 * sequences, len(self.documents), self.dtype.itemsize
        )

    def document_tokens(self, first: int, last: int) -> np.ndarray:
        """Positions in the flat stream, int64 [last - first + 1], at which documents start, and the end of the last."""
        return self._first_tokens(self.documents[first : last + 1])

    def document_bounds(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the flat stream, int64, at which those documents start, and at which they end."""
        if self._bounds:
            return self._bounds.of(documents, self.num_tokens)
        return self._first_tokens(self.documents[documents]), self._first_tokens(self.documents[documents + 1])

    def _first_tokens(self, sequences: np.ndarray) -> np.ndarray:
        inside = sequences < self.num_sequences
        starts = np.full(len(sequences), self.num_tokens, np.int64)
        starts[inside] = self.pointers[sequences[inside]] // self.dtype.itemsize
        return starts

    def document_at(self, token: int) -> int:
        """The document that holds a token of the flat stream."""
        if self._bounds:
            return self._bounds.document_at(token)
        # Not numpy's searchsorted: the arrays are unaligned in the file, and it would copy them whole.
        sequence = bisect.bisect_right(self.pointers, token * self.dtype.itemsize) - 1
        return bisect.bisect_right(self.documents, sequence) - 1

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Where the documents of tokens `start` to `stop` begin, counted from `start`: int64, ascending from 0."""
        if self._bounds:
            return self._bounds.starts(start, stop)
        first, last = self.document_at(start), self.document_at(stop - 1)
        sequences = self.documents[first + 1 : last + 1]
        inside = self.pointers[sequences] // self.dtype.itemsize - start
        # Documents without tokens begin where the next does.
        return np.concatenate(([0], inside[np.diff(inside, prepend=0) > 0]))

    def max_token_id(self, start: int = 0, stop: int | None = None) -> int:
        """Largest token id from `start` to `stop`, read in chunks; a negative id counts as very large."""
        stop = self.num_tokens if stop is None else stop
        unsigned = np.dtype(f"<u{self.dtype.itemsize}")
        blocks = (self.tokens(at, min(at + _CHUNK, stop)) for at in range(start, stop, _CHUNK))
        return max((int(block.view(unsigned).max()) for block in blocks), default=0)

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells this set from another: CRC-32 of the index, and of 16 pages spread over the tokens."""
        index = 0
        for at in range(0, len(self._idx), _CHUNK):
            index = zlib.crc32(self._idx[at : at + _CHUNK], index)
        size, page, content = len(self._bin), 4096, 0
        for i in range(16):
            at = max(size - page, 0) * i // 15
            content = zlib.crc32(self._bin[at : at + page], content)
        return f"{self.num_documents}-{size}-{index:08x}-{content:08x}"


class IndexedWriter:
    """A token set being written, in constant memory, published whole or not at all.

    Give `vocab_size` (every id is checked against it, and the dtype is Megatron's choice) or `dtype`.
    The files have temporary names, beside their places or in a folder `within` the same disk, until
    `close()`, which syncs and renames them; `abort()`, or an exception inside the `with` block, leaves
    nothing behind. The bytes are those of Megatron's writer.
    Raises DataError for an id that does not fit.
    """

    def __init__(
        self,
        prefix: str | os.PathLike,
        vocab_size: int | None = None,
        dtype: np.dtype | type | str | None = None,
        within: Path | None = None,
    ):
        if (vocab_size is None) == (dtype is None):
            raise ValueError("give either vocab_size or dtype")
        self.prefix = os.fspath(prefix)
        self.dtype = dtype_for(vocab_size) if vocab_size is not None else np.dtype(dtype).newbyteorder("<")
        if self.dtype not in _CODE_OF_DTYPE:
            raise ValueError(f"{self.dtype} is no dtype of token ids")
        self._limit = vocab_size if vocab_size is not None else int(np.iinfo(self.dtype).max) + 1
        self.num_tokens = self.num_sequences = self.num_documents = 0
        self._bin_path, self._idx_path = paths(prefix)
        mark = f"{os.getpid()}-{secrets.token_hex(4)}.tmp"
        folder = within or self._bin_path.parent
        self._bin_temporary = folder / f"{self._bin_path.name}.{mark}"
        self._idx_temporary = folder / f"{self._idx_path.name}.{mark}"
        with _refused(self._bin_path, "written"):
            self._bin_path.parent.mkdir(parents=True, exist_ok=True)
            # Lengths and bounds belong into the index behind counts not known yet: they wait in nameless files.
            self._lengths = tempfile.TemporaryFile(dir=folder, buffering=_CHUNK)  # noqa: SIM115
            self._bounds = tempfile.TemporaryFile(dir=folder, buffering=_CHUNK)  # noqa: SIM115
            self._bin = open(self._bin_temporary, "xb", buffering=_CHUNK)  # noqa: SIM115
        self._files = (self._bin, self._lengths, self._bounds)
        self._bin_hash = hashlib.sha256()
        self._begun = 0
        self.files: dict[str, dict[str, int | str]] = {}
        """Once closed: bytes and SHA-256 of "bin" and of "idx"."""
        self._unnamed: dict[str, dict[str, int | str]] = {}

    def add_document(self, ids: IdArray, sequence_lengths: IdArray | None = None) -> None:
        """Append one document of one sequence, or of consecutive sequences of the given lengths."""
        lengths = [len(ids)] if sequence_lengths is None else sequence_lengths
        self.add_many(ids, lengths, [len(lengths)])

    def add_many(self, flat_ids: IdArray, sequence_lengths: IdArray, sequences: IdArray | None = None) -> None:
        """Append many documents, their sequences laid end to end in `flat_ids`.

        `sequences` says how many of them each document has, which may be none; by default one.
        """
        array = self._checked(flat_ids)
        lengths = self._checked_lengths(sequence_lengths, len(array))
        counts = np.ones(len(lengths), np.int64) if sequences is None else np.asarray(sequences, np.int64)
        if int(counts.sum()) != len(lengths) or (counts < 0).any():
            raise ValueError(f"documents of {int(counts.sum())} sequences and {len(lengths)} lengths")
        bounds = np.cumsum(counts) + self.num_sequences
        self._append(array, lengths)
        self._append_bounds(bounds)

    def _checked(self, ids: IdArray) -> np.ndarray:
        array = np.asarray(ids)
        if array.size == 0:
            return np.empty(0, self.dtype)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"token ids must be a flat list of integers, not {array.dtype} of shape {array.shape}")
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self._limit:
            raise DataError(
                f"{self.prefix}: token id {low if low < 0 else high} is outside the vocabulary of {self._limit:,} ids."
            )
        return array.astype(self.dtype, copy=False)

    def _checked_lengths(self, lengths: IdArray, total: int) -> np.ndarray:
        array = np.asarray(lengths, np.int64)
        if array.size and array.max() > _LARGEST_LENGTH:
            raise DataError(
                f"{self.prefix}: a sequence of {array.max():,} tokens; the format holds at most {_LARGEST_LENGTH:,}."
            )
        if array.size and array.min() < 0:
            raise ValueError(f"a sequence length of {array.min()}")
        if int(array.sum()) != total:
            raise ValueError(f"lengths add up to {int(array.sum())} and there are {total} ids")
        return array.astype("<i4")

    def _append(self, array: np.ndarray, lengths: np.ndarray) -> None:
        tokens = np.ascontiguousarray(array).data
        self._bin_hash.update(tokens)
        with _refused(self._bin_path, "written"):
            self._bin.write(tokens)
            self._write_back()
            self._lengths.write(lengths.data)
        self.num_tokens += len(array)
        self.num_sequences += len(lengths)

    def _write_back(self) -> None:
        """Have the system begin to write what was added to disk, a piece at a time: `close` has less to wait for."""
        if (end := self._bin.tell()) - self._begun >= _WRITTEN_BACK and hasattr(os, "posix_fadvise"):
            self._bin.flush()
            # Pages that are on their way to disk are not dropped by this.
            os.posix_fadvise(self._bin.fileno(), self._begun, end - self._begun, os.POSIX_FADV_DONTNEED)
            self._begun = end

    def _append_bounds(self, bounds: np.ndarray) -> None:
        with _refused(self._idx_path, "written"):
            self._bounds.write(bounds.astype("<i8").data)
        self.num_documents += len(bounds)

    def finish(self) -> None:
        """Write the index and sync both files, under their temporary names yet; a second call does nothing."""
        if self._bin.closed:
            return
        try:
            with _refused(self._bin_path, "written"):
                idx_hash = hashlib.sha256()
                with open(self._idx_temporary, "xb", buffering=_CHUNK) as index:
                    for block in self._index_blocks():
                        index.write(block)
                        idx_hash.update(block)
                    idx_size = index.tell()
                    _sync(index)
                _sync(self._bin)
                for file in self._files:
                    file.close()
        except BaseException:
            self.abort()
            raise
        self._unnamed = {
            "bin": {"bytes": self.num_tokens * self.dtype.itemsize, "sha256": self._bin_hash.hexdigest()},
            "idx": {"bytes": idx_size, "sha256": idx_hash.hexdigest()},
        }

    def close(self) -> None:
        """`finish`, and give both files their names; a second call does nothing."""
        self.finish()
        if not self._unnamed:
            return
        try:
            with _refused(self._bin_path, "written"):
                # An old index must never meet new tokens, however the process ends.
                self._idx_path.unlink(missing_ok=True)
                os.replace(self._bin_temporary, self._bin_path)
                os.replace(self._idx_temporary, self._idx_path)
                _sync_folder(self._bin_path.parent)
        except BaseException:
            self.abort()
            raise
        self.files, self._unnamed = self._unnamed, {}

    def _index_blocks(self) -> Iterator[bytes | memoryview]:
        code = _CODE_OF_DTYPE[self.dtype]
        yield _HEADER.pack(MAGIC, 1, code, self.num_sequences, self.num_documents + 1)
        yield from _replay(self._lengths)
        end = 0
        for block in _replay(self._lengths):
            sizes = np.frombuffer(block, "<i4").astype("<i8") * self.dtype.itemsize
            ends = np.cumsum(sizes) + end
            yield (ends - sizes).data
            end = int(ends[-1])
        yield struct.pack("<q", 0)
        yield from _replay(self._bounds)

    def abort(self) -> None:
        """Close and remove what was written under temporary names."""
        for file in self._files:
            # A full disk fails once more when the buffer is flushed.
            with contextlib.suppress(OSError):
                file.close()
        self._bin_temporary.unlink(missing_ok=True)
        self._idx_temporary.unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _replay(file) -> Iterator[bytes]:
    file.seek(0)
    while block := file.read(8 * _CHUNK):
        yield block


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
