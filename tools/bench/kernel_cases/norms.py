"""Layer norm, RMS norm, their fused residual addition, and the norm of many tensors."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from kernel_cases.case import Case, Setting, apex, applied, backward, compiled, peer

from megatron_lite.kernels.l2_norm import l2_norm
from megatron_lite.kernels.layer_norm import layer_norm, residual_layer_norm
from megatron_lite.kernels.rms_norm import residual_rms_norm, rms_norm


def norms(setting: Setting) -> Iterator[Case]:
    """Layer and RMS norm. Forward reads and writes a tensor; backward reads two and writes one."""
    x, residual, dy = (setting.drawn(setting.rows, setting.hidden) for _ in range(3))
    weight, bias = setting.drawn(setting.hidden), setting.drawn(setting.hidden)
    shape = weight.shape

    def torch_layer(x, weight, bias):
        return F.layer_norm(x, shape, weight, bias, 1e-5)

    def torch_rms(x, weight):
        return F.rms_norm(x, shape, weight, 1e-5)

    def torch_residual_layer(x, residual, weight, bias):
        total = x + residual
        return F.layer_norm(total, shape, weight, bias, 1e-5), total

    def torch_residual_rms(x, residual, weight):
        total = x + residual
        return F.rms_norm(total, shape, weight, 1e-5), total

    on_gpu = setting.device.type == "cuda"
    liger_layer = peer("liger_kernel.ops.layer_norm", "LigerLayerNormFunction") if on_gpu else None
    liger_rms = peer("liger_kernel.ops.rms_norm", "LigerRMSNormFunction") if on_gpu else None
    quack_rms = peer("quack", "rmsnorm") if on_gpu else None
    quack_layer = peer("quack.rmsnorm", "layernorm_fwd") if on_gpu else None
    apex_layer, apex_rms = (
        apex(setting, "normalization.fused_layer_norm", f"fused_{kind}_norm_affine") for kind in ("layer", "rms")
    )
    for name, ours, theirs, arguments, peers in (
        (
            "layer_norm",
            layer_norm,
            torch_layer,
            [x, weight, bias],
            {
                "liger": liger_layer and (lambda x, w, b: liger_layer.apply(x, w, b, 1e-5)),
                # Forward alone, with weights in fp32.
                "quack": quack_layer and (lambda x, w, b: quack_layer(x, w.float(), b.float(), eps=1e-5)),
                "apex": apex_layer and (lambda x, w, b: apex_layer(x, w, b, shape, 1e-5)),
            },
        ),
        (
            "rms_norm",
            rms_norm,
            torch_rms,
            [x, weight],
            {
                "liger": liger_rms and (lambda x, w: liger_rms.apply(x, w, 1e-5)),
                "quack": quack_rms,
                "apex": apex_rms and (lambda x, w: apex_rms(x, w, shape, 1e-5)),
            },
        ),
    ):
        everyone = {"ours": ours, "torch": theirs, "torch compiled": compiled(setting, theirs), **peers}
        forward = {who: applied(function, *arguments) for who, function in everyone.items()}
        with torch.no_grad():
            yield setting.case(name, 2, **forward)
        gradient = {who: backward(function, arguments, dy) for who, function in everyone.items()}
        yield setting.case(f"{name}_backward", 3, **gradient)
        lean = backward(functools.partial(ours, memory_efficient=True), arguments, dy)
        yield setting.case(f"{name}_backward_from_output", 3, ours=lean, torch=gradient["torch"])
    for name, ours, theirs, arguments in (
        ("residual_layer_norm", residual_layer_norm, torch_residual_layer, [x, residual, weight, bias]),
        ("residual_rms_norm", residual_rms_norm, torch_residual_rms, [x, residual, weight]),
    ):
        everyone = {"ours": ours, "torch": theirs, "torch compiled": compiled(setting, theirs)}
        with torch.no_grad():
            yield setting.case(name, 4, **{who: applied(function, *arguments) for who, function in everyone.items()})


def clipping(setting: Setting) -> Iterator[Case]:
    """The L2 norm of ten tensors, read once."""
    tensors = list(setting.drawn(setting.rows, setting.hidden).chunk(10))
    yield setting.case(
        "l2_norm",
        1,
        ours=lambda: l2_norm(tensors),
        torch=lambda: torch.nn.utils.get_total_norm(tensors),
    )
