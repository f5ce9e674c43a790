"""The door: what pretrain_gpt.py makes of its own options."""

from __future__ import annotations

import dataclasses

import pytest
from tiny_run import TOKENIZER, write_token_set

import pretrain_gpt
from megatron_lite.data.indexed import IndexedReader
from megatron_lite.data.provenance import Provenance, write_provenance

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


def test_data_of_another_tokenizer_are_refused_before_anything_starts(tmp_path, capsys):
    prefix = write_token_set(tmp_path / "set")
    tokens = IndexedReader(prefix).num_tokens
    facts = Provenance("ByteTokenizer", TOKENIZER.fingerprint, 257, True, 12, tokens, tokens, 1.0, {}, "a test")
    plan = ["--dry-run", "--seq-length", "32", "--train-iters", "1", "--tokenizer-type", "ByteTokenizer"]
    plan += ["--data-path", str(prefix)]
    write_provenance(prefix, facts)
    assert pretrain_gpt.main(plan) == pretrain_gpt.main([*plan, "--special-tokens", "<new>"]) == 0
    write_provenance(prefix, dataclasses.replace(facts, tokenizer_fingerprint="of another"))
    assert pretrain_gpt.main(plan) == 2
    told = capsys.readouterr().err
    assert "made with another tokenizer" in told and "(fingerprint of another)" in told
    assert TOKENIZER.fingerprint[:12] in told and "preprocess the text again" in told
