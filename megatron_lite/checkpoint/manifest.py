"""The manifest: what a checkpoint holds, where each part lies, and how to tell that it is whole. No torch.

`manifest.json`, format version 1, is one JSON object:

    format, format_version   "megatron_lite checkpoint", 1
    step, layout             optimizer steps done; the layout it was written at, on one line
    config, config_sha256    the run's resolved configuration, and the hash of its canonical JSON
    versions                 of the code and its libraries
    state                    plain JSON the run needs beside the tensors
    chunk_bytes              length of the pieces of a box that have a CRC-32 each
    files                    per file: size, and size and CRC-32 of its safetensors header
    tensors                  per global tensor: dtype, shape, boxes; per box: start, shape, file,
                             bytes [first, last), and the CRC-32 of every chunk of it
    sha256                   of all bytes before this last line

The boxes of a tensor tile it exactly, and the boxes in a file tile what follows its header.

Besides the dtypes of safetensors there are two of 8-bit codes, by the signed and the unsigned map of
`kernels.code_maps`. Each box of such a tensor is quantised by itself, in blocks of 256 elements of its
row-major order; its bytes are the blocks' absmax in fp32, then the codes.
A reader trusts nothing here: see `parse`.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

from megatron_lite.checkpoint.boxes import Rectangle, tiling_fault
from megatron_lite.errors import CheckpointError
from megatron_lite.kernels.code_maps import BLOCK, blocks

FILE_NAME = "manifest.json"
FORMAT = "megatron_lite checkpoint"
FORMAT_VERSION = 1
CHUNK_BYTES = 4 * 2**20

#: The dtypes of 8-bit codes, and whether their map is the signed one.
CODE_DTYPES = {f"Q8S{BLOCK}": True, f"Q8U{BLOCK}": False}

#: Bytes of one value, by the names the safetensors format gives the dtypes; of a code, without its absmax.
ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
ITEM_BYTES |= dict.fromkeys(CODE_DTYPES, 1)

_HEAD_KEYS = ("format", "format_version", "step", "layout", "config", "config_sha256", "versions", "state")
_KEYS = frozenset((*_HEAD_KEYS, "chunk_bytes", "files", "tensors", "sha256"))
_FILE_KEYS = frozenset(("size", "header_size", "header_crc32"))
_TENSOR_KEYS = frozenset(("dtype", "shape", "boxes"))
_BOX_KEYS = frozenset(("start", "shape", "file", "bytes", "crc32"))

MAX_BYTES = 512 * 2**20
_MAX_DIMS = 5
_MAX_NUMBER = 2**53
_SHARD_NAME = re.compile(r"rank-[0-9]{5,9}\.safetensors")
_LAST_LINE = re.compile(rb'\n"sha256": "([0-9a-f]{64})"\n\}\n\Z')


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """One rank's file: its size, and size and CRC-32 of its header."""

    size: int
    header_size: int
    header_crc32: int


@dataclasses.dataclass(frozen=True)
class StoredBox:
    """A rectangle of a global tensor: its row-major bytes lie in `file` from `first_byte` on."""

    rectangle: Rectangle
    file: str
    first_byte: int
    crc32: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One global tensor and the boxes that tile it."""

    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[StoredBox, ...]


def absmax_bytes(dtype: str, elements: int) -> int:
    """Bytes that the absmax of a box's blocks takes; 0 for a dtype that is not of codes."""
    return 4 * blocks(elements) if dtype in CODE_DTYPES else 0


