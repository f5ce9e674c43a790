"""What two layouts computed, held against each other tensor by tensor; see `trace.py`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from megatron_lite.checkpoint import store
from megatron_lite.checkpoint.load import read_tensor
from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.checkpoint.piece import Piece

TOLERANCES = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 2e-2}
"""How far apart layouts may be, by dtype: norm of the difference over the reference's norm."""
ZERO = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-3}
"""A tensor whose norm is below this share of all its kind's is nothing but rounding (the gradient of a key's bias)."""

OUTPUT, GRADIENT, WEIGHT = KINDS = ("output", "gradient", "weight")


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far a tensor of one layout is from the same of another."""

    name: str
    """KIND/LAYER or KIND/PARAMETER."""
    largest: float
    """Of any element."""
    relative: float
    """Norm of the difference over the reference's norm, or, where that is `ZERO`, over the norm of all its kind."""

    @property
    def kind(self) -> str:
        return self.name.partition("/")[0]

    @property
    def layer(self) -> str:
        """The row of a table: embedding, layers.0, ..., final_norm, head."""
        parts = self.name.partition("/")[2].split(".")
        return ".".join(parts[: 2 if parts[0] == "layers" else 1])


class StoredTrace(Mapping[str, torch.Tensor]):
    """The tensors that `save_trace` wrote into a folder, each read when asked for."""

    def __init__(self, folder: Path, steps: int):
        self._folder = folder / store.step_name(steps)
        self._manifest = read_manifest(self._folder)

    @property
    def curve(self) -> list[tuple[float, float]]:
        """Loss and gradient norm of each step."""
        return [tuple(math.inf if n is None else n for n in point) for point in self._manifest.state["curve"]]

    def __getitem__(self, name: str) -> torch.Tensor:
        return read_tensor(self._folder, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._manifest.tensors)

    def __len__(self) -> int:
        return len(self._manifest.tensors)


def assemble(pieces: Iterable[Piece]) -> dict[str, torch.Tensor]:
    """Global tensors by name, out of the pieces of all ranks. Raises ValueError where the owned ones do not tile."""
    whole: dict[str, torch.Tensor] = {}
    held: dict[str, torch.Tensor] = {}
    for piece in pieces:
        if not piece.owned:
            continue
        window = tuple(slice(a, a + n) for a, n in zip(piece.global_start, piece.tensor.shape, strict=True))
        owners = held.setdefault(piece.name, torch.zeros(piece.global_shape, dtype=torch.int32))
        owners[window] += 1
        whole.setdefault(piece.name, torch.empty(piece.global_shape))[window] = piece.tensor
    for name, owners in held.items():
        if not bool((owners == 1).all()):
            raise ValueError(f"elements of {name} have {int(owners.min())} to {int(owners.max())} owners, not one each")
    return whole


def differences(
    ours: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor], zero: float
) -> list[Difference]:
    """Every tensor of `ours` against the reference's. Raises ValueError where they do not have the same tensors."""
    if odd := sorted(ours.keys() ^ reference.keys()):
        raise ValueError(f"{', '.join(odd[:4])}: not in both of what is compared")
    found = []
    for name in reference:
        here, there = ours[name].double(), reference[name].double()
        apart = here - there
        found.append((name, apart.abs().max().item(), apart.norm().item(), there.norm().item()))
    of_kind = {kind: math.hypot(*(size for name, *_, size in found if name.startswith(f"{kind}/"))) for kind in KINDS}
    told = []
    for name, largest, distance, size in found:
        all_of_kind = of_kind[name.partition("/")[0]]
        relative = distance / (size if size > zero * all_of_kind else all_of_kind or 1.0)
        told.append(Difference(name, *(value if math.isfinite(value) else math.inf for value in (largest, relative))))
    return sorted(told, key=lambda difference: (KINDS.index(difference.kind), _depth(difference.layer)))


def first_apart(found: Sequence[Difference], tolerance: float) -> Difference | None:
    """The difference above `tolerance` that was computed first: forward, then backward, then by the optimizer.

    Of several in one layer it is the largest.
    """
    for kind in KINDS:
        apart = [difference for difference in found if difference.kind == kind and difference.relative > tolerance]
        if apart:
            first = (max if kind == GRADIENT else min)(_depth(difference.layer) for difference in apart)
            in_layer = (difference for difference in apart if _depth(difference.layer) == first)
            return max(in_layer, key=lambda difference: difference.relative)
    return None


def _depth(layer: str) -> tuple[int, int]:
    """Where a layer stands in the forward pass."""
    name, _, number = layer.partition(".")
    return ("embedding", "layers", "final_norm", "head").index(name), int(number or 0)
