"""What became of one unit of a job's input: a file of sections that is there whole or not at all.

A unit is a block of the input. Its file begins with a little-endian u64, the length of a JSON head, which gives the
bytes of each section and what the job notes of the unit; the sections follow in that order.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lite.errors import DataError
from megatron_lite.publish import published

_LENGTH = struct.Struct("<Q")

Section = bytes | memoryview


@dataclasses.dataclass(frozen=True)
class UnitFile:
    """The head of a unit's file, and where each section lies."""

    path: Path
    head: Mapping[str, Any]
    _places: Mapping[str, tuple[int, int]]

    def section(self, name: str) -> bytes:
        """The bytes of a section; none where the unit has no such section."""
        start, size = self._places.get(name, (0, 0))
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(size)

    def size(self, name: str) -> int:
        """The bytes that a section has."""
        return self._places.get(name, (0, 0))[1]


def unit_path(folder: Path, unit: int) -> Path:
    """Where the file of a unit is."""
    return folder / f"{unit:09d}.unit"


def unit_number(path: Path) -> int:
    """The number of the unit a file is of."""
    return int(path.stem)


def write_unit(path: Path, head: Mapping[str, Any], sections: Mapping[str, Section], synced: bool = True) -> None:
    """Publish a unit's file, as `published` does: when it has its name it is complete. Raises DataError if it cannot be
    written."""
    sizes = {name: memoryview(data).nbytes for name, data in sections.items()}
    packed = json.dumps({"sections": sizes, "head": head}).encode()
    try:
        with published(path, synced) as temporary, open(temporary, "wb") as file:
            file.write(_LENGTH.pack(len(packed)))
            file.write(packed)
            file.writelines(sections.values())
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}; the same command goes on from there") from None


def finished_unit(path: Path, job: str) -> UnitFile | None:
    """A unit that is there already; None where there is none, or one that was made for a job of another digest."""
    unit = open_unit(path) if path.exists() else None
    return unit if unit is not None and unit.head.get("job") == job else None


def open_unit(path: Path) -> UnitFile:
    """Read the head of a unit's file. Raises DataError if it is damaged."""
    try:
        with open(path, "rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            content = json.loads(file.read(length))
            places, start = {}, _LENGTH.size + length
            for name, size in content["sections"].items():
                places[name] = (start, size)
                start += size
            if file.seek(0, 2) != start:
                raise ValueError(f"it has not the {start:,} bytes its head speaks of")
            return UnitFile(path, content["head"], places)
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise DataError(f"{path} cannot be used: {error}; remove it and run again, it is made anew") from None