def box_bytes(dtype: str, elements: int) -> int:
    """Bytes that a box of so many elements takes."""
    return absmax_bytes(dtype, elements) + ITEM_BYTES[dtype] * elements


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A manifest that was read and found consistent."""

    step: int
    layout: str
    config: dict[str, Any]
    versions: dict[str, str]
    state: dict[str, Any]
    chunk_bytes: int
    files: dict[str, StoredFile]
    tensors: dict[str, StoredTensor]


def shard_name(rank: int) -> str:
    """The file of `rank`: `rank-00003.safetensors`."""
    return f"rank-{rank:05d}.safetensors"


def config_sha256(config: dict[str, Any]) -> str:
    """The hash of a configuration's canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def config_differences(stored: dict[str, Any], current: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted field name -> (value in the checkpoint, value now), where they differ; None where absent."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(stored.keys() | current.keys()):
        before, now = stored.get(key), current.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found |= config_differences(before, now, f"{prefix}{key}.")
        elif before != now:
            found[f"{prefix}{key}"] = (before, now)
    return found


def file_entry(size: int, header_size: int, header_crc32: int) -> dict[str, int]:
    """The JSON of a StoredFile."""
    return {"size": size, "header_size": header_size, "header_crc32": header_crc32}


def box_entry(rectangle: Rectangle, file: str, first_byte: int, last_byte: int, crc32: list[int]) -> dict[str, Any]:
    """The JSON of a StoredBox."""
    start, shape = map(list, rectangle)
    return {"start": start, "shape": shape, "file": file, "bytes": [first_byte, last_byte], "crc32": crc32}


