"""Bytes of optimizer state in closed form."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_lite.config.optimizer import OptimizerConfig
from megatron_lite.kernels.code_maps import BLOCK
from megatron_lite.plan.activations import FP32
from megatron_lite.plan.parameters import ParameterShape

CODE_BYTES = 1 + FP32 / BLOCK
"""An 8-bit code, and its share of what a block keeps in fp32."""


def is_coded(config: OptimizerConfig, shape: ParameterShape) -> bool:
    """Whether a parameter's slots are 8-bit codes: with adamw8bit, of the matrices of the layers."""
    in_layer = shape.component in ("attention", "feed-forward") and not shape.is_vector
    return config.optimizer == "adamw8bit" and in_layer


def slot_bytes(config: OptimizerConfig, elements: int, coded: int) -> int:
    """Bytes of all slots of so many elements, the `coded` ones among them in 8 bits."""
    return round(len(config.slots) * (FP32 * (elements - coded) + CODE_BYTES * coded))


def slot_line(config: OptimizerConfig, shapes: Iterable[ParameterShape]) -> str:
    """Bytes of optimizer state a parameter, fp32 masters apart: one line for people."""
    wide, slots = FP32 * len(config.slots), len(config.slots)
    shapes = list(shapes)
    elements = sum(shape.elements for shape in shapes)
    coded = sum(shape.elements for shape in shapes if is_coded(config, shape))
    if not coded:
        return f"optimizer state is {wide} bytes a parameter ({slots} fp32 slots), masters apart"
    return (
        f"optimizer state is {slots * CODE_BYTES:.2f} bytes a parameter for {coded / elements:.1%} of {elements:,} "
        f"(8 bits, the layers' matrices), {wide} for the rest, masters apart"
    )
