"""Which layers run again in backward, under every setting."""

import pytest
import torch

from megatron_lite.parallel.recompute import Recompute, recomputed, run_layers

LAYERS = 5


def _layers(calls):
    def layer(number):
        def call(hidden, factor):
            calls.append(number)
            return (hidden * factor).sin()

        return call

    return [layer(number) for number in range(LAYERS)]


@pytest.mark.parametrize(
    ("recompute", "again"),
    [
        (Recompute(), []),
        (Recompute("selective"), []),
        (Recompute("full", "uniform", 1), [4, 3, 2, 1, 0]),
        (Recompute("full", "uniform", 2), [4, 2, 3, 0, 1]),
        (Recompute("full", "uniform", 9), [0, 1, 2, 3, 4]),
        (Recompute("full", "block", 2), [1, 0]),
        (Recompute("full", "block", 9), [4, 3, 2, 1, 0]),
    ],
)
def test_what_runs_again(recompute, again):
    calls = []
    hidden = torch.linspace(0, 1, 7, requires_grad=True)
    output = run_layers(_layers(calls), hidden, recompute, 2.0)
    assert calls == [0, 1, 2, 3, 4]
    output.sum().backward()
    assert calls[LAYERS:] == again

    plain = torch.linspace(0, 1, 7, requires_grad=True)
    run_layers(_layers([]), plain, Recompute(), 2.0).sum().backward()
    assert torch.equal(hidden.grad, plain.grad)


def test_without_gradients_nothing_is_prepared():
    with torch.no_grad():
        assert recomputed(lambda value: value, calls := object()) is calls