def merged_tensors(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The `tensors` entry out of those of all ranks, by name; boxes in the order of their starts.

    Raises CheckpointError when two ranks differ on a tensor's dtype or shape.
    """
    merged: dict[str, Any] = {}
    for part in parts:
        for name, entry in part.items():
            known = merged.setdefault(name, {"dtype": entry["dtype"], "shape": entry["shape"], "boxes": []})
            if (known["dtype"], known["shape"]) != (entry["dtype"], entry["shape"]):
                raise CheckpointError(
                    f"ranks differ on {name}: {known['dtype']} {known['shape']} and {entry['dtype']} {entry['shape']}"
                )
            known["boxes"] += entry["boxes"]
    for entry in merged.values():
        entry["boxes"].sort(key=lambda box: box["start"])
    return dict(sorted(merged.items()))


def encode(
    step: int,
    layout: str,
    config: dict[str, Any],
    versions: dict[str, str],
    state: dict[str, Any],
    files: dict[str, Any],
    tensors: dict[str, Any],
) -> bytes:
    """The bytes of a manifest, one line a field and a tensor.

    Raises CheckpointError when `config` or `state` is not plain JSON (infinite and NaN numbers are not).
    """
    try:
        head = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "step": step,
            "layout": layout,
            "config": config,
            # Of what a reader will see: JSON has no tuples and no keys that are numbers.
            "config_sha256": config_sha256(json.loads(json.dumps(config))),
            "versions": versions,
            "state": state,
            "chunk_bytes": CHUNK_BYTES,
            "files": files,
        }
        lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in head.items()]
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config, versions and state must be plain JSON: {error}") from None
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in tensors.items())
    lines.append(f'"tensors": {{\n{rows}\n}}')
    body = ("{\n" + ",\n".join(lines) + ",").encode()
    return body + b'\n"sha256": "%s"\n}\n' % hashlib.sha256(body).hexdigest().encode()


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of the checkpoint in `folder`. Raises CheckpointError naming file and field."""
    path = Path(folder) / FILE_NAME
    try:
        with open_regular(path) as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    return parse(raw, str(path))


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """`path` opened for reading, if it is a plain file and no link. Raises OSError."""
    file = open(path, "rb", opener=_open_without_following)  # noqa: SIM115 (the caller closes it)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def _open_without_following(path: str, flags: int) -> int:
    # O_NONBLOCK: a named pipe in the place of a file must not hang the reader.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def parse(raw: bytes, source: str) -> Manifest:
    """The manifest in `raw`, every field checked: types, ranges, plain file names, exact coverage.

    Raises CheckpointError naming `source` and the field that is wrong.
    """
    try:
        return _manifest(_verified_json(raw))
    except _Fault as fault:
        raise CheckpointError(f"{source}: {fault}") from None
    except RecursionError:
        raise CheckpointError(f"{source}: config or state is nested too deeply") from None


class _Fault(ValueError):
    """What is wrong in a manifest, beginning with the field."""


def _verified_json(raw: bytes) -> Any:
    if len(raw) > MAX_BYTES:
        raise _Fault(f"the file exceeds {MAX_BYTES} bytes")
    last = _LAST_LINE.search(raw[-100:])
    if last is None:
        raise _Fault("the last line, sha256, is missing: the file is cut off or not a manifest")
    body = raw[: len(raw) - len(last.group(0))]
    if hashlib.sha256(body).hexdigest().encode() != last.group(1):
        raise _Fault("the contents do not match the sha256 in the last line: the file is damaged")
    try:
        return json.loads(raw.decode(), parse_constant=_finite, parse_float=_finite)
    except ValueError as error:
        raise _Fault(f"not JSON: {error}") from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def _manifest(content: Any) -> Manifest:
    _expect(isinstance(content, dict), "the file", "is not a JSON object")
    _expect(content.get("format") == FORMAT, "format", f"is {_shown(content.get('format'))}, not {FORMAT!r}")
    version = _integer(content.get("format_version"), "format_version", low=1)
    _expect(
        version <= FORMAT_VERSION,
        "format_version",
        f"is {version}, and this code reads up to {FORMAT_VERSION}: use the newer code that wrote it",
    )
    _keys(content, _KEYS, "the file")
    config = _object(content["config"], "config")
    _expect(content["config_sha256"] == config_sha256(config), "config_sha256", "does not match config")
    versions = _object(content["versions"], "versions")
    for name, version_text in versions.items():
        _text(version_text, f"versions.{name}")
    chunk_bytes = _integer(content["chunk_bytes"], "chunk_bytes", low=8, high=64 * 2**20)
    _expect(chunk_bytes % 8 == 0, "chunk_bytes", f"is {chunk_bytes}, not a multiple of 8")
    files = {name: _file(name, entry) for name, entry in _object(content["files"], "files").items()}
    tensors = {
        _text(name, "a name in tensors"): _tensor(f"tensors.{name}", entry, chunk_bytes)
        for name, entry in _object(content["tensors"], "tensors").items()
    }
    _check_files_are_tiled(files, tensors)
    return Manifest(
        step=_integer(content["step"], "step"),
        layout=_text(content["layout"], "layout"),
        config=config,
        versions=versions,
        state=_object(content["state"], "state"),
        chunk_bytes=chunk_bytes,
        files=files,
        tensors=tensors,
    )


def _file(name: str, entry: Any) -> StoredFile:
    field = f"files.{_shown(name)}"
    _expect(_SHARD_NAME.fullmatch(name) is not None, field, "is not a name of the form rank-00003.safetensors")
    _keys(_object(entry, field), _FILE_KEYS, field)
    size = _integer(entry["size"], f"{field}.size", low=8)
    header_size = _integer(entry["header_size"], f"{field}.header_size", low=8, high=min(size, 100 * 10**6))
    return StoredFile(size, header_size, _integer(entry["header_crc32"], f"{field}.header_crc32", high=2**32 - 1))


def _tensor(field: str, entry: Any, chunk_bytes: int) -> StoredTensor:
    _keys(_object(entry, field), _TENSOR_KEYS, field)
    dtype = entry["dtype"]
    if not (isinstance(dtype, str) and dtype in ITEM_BYTES):
        raise _Fault(f"{field}.dtype is {_shown(dtype)}, not of {list(ITEM_BYTES)}")
    shape = _integers(entry["shape"], f"{field}.shape", low=1)
    _expect(math.prod(shape) <= _MAX_NUMBER, f"{field}.shape", f"has {math.prod(shape)} elements")
    boxes = []
    for index, box in enumerate(_list(entry["boxes"], f"{field}.boxes")):
        try:
            boxes.append(_box(box, shape, dtype, chunk_bytes))
        except _Fault as fault:
            raise _Fault(f"{field}.boxes[{index}].{fault}") from None
    fault = tiling_fault(shape, (box.rectangle for box in boxes))
    _expect(fault is None, f"{field}.boxes", f"do not cover {list(shape)} exactly once: {fault}")
    return StoredTensor(dtype, shape, tuple(boxes))


def _box(entry: Any, whole: tuple[int, ...], dtype: str, chunk_bytes: int) -> StoredBox:
    # There may be a million of these: no message is put together before it is needed.
    _keys(_object(entry, "value"), _BOX_KEYS, "value")
    start, shape = _integers(entry["start"], "start"), _integers(entry["shape"], "shape", low=1)
    if not (len(start) == len(shape) == len(whole) and all(map(_fits, start, shape, whole))):
        raise _Fault(f"start is {list(start)} with shape {list(shape)}: not inside a tensor of shape {list(whole)}")
    rectangle = Rectangle(start, shape)
    size = box_bytes(dtype, rectangle.size)
    byte_range = _integers(entry["bytes"], "bytes")
    if len(byte_range) != 2 or byte_range[1] - byte_range[0] != size:
        raise _Fault(f"bytes is {list(byte_range)}, not a range of {size} bytes")
    checksums = _list(entry["crc32"], "crc32")
    if len(checksums) != -(-size // chunk_bytes):
        raise _Fault(f"crc32 has {len(checksums)} entries for {size} bytes")
    crc32 = tuple(_integer(checksum, "crc32", high=2**32 - 1) for checksum in checksums)
    return StoredBox(rectangle, _text(entry["file"], "file"), byte_range[0], crc32)


def _fits(first: int, length: int, limit: int) -> bool:
    return first + length <= limit


def _check_files_are_tiled(files: dict[str, StoredFile], tensors: dict[str, StoredTensor]) -> None:
    ranges: dict[str, list[tuple[int, int, str]]] = {name: [] for name in files}
    for name, tensor in tensors.items():
        for box in tensor.boxes:
            if box.file not in ranges:
                raise _Fault(f"tensors.{name}.boxes are in {_shown(box.file)}, which files does not list")
            last = box.first_byte + box_bytes(tensor.dtype, box.rectangle.size)
            ranges[box.file].append((box.first_byte, last, name))
    for file, entry in files.items():
        position = entry.header_size
        for first, last, name in sorted(ranges[file]):
            if first != position:
                raise _Fault(f"tensors.{name}.boxes begin at byte {first} of {file}, where byte {position} is the next")
            position = last
        _expect(position == entry.size, f"files.{file}.size", f"is {entry.size}, but its boxes end at byte {position}")


def _expect(holds: bool, field: str, problem: str) -> None:
    if not holds:
        raise _Fault(f"{field} {problem}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _keys(entry: dict[str, Any], keys: frozenset[str], field: str) -> None:
    if entry.keys() != keys:
        missing, unknown = sorted(keys - entry.keys()), sorted(entry.keys() - keys)
        raise _Fault(f"{field} lacks the fields {missing} and has the unknown ones {_shown(unknown)}")


def _object(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Fault(f"{field} is {_shown(value)}, not an object")
    return value


def _list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise _Fault(f"{field} is {_shown(value)}, not a list")
    return value


def _text(value: Any, field: str) -> str:
    if not (isinstance(value, str) and 0 < len(value) <= 500 and value.isprintable()):
        raise _Fault(f"{field} is {_shown(value)}, not a printable text of 1 to 500 characters")
    return value


def _integer(value: Any, field: str, low: int = 0, high: int = _MAX_NUMBER) -> int:
    # A bool is an int to Python, and not a number here.
    if type(value) is not int or not low <= value <= high:
        raise _Fault(f"{field} is {_shown(value)}, not a whole number from {low} to {high}")
    return value


def _integers(value: Any, field: str, low: int = 0) -> tuple[int, ...]:
    numbers = _list(value, field)
    if len(numbers) > _MAX_DIMS:
        raise _Fault(f"{field} has {len(numbers)} entries; at most {_MAX_DIMS} are allowed")
    return tuple([_integer(number, field, low) for number in numbers])
