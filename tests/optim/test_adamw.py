"""AdamW in 32 and 8 bits over parameter groups: the kernels' steps, piece by piece, counted and in place."""

import pytest
import torch

from megatron_lite.config.optimizer import OptimizerConfig
from megatron_lite.kernels import extension
from megatron_lite.kernels.adamw8bit import State8bit, adamw8bit
from megatron_lite.optim.adamw import AdamW, Pieces
from megatron_lite.optim.build import build_optimizer
from megatron_lite.optim.state import allocate_state, set_step_count, slot_part, step_count

RULE = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
KERNEL_RULE = {"lr": 1e-2, "betas": (0.9, 0.95), "epsilon": 1e-6, "weight_decay": 0.1}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def train(optimizer, parameters, steps):
    for step in range(1, steps + 1):
        for number, parameter in enumerate(parameters):
            parameter.grad = drawn(*parameter.shape, seed=100 * step + number)
        optimizer.step()


def test_32_bits_are_torchs():
    ours, theirs = ([torch.nn.Parameter(drawn(*shape)) for shape in ((40, 30), (7,))] for _ in range(2))
    optimizer, reference = AdamW([{"params": ours}], **RULE), torch.optim.AdamW(theirs, **RULE)
    train(optimizer, ours, 10)
    train(reference, theirs, 10)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        for slot in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[a][slot], reference.state[b][slot], rtol=1e-5, atol=1e-8)
    assert step_count(optimizer) == step_count(reference) == 10


@pytest.mark.parametrize("bits", [32, 8])
def test_16_bit_parameters_have_fp32_moments(bits):
    parameter = torch.nn.Parameter(drawn(300).bfloat16())
    optimizer = AdamW([{"params": [parameter], "bits": bits}], **RULE)
    before = parameter.detach().clone()
    parameter.grad = drawn(300, seed=1).bfloat16()
    optimizer.step()
    kept = optimizer.state[parameter]["exp_avg" if bits == 32 else "exp_avg_absmax"]
    assert kept.dtype == torch.float32 and not torch.equal(parameter, before)


@pytest.mark.parametrize("keep", [True, False])
def test_8_bits_are_the_kernels_steps_on_each_piece(keep):
    # A flat master with a gap and padding at its end, as ZeRO 3 leaves them.
    cuts, length = [(0, 300), (300, 301), (400, 1000)], 1024
    master = torch.nn.Parameter(drawn(length))
    pieces = [master.detach()[first:last].clone() for first, last in cuts]
    states = [State8bit.zeros(piece) for piece in pieces]
    before = master.detach().clone()
    optimizer = AdamW([{"params": [master], "bits": 8}], **RULE, keep_second_moments=keep)
    allocate_state(optimizer, master, 8, ("exp_avg", "exp_avg_sq"), cuts)
    for step in range(1, 6):
        master.grad = drawn(length, seed=step) ** 5 * 1e-3
        gradients = [master.grad[first:last] for first, last in cuts]
        optimizer.step()
        adamw8bit(pieces, gradients, states, step=step, keep_second_moments=keep, **KERNEL_RULE)
    for (first, last), piece, state in zip(cuts, pieces, states, strict=True):
        assert torch.equal(master.detach()[first:last], piece)
        for slot, signed, codes, absmax in (("exp_avg", True, *state[:2]), ("exp_avg_sq", False, *state[2:])):
            part = slot_part(optimizer, master, slot, first, last - first)
            assert part.signed == signed
            assert torch.equal(part.values, codes) and torch.equal(part.absmax, absmax)
    for first, last in ((301, 400), (1000, 1024)):
        assert torch.equal(master.detach()[first:last], before[first:last])


def test_a_parameter_is_one_piece_unless_cut():
    ours, cut = (torch.nn.Parameter(drawn(20, 30)) for _ in range(2))
    for parameter, allocated in ((ours, False), (cut, True)):
        optimizer = AdamW([{"params": [parameter], "bits": 8}], **RULE)
        if allocated:
            optimizer.allocate(parameter, 8, [(0, 600)])
        train(optimizer, [parameter], 3)
    assert torch.equal(ours, cut)


def test_the_switch_to_nearest_codes_reaches_the_kernel():
    states = []
    for nearest in (False, True):
        parameter = torch.nn.Parameter(drawn(256))
        config = OptimizerConfig(optimizer="adamw8bit", adam8bit_nearest_codes=nearest)
        optimizer = build_optimizer(config, [{"params": [parameter], "bits": 8}])
        parameter.grad = torch.where(torch.arange(256) == 0, 1.0, 1e-4)
        optimizer.step()
        states.append(optimizer.state[parameter]["exp_avg_sq"])
    assert (states[0][1:] == 1).all() and (states[1][1:] == 0).all()


def test_counts_are_each_parameters_own_and_can_be_set():
    first, second = (torch.nn.Parameter(drawn(300, seed=seed)) for seed in range(2))
    optimizer = AdamW([{"params": [first, second], "bits": 8}], **RULE)
    train(optimizer, [first], 2)
    train(optimizer, [first, second], 1)
    assert [int(optimizer.state[p]["step"]) for p in (first, second)] == [3, 1]
    set_step_count(optimizer, 7)
    assert step_count(optimizer) == 7


def test_bytes_an_element():
    parameter = torch.nn.Parameter(torch.zeros(256 * 100))
    optimizer = AdamW([{"params": [parameter], "bits": 8}], **RULE)
    optimizer.allocate(parameter, 8)
    assert sum(t.nbytes for t in optimizer.state[parameter].values() if t.dim()) == 2.03125 * parameter.numel()


def test_pieces_rise_and_stay_inside():
    assert Pieces.of(10, [(2, 4), (4, 9)]).split(torch.arange(10))[1].tolist() == [4, 5, 6, 7, 8]
    assert Pieces.of(10, []).split(torch.arange(10)) == []
    for cuts in ([(0, 4), (3, 5)], [(0, 11)], [(3, 3)]):
        with pytest.raises(ValueError, match="begins before"):
            Pieces.of(10, cuts)
    with pytest.raises(TypeError, match="closure"):
        AdamW([{"params": [torch.nn.Parameter(torch.zeros(1))]}], **RULE).step(lambda: torch.zeros(()))


def test_torchs_fused_adamw_where_nothing_is_native(monkeypatch):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "bits": 32}]
    assert type(build_optimizer(OptimizerConfig(), groups)) is AdamW
    monkeypatch.setattr(extension, "load", lambda device: False)
    assert type(build_optimizer(OptimizerConfig(), groups)) is torch.optim.AdamW
    assert type(build_optimizer(OptimizerConfig(optimizer="adamw8bit"), groups)) is AdamW
