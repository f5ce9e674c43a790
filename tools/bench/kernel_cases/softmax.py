"""Softmax of attention scores: causal beside the eager chain of scale, mask and softmax; masked; plain."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from kernel_cases.case import Case, Setting, applied, backward, compiled

from megatron_lite.kernels.softmax import causal_softmax, masked_softmax, softmax

_SCALE = 0.125


def softmaxes(setting: Setting) -> Iterator[Case]:
    """Scores [heads, L, L], some 8 times as many as rows x hidden on a GPU; half of a causal matrix is not read."""
    length, heads = (2048, 64) if setting.device.type == "cuda" else (512, 32)
    scores, gradient = setting.drawn(heads, length, length), setting.drawn(heads, length, length)
    hidden = torch.ones(length, length, dtype=torch.bool, device=setting.device).triu(1)
    whole = scores.numel() * setting.dtype.itemsize

    def eager_causal(scores):
        return (scores * _SCALE).masked_fill(hidden, -torch.inf).softmax(-1)

    def eager(scores):
        return (scores * _SCALE).softmax(-1)

    for name, ours, theirs, forward_bytes, backward_bytes in (
        ("causal_softmax", lambda x: causal_softmax(x, _SCALE), eager_causal, whole * 3 // 2, whole * 2),
        ("masked_softmax", lambda x: masked_softmax(x, hidden, _SCALE), eager_causal, whole * 2, whole * 3),
        ("softmax", lambda x: softmax(x, _SCALE), eager, whole * 2, whole * 3),
    ):
        everyone = {"ours": ours, "torch": theirs, "torch compiled": compiled(setting, theirs)}
        forward = {who: applied(function, scores) for who, function in everyone.items() if function}
        with torch.no_grad():
            yield setting.case_of(name, scores.shape, forward_bytes, forward)
        gradients = {who: backward(function, [scores], gradient) for who, function in everyone.items() if function}
        yield setting.case_of(f"{name}_backward", scores.shape, backward_bytes, gradients)
