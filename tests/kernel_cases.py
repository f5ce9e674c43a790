"""Arguments for every kernel operator, and how near to exact a result must be."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_map_only

from megatron_lite.kernels.code_maps import SIGNED, UNSIGNED
from megatron_lite.kernels.operators import OPERATORS
from megatron_lite.kernels.sources import OPERATIONS

for operation in OPERATIONS:
    importlib.import_module(f"megatron_lite.kernels.{operation}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# No rows, no columns, one, odd, 64 lanes of a sum and one more, more than a block of 512 columns, many parts of rows.
SHAPES = ((0, 8), (3, 0), (1, 1), (3, 7), (2, 3, 64), (129, 65), (5, 1031), (300, 20))


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal values that depend on shape and seed alone."""
    generator = torch.Generator().manual_seed(seed + 7919 * sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def _layer_norm(shape, dtype):
    x, dy, length = drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype, seed=1), shape[-1]
    weight, bias = drawn(length, dtype=dtype, seed=2), drawn(length, dtype=dtype, seed=3)
    y, mean, inverse = torch.ops.megatron_lite.layer_norm(x, weight, bias, 1e-5, False)
    yield "layer_norm", (x, weight, bias, 1e-5, False)
    yield "residual_layer_norm", (x, dy, weight, bias, 1e-5, False)
    yield "layer_norm_backward", (dy, None, x, weight, None, mean, inverse)
    yield "layer_norm_backward", (dy, bias.expand(shape), x, weight, None, mean, inverse)
    yield "layer_norm_backward", (dy, None, y, weight, bias, mean, inverse)


def _rms_norm(shape, dtype):
    x, dy, weight = (
        drawn(*shape, dtype=dtype),
        drawn(*shape, dtype=dtype, seed=1),
        drawn(shape[-1], dtype=dtype, seed=2),
    )
    y, inverse = torch.ops.megatron_lite.rms_norm(x, weight, 1e-5, False)
    yield "rms_norm", (x, weight, 1e-5, False)
    yield "residual_rms_norm", (x, dy, weight, 1e-5, False)
    yield "rms_norm_backward", (dy, None, x, weight, inverse, False)
    yield "rms_norm_backward", (dy, weight.expand(shape), x, weight, inverse, False)
    yield "rms_norm_backward", (dy, None, y, weight, inverse, True)


def _l2_norm(shape, dtype):
    yield "l2_norm", ([drawn(*shape, dtype=dtype), drawn(70001, seed=1), drawn(*shape, seed=2).transpose(0, -1)],)
    if shape == (1, 1):
        # What blocks come to is 30 times what fp32 holds.
        yield "l2_norm", ([torch.full((2048 * 50,), 3e17)],)


def _swiglu(shape, dtype):
    x = drawn(*shape[:-1], 2 * shape[-1], dtype=dtype)
    yield "swiglu", (x,)
    yield "swiglu_backward", (drawn(*shape, dtype=dtype, seed=1), x)


def _softmax(shape, dtype):
    x, mask = drawn(*shape, dtype=dtype), (drawn(*shape, seed=2) > 0)[..., :1, :].expand(shape)
    y = torch.ops.megatron_lite.softmax(x, None, 0.5, False)
    triangle = torch.ops.megatron_lite.softmax(x, None, 0.5, True)
    yield "softmax", (x, None, 0.5, False)
    yield "softmax", (x, mask, 0.5, False)
    yield "softmax", (x, (drawn(*shape[:-1], 1, seed=3) > 0).expand(shape), 0.5, False)
    yield "softmax", (x, None, 0.5, True)
    yield "softmax_backward", (drawn(*shape, dtype=dtype, seed=1), y, 0.5, False)
    yield "softmax_backward", (drawn(*shape, dtype=dtype, seed=1), triangle, 0.5, True)


def _cross_entropy(shape, dtype):
    yield from _losses((3 * drawn(*shape)).to(dtype).flatten(0, -2))


