"""What lies in a checkpoint or in a Hugging Face folder, looked at without loading it."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_lite.checkpoint import find, foreign, store
from megatron_lite.checkpoint.boxes import Rectangle
from megatron_lite.checkpoint.huggingface import HuggingFaceFolder
from megatron_lite.checkpoint.load import fill
from megatron_lite.checkpoint.manifest import CODE_DTYPES, FILE_NAME, box_bytes, read_manifest
from megatron_lite.checkpoint.piece import DTYPE_NAMES, DTYPES, Piece
from megatron_lite.config import huggingface
from megatron_lite.errors import CheckpointError

_BLOCK_NUMBERS = 4 * 2**20


@dataclasses.dataclass(frozen=True)
class Held:
    """One tensor."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    files: tuple[str, ...]
    boxes: int = 1
    """Rectangles it is stored in."""


class Contents(abc.ABC):
    """Tensors by name, and what describes them."""

    path: Path
    kind: str
    tensors: Mapping[str, Held]
    files: Mapping[str, int]
    """File -> bytes."""
    about: dict[str, Any]
    """Plain facts: step, layout, versions, hashes, whatever there is."""
    config: Mapping[str, Any]

    @abc.abstractmethod
    def verify(self) -> str:
        """Look at every byte; what was found to hold. Raises CheckpointError."""

    @abc.abstractmethod
    def _read(self, name: str, rectangle: Rectangle, into: torch.Tensor) -> None: ...

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The values of a tensor in row-major order, some rows at a time, 8-bit codes as the fp32 they stand for.

        Tensors of one shape come in the same blocks.
        """
        held = self.tensors[name]
        dtype = torch.float32 if held.dtype in CODE_DTYPES else DTYPES.get(held.dtype)
        if dtype is None:
            raise CheckpointError(f"{self.path}: {name} is {held.dtype}, which cannot be read")
        if not held.shape:
            into = torch.empty((), dtype=dtype)
            self._read(name, Rectangle((), ()), into)
            yield into
            return
        inner = held.shape[1:]
        rows = max(1, _BLOCK_NUMBERS // max(1, math.prod(inner)))
        for first in range(0, held.shape[0], rows):
            rectangle = Rectangle((first, *(0 for _ in inner)), (min(rows, held.shape[0] - first), *inner))
            into = torch.empty(rectangle.shape, dtype=dtype)
            self._read(name, rectangle, into)
            yield into

    def sha256(self, name: str) -> str:
        """The hash of a tensor's values, whatever boxes and files they lie in."""
        digest = hashlib.sha256()
        for block in self.blocks(name):
            digest.update(_bits(block).numpy())
        return digest.hexdigest()


class CheckpointContents(Contents):
    """A checkpoint of ours: the folder of one step."""

    kind = "megatron_lite checkpoint"

    def __init__(self, path: Path):
        self.path = path
        self.manifest = manifest = read_manifest(path)
        self.tensors = {
            name: Held(
                tensor.dtype,
                tensor.shape,
                sum(box_bytes(tensor.dtype, box.rectangle.size) for box in tensor.boxes),
                tuple(sorted({box.file for box in tensor.boxes})),
                len(tensor.boxes),
            )
            for name, tensor in manifest.tensors.items()
        }
        self.files = {name: file.size for name, file in manifest.files.items()}
        self.config = manifest.config
        self.about = {
            "step": manifest.step,
            "layout": manifest.layout,
            "state": manifest.state,
            "versions": manifest.versions,
            "manifest_sha256": hashlib.sha256((path / FILE_NAME).read_bytes()).hexdigest(),
        }

    def verify(self) -> str:
        find.verify(self.path, store.step_of(self.path))
        return f"{sum(self.files.values()):,} bytes in {len(self.files)} files match their checksums"

    def _read(self, name: str, rectangle: Rectangle, into: torch.Tensor) -> None:
        piece = Piece(name, self.manifest.tensors[name].shape, rectangle.start, into, owned=False)
        fill(self.path, self.manifest, [piece])


