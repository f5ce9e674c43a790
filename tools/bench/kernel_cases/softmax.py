"""Softmax: plain along the hidden size; of attention scores, causal and masked, beside the eager chain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from kernel_cases.case import Case, Setting, apex, applied, backward, compiled, peer

from megatron_lite.kernels.softmax import causal_softmax, masked_softmax, softmax

_SCALE = 0.125


def softmaxes(setting: Setting) -> Iterator[Case]:
    """Of rows x hidden. Forward reads and writes a tensor; backward reads two and writes one."""
    on_gpu = setting.device.type == "cuda"
    values = setting.drawn(setting.rows, setting.hidden)
    liger = peer("liger_kernel.ops.softmax", "LigerSoftmaxFunction") if on_gpu else None

    def by_torch(values):
        return values.softmax(-1)

    peers = {"liger": liger and liger.apply, "quack": peer("quack", "softmax") if on_gpu else None}
    yield from _both_ways(setting, "softmax", softmax, by_torch, values, (2 * values.nbytes, 3 * values.nbytes), peers)


def attention_softmaxes(setting: Setting) -> Iterator[Case]:
    """Scores [heads, L, L], rows x hidden do not matter; half of a causal matrix is not read."""
    length, heads = (2048, 64) if setting.device.type == "cuda" else (512, 32)
    scores = setting.drawn(heads, length, length)
    hidden = torch.ones(length, length, dtype=torch.bool, device=setting.device).triu(1)
    triangular = apex(setting, "transformer.functional.fused_softmax", "ScaledUpperTriangMaskedSoftmax")

    def by_torch(scores):
        return (scores * _SCALE).masked_fill(hidden, -torch.inf).softmax(-1)

    # apex has it in 16 bits alone.
    fits = triangular and setting.dtype != torch.float32
    for name, ours, moved, peers in (
        (
            "causal_softmax",
            lambda x: causal_softmax(x, _SCALE),
            (scores.nbytes * 3 // 2, scores.nbytes * 2),
            {"apex": (lambda x: triangular.apply(x, _SCALE)) if fits else None},
        ),
        ("masked_softmax", lambda x: masked_softmax(x, hidden, _SCALE), (scores.nbytes * 2, scores.nbytes * 3), {}),
    ):
        yield from _both_ways(setting, name, ours, by_torch, scores, moved, peers)


def _both_ways(
    setting: Setting,
    name: str,
    ours: Callable[..., Any],
    by_torch: Callable[..., Any],
    values: torch.Tensor,
    moved: tuple[int, int],
    peers: dict[str, Callable[..., Any] | None],
) -> Iterator[Case]:
    """Forward and backward, of so many bytes each."""
    everyone = {"ours": ours, "torch": by_torch, "torch compiled": compiled(setting, by_torch), **peers}
    with torch.no_grad():
        forward = {who: applied(function, values) for who, function in everyone.items()}
        yield setting.case_of(name, values.shape, moved[0], forward)
    gradient = torch.randn_like(values)
    gradients = {who: backward(function, [values], gradient) for who, function in everyone.items()}
    yield setting.case_of(f"{name}_backward", values.shape, moved[1], gradients)