def _losses(logits):
    rows, length = logits.shape
    # From before this part of the vocabulary to after it: some are ignored, some are elsewhere.
    labels = torch.arange(rows) * 7 % (length + 4) - 2
    for first, held in ((0, length), (1, length // 2), (3, 0)):
        yield "cross_entropy_statistics", (logits, labels, first, held)
        top, total, _, _ = torch.ops.megatron_lite.cross_entropy_statistics(logits, labels, 0, length)
        gradient = drawn(rows, seed=1) * (torch.arange(rows) % 5 != 4)
        yield "cross_entropy_gradient_", (logits, labels, top, 1 / total, gradient, first, held, 0.1, 2 * length)


def _bias_gelu(shape, dtype):
    x, dy = drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype, seed=1)
    for bias in (drawn(shape[-1], dtype=dtype, seed=2), None):
        for tanh in (True, False):
            yield "bias_gelu", (x, bias, tanh)
            yield "bias_gelu_backward", (dy, x, bias, tanh)


def _rotary(shape, dtype):
    positions, size = math.prod(shape[:-1]), shape[-1]
    for batch, pairs in ((1, size // 2), (2, size // 4)):
        angles = drawn(positions, batch, pairs, seed=1)
        # Heads before the batch in memory, in a case of two.
        heads = drawn(positions, 3, batch, size, dtype=dtype).transpose(1, 2)
        for interleaved in (True, False):
            rotation = angles.cos(), angles.sin(), interleaved, batch == 2
            yield "rotary", (heads, *rotation, False)
            yield "rotary_", (heads.contiguous(), *rotation)


SEED = -0x123456789ABCDEF


def _bias_dropout_add(shape, dtype):
    x, residual, dy = (drawn(*shape, dtype=dtype, seed=i) for i in range(3))
    bias = drawn(shape[-1], dtype=dtype, seed=3)
    for probability, first in ((0.25, 0), (0.25, 2**34 + 3), (0.0, 0)):
        mask = probability, SEED, first
        yield "bias_dropout_add", (x, bias, residual, *mask)
        yield "bias_dropout_add", (x, None, None, *mask)
        yield "bias_dropout_add_backward", (dy, *mask)


CODE_MAPS = {True: SIGNED, False: UNSIGNED}


def nearest_codes(shares: torch.Tensor, signed: bool) -> np.ndarray:
    """The nearest 8-bit codes by a search in float64, where the middles between fp32 neighbours are exact."""
    values = np.array(CODE_MAPS[signed], dtype=np.float64)
    return np.searchsorted((values[1:] + values[:-1]) / 2, shares.double().numpy(), side="right")


def _quantize_blockwise(shape, dtype):
    x = drawn(*shape, dtype=dtype)
    for signed in (True, False):
        yield "quantize_blockwise", (x, signed)
        yield "dequantize_blockwise", (*torch.ops.megatron_lite.quantize_blockwise(x.abs(), signed), signed, dtype)


RULE = (3, 1e-2, 0.9, 0.99, 1e-8, 0.1)


def _adamw(shape, dtype):
    parameters = [drawn(*shape, dtype=dtype), drawn(3, 700, seed=1)]
    gradients = [drawn(*shape, seed=2), drawn(700, 3, dtype=dtype, seed=3).t()]
    first = [drawn(*shape, seed=4), drawn(3, 700, seed=5)]
    second = [drawn(*shape, seed=6).square(), drawn(3, 700, seed=7).square()]
    yield "adamw", (parameters, gradients, first, second, *RULE)


def _adamw8bit(shape, dtype):
    _, (parameters, gradients, *moments, _, _, _, _, _, _) = next(_adamw(shape, dtype))
    slots = []
    for values, signed in zip(moments, (True, False), strict=True):
        states = [torch.ops.megatron_lite.quantize_blockwise(value, signed) for value in values]
        slots += map(list, zip(*states, strict=True))
    for keep in (True, False):
        yield "adamw8bit", (parameters, gradients, *slots, *RULE, keep)


def _salted(tensor, operator):
    """A copy with values from the edge of its dtype, each in a row and a block of codes of its own.

    For a softmax and a loss the first row is -inf alone. In a norm's gradient it depends on the order whether what
    is beyond the largest value is subtracted from in time, so for norms there is room for products.
    """
    ends, salted = torch.finfo(tensor.dtype), tensor.clone(memory_format=torch.contiguous_format)
    if operator.startswith(("softmax", "cross_entropy")):
        salted.view(-1, salted.shape[-1])[0] = -math.inf
    largest = ends.max / 64 if "norm" in operator else ends.max
    for place, value in enumerate((-math.inf, math.nan, math.inf, largest, -largest, ends.smallest_normal / 4)):
        salted.view(-1)[place * (salted.numel() // 8 + 1)] = value
    return salted


def _edges(shape, dtype):
    """The other cases with salt in one argument, in turn in each that is shaped like the first."""
    if shape[-1] not in (64, 65):
        return
    for name, arguments in (case for group in CASES[:-1] for case in group(shape, dtype)):
        # Logits have statistics of their own.
        if name.startswith("cross_entropy"):
            continue
        for place, argument in enumerate(arguments):
            (first, *_), (here, *others) = (
                each if isinstance(each, list) else [each] for each in (arguments[0], argument)
            )
            if isinstance(here, torch.Tensor) and here.is_floating_point() and here.shape == first.shape:
                salted = _salted(here, name)
                yield (
                    name,
                    (
                        *arguments[:place],
                        [salted, *others] if isinstance(argument, list) else salted,
                        *arguments[place + 1 :],
                    ),
                )
    yield from _losses(_salted((3 * drawn(*shape)).to(dtype).flatten(0, -2), "cross_entropy"))


CASES: tuple[Callable[..., Iterator[tuple[str, tuple[Any, ...]]]], ...] = (
    _layer_norm,
    _rms_norm,
    _l2_norm,
    _softmax,
    _cross_entropy,
    _swiglu,
    _bias_gelu,
    _rotary,
    _bias_dropout_add,
    _quantize_blockwise,
    _adamw,
    _adamw8bit,
    _edges,
)


def cases(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(operator's name, arguments) for every operator, some more than once."""
    for group in CASES:
        yield from group(shape, dtype)


def gradients(function, tensors, dtype=None):
    """The outputs of function(*tensors), then the gradients of a weighted sum of them; all in one list."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [drawn(*o.shape, seed=11 + i, dtype=leaves[0].dtype).to(o.device) for i, o in enumerate(outputs)]
    torch.autograd.backward(outputs, weights)
    return [*(o.detach() for o in outputs), *(leaf.grad for leaf in leaves)]


def assert_as_exact_as(
    peer: torch.Tensor, ours: torch.Tensor, exact: torch.Tensor, factor: float = 2, digits: float = 0.5
) -> None:
    """Raise unless our largest error is at most `factor` times the peer's in the same dtype, or `digits` last digits.

    exact is float64. Whichever is more: the digit, of the largest value, is for a peer that is exact by chance.
    """
    assert ours.dtype == peer.dtype and ours.shape == peer.shape == exact.shape
    if not exact.numel():
        return
    error = (ours.double() - exact).abs().max().item()
    peer_error = (peer.double() - exact).abs().max().item()
    digit = torch.finfo(ours.dtype).eps * exact.abs().max().item()
    assert error <= max(factor * peer_error, digits * digit), (
        f"error {error:.3g}, peer's {peer_error:.3g}, a digit is {digit:.3g}"
    )


def assert_small_probabilities_keep_their_digits(device: str) -> None:
    """Raise unless a softmax is off by a few units of its own last digit where it is small."""
    below = torch.linspace(0, 86, 2001)
    logits = torch.stack((torch.zeros_like(below), -below), -1).to(device)
    probabilities = operator("softmax")(logits, None, 1.0, False)[:, 1]
    torch.testing.assert_close(probabilities.double().cpu(), torch.sigmoid(-below.double()), rtol=6e-7, atol=0)


def strided(data: st.DataObject, dims: list[int], seed: int = 0) -> torch.Tensor:
    """A tensor of these dims whose strides are any order of them, twice as far apart as they need be."""
    order = data.draw(st.permutations(range(len(dims))))
    wide = drawn(*(dims[order.index(i)] for i in range(len(dims))), 2, seed=seed)[..., 0]
    return wide.permute(*order)


def assert_threads_change_nothing(run: Callable[[], Sequence[torch.Tensor]]) -> None:
    """Raise unless a run's tensors are the same bit for bit with 1, 2 and 5 threads."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def operator(name: str) -> torch._ops.OpOverloadPacket:
    return getattr(torch.ops.megatron_lite, name)


def updates(name: str) -> list[int]:
    """The places of the arguments that an operator updates in place."""
    return [i for i, argument in enumerate(operator(name).default._schema.arguments) if argument.is_write]


def outcome(name: str, run: Callable[..., Any], arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    """All tensors that a run gives or updates; it is given copies."""
    arguments = tree_map_only(torch.Tensor, torch.Tensor.clone, arguments)
    return [t for t in tree_leaves((run(*arguments), [arguments[i] for i in updates(name)])) if t is not None]


def assert_equals_reference(name: str, arguments: tuple[Any, ...], digits: int = 4) -> None:
    """Raise unless an operator's native code gives what its reference gives, but for last digits of the largest."""
    rows_of_one = any(t.dim() and t.shape[-1] == 1 for t in tree_leaves(arguments) if isinstance(t, torch.Tensor))
    for ours, reference in zip(
        outcome(name, operator(name), arguments), outcome(name, OPERATORS[name], arguments), strict=True
    ):
        assert ours.is_contiguous() and reference.is_contiguous()
        if not ours.dtype.is_floating_point:
            # Where a last digit of what is quantised differs, a tie may fall to the other side.
            torch.testing.assert_close(ours.int(), reference.int(), rtol=0, atol=1 if updates(name) else 0)
            continue
        largest = reference[reference.isfinite()].abs().max().item() if reference.isfinite().any() else 0
        # A row of one value has no variance: 1 / sqrt(epsilon) = 316 magnifies the rounding of a true zero.
        digit = torch.finfo(ours.dtype).eps * max(largest, 316 if rows_of_one else 0)
        torch.testing.assert_close(
            ours, reference, rtol=0, atol=digits * digit, equal_nan=True, msg=lambda said: f"{name}: {said}"
        )


def assert_lists_equal_each_alone(device: str) -> None:
    """Raise unless an optimizer's step of many tensors is, to the bit, the steps of each alone, wherever they lie.

    The list is longer than one launch's table, of mixed dtypes, with empty tensors and some of many chunks; l2_norm of
    the same list equals its reference.
    """
    sizes = [20_003, *(index * 37 % 900 for index in range(150)), 70_001]
    dtypes = [DTYPES[index % 5 % 3] for index in range(len(sizes))]
    parameters = [drawn(size, dtype=dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
    gradients = [drawn(size, dtype=dtype, seed=1) for size, dtype in zip(sizes, reversed(dtypes), strict=True)]
    first, second = [drawn(size, seed=2) for size in sizes], [drawn(size, seed=3).square() for size in sizes]
    codes = [
        list(
            map(
                list, zip(*(torch.ops.megatron_lite.quantize_blockwise(value, signed) for value in values), strict=True)
            )
        )
        for values, signed in ((first, True), (second, False))
    ]
    for name, tensors, rule in (
        ("adamw", [parameters, gradients, first, second], RULE),
        ("adamw8bit", [parameters, gradients, *codes[0], *codes[1]], (*RULE, True)),
    ):
        results = []
        for offset in (0, 1):
            together = [[_placed(tensor, offset, device) for tensor in each] for each in tensors]
            operator(name)(*together, *rule)
            results.append(together)
        alone = [[_placed(tensor, 0, device) for tensor in each] for each in tensors]
        for index in range(len(sizes)):
            operator(name)(*([each[index]] for each in alone), *rule)
        for one, *others in zip(tree_leaves(alone), *map(tree_leaves, results), strict=True):
            assert all(torch.equal(one, other) for other in others), name
    for offset in (0, 1):
        norm = operator("l2_norm")([_placed(gradient, offset, device) for gradient in gradients])
        torch.testing.assert_close(
            norm.cpu(), torch.cat([g.double() for g in gradients]).norm().float(), rtol=1e-6, atol=0
        )


def _placed(tensor: torch.Tensor, offset: int, device: str) -> torch.Tensor:
    """A copy that begins so many elements after an address of 64 bytes."""
    room = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=device)
    return room[offset:].copy_(tensor)
