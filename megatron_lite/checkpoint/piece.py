"""What a checkpoint is handed: rectangles of named global tensors, as views of live memory."""

from __future__ import annotations

import dataclasses
import math

import torch

from megatron_lite.checkpoint.boxes import Rectangle
from megatron_lite.checkpoint.manifest import CODE_DTYPES, box_bytes
from megatron_lite.kernels.code_maps import blocks
from megatron_lite.parallel.layout import ParameterLayout

#: The dtypes a checkpoint may hold, by the names the safetensors format gives them.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Piece:
    """A rectangle of one named global tensor, as a view of live memory.

    `tensor` has the rectangle's shape; it is read by a save and written in place by a load.
    """

    name: str
    """Kind and serial parameter name: `weight/layers.3.mlp.up.weight`, `exp_avg/...`."""
    global_shape: tuple[int, ...]
    global_start: tuple[int, ...]
    tensor: torch.Tensor
    owned: bool
    """This rank writes it; over all ranks every element is owned exactly once."""
    absmax: torch.Tensor | None = None
    """Where `tensor` holds 8-bit codes, quantised as this one piece: fp32, one for each block."""
    signed: bool = False
    """Which map the codes are of."""
    keeps_above_zero: bool = False
    """Where codes are made anew, a number above 0 keeps code 1 of the unsigned map at least."""

    def __post_init__(self) -> None:
        rectangle = self.rectangle
        whole = Rectangle((0,) * len(self.global_shape), self.global_shape)
        if len(rectangle.start) != len(rectangle.shape) or rectangle.overlap(whole) != rectangle:
            raise ValueError(f"{rectangle} is not a rectangle of {self.name}, which has shape {self.global_shape}")
        if self.tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{self.name} is {self.tensor.dtype}; a checkpoint holds {', '.join(DTYPES)}")
        if self.absmax is not None:
            wanted = torch.uint8, torch.float32, (blocks(rectangle.size),)
            if (self.tensor.dtype, self.absmax.dtype, self.absmax.shape) != wanted:
                raise ValueError(
                    f"{self.name} has codes {self.tensor.dtype} {rectangle} and absmax {self.absmax.dtype} "
                    f"{tuple(self.absmax.shape)}; {wanted} is needed"
                )

    @property
    def rectangle(self) -> Rectangle:
        return Rectangle(self.global_start, tuple(self.tensor.shape))

    @property
    def dtype_name(self) -> str:
        if self.absmax is None:
            return DTYPE_NAMES[self.tensor.dtype]
        return next(name for name, signed in CODE_DTYPES.items() if signed == self.signed)

    @property
    def nbytes(self) -> int:
        return box_bytes(self.dtype_name, self.rectangle.size)

    def bytes_view(self) -> memoryview:
        """The values in row-major order as bytes: live memory where it is contiguous and on the CPU.

        Of 8-bit codes a copy: their absmax comes first.
        """
        flat = _bytes(self.tensor)
        if self.absmax is not None:
            flat = torch.cat([_bytes(self.absmax), flat])
        return memoryview(flat.numpy())


def pieces_of(name: str, layout: ParameterLayout, local: torch.Tensor, *, owned: bool) -> list[Piece]:
    """Views of a tensor rank's whole part of a parameter, `local`, as rectangles of the global one."""
    flat = local.detach().view(-1)
    return [
        Piece(
            name,
            layout.global_shape,
            part.global_start,
            flat[part.flat_start : part.flat_start + math.prod(part.shape)].view(part.shape),
            owned,
        )
        for part in layout.fragments()
    ]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
