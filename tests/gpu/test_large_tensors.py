"""Tensors of more than 2^31 elements on a GPU: their last elements are what they are alone, so no index wraps."""

import pytest
import torch
from kernel_cases import RULE, operator

from megatron_lite.kernels.bias_dropout_add import bias_dropout_add
from megatron_lite.kernels.bias_gelu import bias_gelu
from megatron_lite.kernels.layer_norm import layer_norm, residual_layer_norm
from megatron_lite.kernels.rms_norm import residual_rms_norm, rms_norm
from megatron_lite.kernels.rotary import rotary
from megatron_lite.kernels.softmax import causal_softmax, softmax
from megatron_lite.kernels.swiglu import swiglu

LENGTH, TRIANGLE, HEAD_DIM = 4096, 64, 128


def rotated(x):
    """Each row as the heads of one position, all positions turned alike."""
    angles = torch.linspace(0, 6, HEAD_DIM // 2, device=x.device).expand(len(x), 1, -1)
    return rotary(x.view(len(x), 1, -1, HEAD_DIM), angles.cos(), angles.sin()).view_as(x)


# (columns of the input, what is done to rows of which the first has the given number)
OF_ROWS = {
    "layer_norm": (LENGTH, lambda x, line, row: layer_norm(x, line, line)),
    "rms_norm": (LENGTH, lambda x, line, row: rms_norm(x, line)),
    # The norm and the sum have one gradient each: both are looked at in what they come to.
    "residual_layer_norm": (LENGTH, lambda x, line, row: sum(residual_layer_norm(x, x, line, line))),
    "residual_rms_norm": (LENGTH, lambda x, line, row: sum(residual_rms_norm(x, x, line))),
    "rotary": (LENGTH, lambda x, line, row: rotated(x)),
    "softmax": (LENGTH, lambda x, line, row: softmax(x)),
    "causal_softmax": (LENGTH, lambda x, line, row: causal_softmax(x.view(-1, TRIANGLE, LENGTH)).view_as(x)),
    "swiglu": (2 * LENGTH, lambda x, line, row: swiglu(x)),
    "bias_gelu": (LENGTH, lambda x, line, row: bias_gelu(x, line)),
    "bias_dropout_add": (
        LENGTH,
        lambda x, line, row: bias_dropout_add(x, line, None, 0.1, 1234, first=row * LENGTH),
    ),
}


@pytest.fixture
def beyond(device) -> int:
    """The number of elements: more than int32 counts, if the device has 40 GB to spare for them."""
    if device == "cpu":
        return 2**20
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of a GPU's memory")
    return 2**31 + 2**20


@pytest.mark.parametrize("name", OF_ROWS)
def test_the_last_rows(name, beyond, device):
    columns, run = OF_ROWS[name]
    rows = beyond // LENGTH
    x = torch.randn(rows, columns, device=device, dtype=torch.bfloat16).requires_grad_()
    gradient = torch.randn(rows, LENGTH, device=device, dtype=torch.bfloat16)
    line = torch.randn(LENGTH, device=device, dtype=torch.bfloat16)
    y = run(x, line, 0)
    y.backward(gradient)
    for begin in (0, rows - TRIANGLE):
        some = slice(begin, begin + TRIANGLE)
        alone = x.detach()[some].clone().requires_grad_()
        result = run(alone, line, begin)
        result.backward(gradient[some])
        assert torch.equal(y[some], result) and torch.equal(x.grad[some], alone.grad)


@pytest.mark.parametrize("bits", [32, 8])
def test_the_last_elements_of_an_optimizers_step(bits, beyond, device):
    parameter, gradient = (torch.randn(beyond, device=device, dtype=torch.bfloat16) for _ in range(2))
    if bits == 32:
        name, rule, state = "adamw", RULE, [torch.zeros(beyond, device=device) for _ in range(2)]
        last = [slice(beyond - 5000, None)] * 4
    else:
        name, rule = "adamw8bit", (*RULE, True)
        state = [
            *operator("quantize_blockwise")(gradient, True),
            *operator("quantize_blockwise")(gradient.abs(), False),
        ]
        elements, blocks = slice(beyond - 5120, None), slice(-20, None)
        last = [elements, elements, elements, blocks, elements, blocks]
    tensors = [parameter, gradient, *state]
    alone = [tensor[some].clone() for tensor, some in zip(tensors, last, strict=True)]
    operator(name)(*([tensor] for tensor in tensors), *rule)
    operator(name)(*([tensor] for tensor in alone), *rule)
    for tensor, some, expected in zip(tensors, last, alone, strict=True):
        assert torch.equal(tensor[some], expected)


def test_the_last_blocks_of_codes(beyond, device):
    values = torch.randn(beyond, device=device, dtype=torch.bfloat16)
    codes, absmax = operator("quantize_blockwise")(values, True)
    alone = operator("quantize_blockwise")(values[-5120:].clone(), True)
    assert torch.equal(codes[-5120:], alone[0]) and torch.equal(absmax[-20:], alone[1])
    back = operator("dequantize_blockwise")(codes, absmax, True, torch.bfloat16)
    assert torch.equal(back[-5120:], operator("dequantize_blockwise")(*alone, True, torch.bfloat16))


def test_the_last_rows_of_a_loss(beyond, device):
    rows = beyond // LENGTH
    logits = torch.randn(rows, LENGTH, device=device, dtype=torch.bfloat16)
    labels = torch.randint(0, LENGTH, (rows,), device=device)
    last, ones = slice(rows - TRIANGLE, rows), torch.ones(rows, device=device)
    alone = logits[last].clone()
    top, total, _, _ = statistics = operator("cross_entropy_statistics")(logits, labels, 0, LENGTH)
    assert torch.equal(statistics[:, last], operator("cross_entropy_statistics")(alone, labels[last], 0, LENGTH))
    rest = 0, LENGTH, 0.1, LENGTH
    operator("cross_entropy_gradient_")(logits, labels, top, 1 / total, ones, *rest)
    few = (each[last].contiguous() for each in (labels, top, 1 / total, ones))
    operator("cross_entropy_gradient_")(alone, *few, *rest)
    assert torch.equal(logits[last], alone)


def test_the_norm_counts_all(beyond, device):
    norm = operator("l2_norm")([torch.ones(beyond, device=device, dtype=torch.bfloat16)])
    assert norm.item() == pytest.approx(beyond**0.5, rel=1e-6)