class HuggingFaceContents(Contents):
    """A Hugging Face folder, under its own names, or with `as_ours` under those of a checkpoint."""

    kind = "Hugging Face folder"

    def __init__(self, path: Path, *, as_ours: bool = False):
        self.path = path
        self._as_ours = as_ours
        self._folder = folder = HuggingFaceFolder(path)
        stored = folder.tensors
        self.files = {file: (path / file).stat().st_size for _, file in stored.values()}
        self.about = {"family": folder.described.family}
        self.config = {"model": dataclasses.asdict(folder.described.model)}
        if not as_ours:
            self.tensors = {
                name: Held(tensor.dtype, tensor.shape, tensor.nbytes, (file,))
                for name, (tensor, file) in stored.items()
            }
            return
        self.tensors = {
            f"weight/{name}": self._held_as_ours(parts, {stored[part.theirs][1] for part in parts})
            for name, parts in folder.links.items()
        }

    def _held_as_ours(self, parts: Sequence[foreign.Link], files: set[str]) -> Held:
        dtype = foreign.widest(self._folder.dtype(part.theirs) for part in parts)
        shape = foreign.shape_of(parts)
        nbytes = math.prod(shape) * dtype.itemsize
        return Held(DTYPE_NAMES[dtype], shape, nbytes, tuple(sorted(files)), len(parts))

    def verify(self) -> str:
        numbers = 0
        for name in self.tensors:
            for block in self.blocks(name):
                if not block.isfinite().all():
                    raise CheckpointError(f"{self.path}: {name} holds values that are not finite")
                numbers += block.numel()
        return (
            f"{len(self.files)} files are whole by their headers, and {numbers:,} values finite; this format has no "
            "checksums"
        )

    def _read(self, name: str, rectangle: Rectangle, into: torch.Tensor) -> None:
        if self._as_ours:
            foreign.fill(self._folder, self._folder.links[name.removeprefix("weight/")], rectangle, into)
        else:
            self._folder.read(name, rectangle, into)


def open_contents(path: Path, step: int | None = None, *, as_ours: bool = False) -> Contents:
    """The checkpoint of a step (default: the newest) under `path`, or in it, or the Hugging Face folder that it is.

    Raises CheckpointError where there is neither, and where it has no such step.
    """
    if (path / huggingface.CONFIG).is_file() and not (path / FILE_NAME).exists():
        if step is not None:
            raise CheckpointError(f"{path} is a Hugging Face folder, which has no steps; leave out step {step}")
        return HuggingFaceContents(path, as_ours=as_ours)
    if (path / FILE_NAME).exists():
        contents = CheckpointContents(path)
        if step not in (None, contents.manifest.step):
            raise CheckpointError(f"{path} is a checkpoint of step {contents.manifest.step}, not of step {step}")
        return contents
    steps = store.steps(path)
    if not steps:
        raise CheckpointError(f"{path} holds neither checkpoints nor the config.json of a Hugging Face folder")
    if step is not None and step not in steps:
        raise CheckpointError(f"{path} holds no checkpoint of step {step}; it holds {', '.join(map(str, steps))}")
    contents, best = CheckpointContents(steps[max(steps) if step is None else step]), store.best(path)
    named = [at for at, folder in steps.items() if folder == best]
    contents.about |= {"steps": list(steps), "best": named[0] if named else None}
    return contents


@dataclasses.dataclass(frozen=True)
class Difference:
    """How the values of a tensor differ in two places."""

    largest: float
    """Of single values."""
    relative: float
    """The norm of the difference over the norm of the first; infinite where that is 0 or nothing is finite."""


def compare(a: Contents, b: Contents, name: str) -> Difference | None:
    """The difference of a tensor that both hold in one shape; None where every value is the same."""
    largest = squares = base = 0.0
    same = True
    for ours, theirs in zip(a.blocks(name), b.blocks(name), strict=True):
        base += ours.double().square().sum().item()
        if ours.dtype == theirs.dtype and torch.equal(_bits(ours), _bits(theirs)):
            continue
        delta = ours.double() - theirs.double()
        if not delta.any():
            continue
        same = False
        largest = max(largest, delta.abs().nan_to_num(nan=math.inf).max().item())
        squares += delta.square().sum().item()
    if same:
        return None
    return Difference(largest, math.sqrt(squares / base) if base > 0 and math.isfinite(squares / base) else math.inf)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
