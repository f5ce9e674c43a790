"""The door: what pretrain_gpt.py makes of its own options."""

from __future__ import annotations

import pytest

import pretrain_gpt

PLAN = ["--dry-run", "--model", "gpt2-124m", "--vocab-size", "50257", "--mock-data", "--train-iters", "10"]


def test_a_layout_is_planned_on_one_line(capsys):
    assert pretrain_gpt.main([*PLAN, "--layout", "tp=2,dp=4,zero=3"]) == 0
    told = capsys.readouterr().out
    assert "1 sequences x 1,024 x 4 data ranks" in told and "ZeRO 3 over 4 data ranks" in told
    assert "tensor_model_parallel_size: 2" in told


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([*PLAN, "--layout", "tp=2,pp=4"], "pp=4, which is not in this version"),
        ([*PLAN, "--layout", "tq=2"], "write it as tp=2"),
        ([*PLAN[1:], "--layout", "tp=2"], "--layout goes with --dry-run"),
        ([*PLAN, "--tensor-model-parallel-size", "5", "--world-size", "5"], "choose 1, 2, 3, 4, 6 or 12"),
    ],
)
def test_refusals_exit_2_with_a_way_out(arguments, text, capsys):
    assert pretrain_gpt.main(arguments) == 2
    assert text in capsys.readouterr().err
