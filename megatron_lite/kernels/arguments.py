"""What the public functions refuse, in sentences with the numbers; and how references see a tensor."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_like(operation: str, input: torch.Tensor, **others: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless `input` has a kernel dtype and the others share its dtype and device."""
    if input.dtype not in DTYPES:
        raise TypeError(f"{operation}: input is {input.dtype}; float32, bfloat16 and float16 are possible")
    for name, tensor in others.items():
        if tensor.dtype != input.dtype:
            raise TypeError(f"{operation}: {name} is {tensor.dtype} and input is {input.dtype}; convert one of them")
        if tensor.device != input.device:
            raise ValueError(f"{operation}: {name} is on {tensor.device} and input is on {input.device}; move one")


def check_last_dim(operation: str, input: torch.Tensor, **vectors: torch.Tensor) -> None:
    """Raise ValueError unless every vector is as long as the input's last dim."""
    if input.dim() == 0:
        raise ValueError(f"{operation}: input has no dim; at least one is needed")
    for name, vector in vectors.items():
        if vector.dim() != 1 or vector.shape[0] != input.shape[-1]:
            raise ValueError(
                f"{operation}: {name} has shape {tuple(vector.shape)} and input {tuple(input.shape)}; "
                f"({input.shape[-1]},) is needed"
            )


def check_same_shape(operation: str, input: torch.Tensor, **others: torch.Tensor) -> None:
    """Raise ValueError unless every other tensor has the input's shape."""
    for name, tensor in others.items():
        if tensor.shape != input.shape:
            raise ValueError(
                f"{operation}: {name} has shape {tuple(tensor.shape)} and input {tuple(input.shape)}; they must be "
                "equal"
            )


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as [rows, length of its last dim], which may be 0."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
