"""The door: what pretrain_gpt.py makes of its own options."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
from tiny_run import TOKENIZER, TOOLS, write_token_set

import pretrain_gpt
from megatron_lite import log
from megatron_lite.data.indexed import IndexedReader
from megatron_lite.data.provenance import Provenance, write_provenance

PLAN = ["--dry-run", "--model", "gpt2-124m", "--vocab-size", "50257", "--mock-data", "--train-iters", "10"]


def test_a_layout_is_planned_on_one_line(capsys):
    assert pretrain_gpt.main([*PLAN, "--layout", "tp=2,dp=4,zero=3"]) == 0
    told = capsys.readouterr().out
    assert "1 sequences x 1,024 x 4 data ranks" in told and "ZeRO 3 over 4 data ranks" in told
    assert "tensor_model_parallel_size: 2" in told


def test_a_layout_says_what_it_sets_aside(capsys):
    assert pretrain_gpt.main([*PLAN, "--layout", "tp=2,dp=4", "--zero-stage", "3", "--world-size", "8"]) == 0
    told = capsys.readouterr()
    assert "takes zero_stage=1, not the 3" in told.err and "ZeRO 1 over 4 data ranks" in told.out


def test_memory_is_planned_for_a_kind_of_device(capsys, monkeypatch):
    tables = {}
    for device, words in (("cpu", []), ("cpu", ["--device", "cpu"]), ("cuda", ["--device", "cuda"]), ("cuda", [])):
        monkeypatch.setattr(pretrain_gpt, "likely_device", lambda found=device: found)
        assert pretrain_gpt.main([*PLAN, *words]) == 0
        (heading,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory of a rank")]
        tables.setdefault(device, set()).add(heading)
    assert [len(found) for found in tables.values()] == [1, 1]
    assert "on a CPU" in tables["cpu"].pop() and "on a GPU" in tables["cuda"].pop()


def test_problems_of_all_rooms_are_said_together(tmp_path, capsys):
    (tmp_path / "ds.json").write_text('{"zero_optimization": 3}')
    wrong = ["--deepspeed_config", str(tmp_path / "ds.json"), "--hidden-size", "100", "--split", "x"]
    for arguments in ([*PLAN, *wrong], [*PLAN[1:], *wrong]):
        assert pretrain_gpt.main(arguments) == 2
        told = capsys.readouterr().err
        assert "3 problems" in told and "zero_optimization is 3" in told and "split=" in told


RANK_3 = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n",
    "MASTER_PORT": "1",
}


@pytest.mark.parametrize(("local_rank", "speaks"), [("0", True), ("1", False)])
def test_each_node_says_an_error_once_and_help_is_said_once_of_all(local_rank, speaks, monkeypatch, capsys):
    for name, value in {**RANK_3, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(log, "_rank", 0), monkeypatch.setattr(log, "_world_size", 1)
    assert pretrain_gpt.main(["--config", "absent.yaml"]) == 2
    assert ("absent.yaml" in capsys.readouterr().err) == speaks
    with pytest.raises(SystemExit) as stopped:
        pretrain_gpt.main(["--help"])
    assert stopped.value.code == 0 and capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([*PLAN, "--layout", "tp=2,ep=4"], "ep=4, which is not in this version"),
        ([*PLAN, "--layout", "tq=2"], "write it as tp=2"),
        ([*PLAN[1:], "--layout", "tp=2"], "--layout goes with --dry-run"),
        ([*PLAN, "--layout", "pp=2,schedule=banana"], "pipeline_schedule=banana is not known; choose GPipe, 1F1B, Int"),
        ([*PLAN, "--layout", "tp=2", "--world-size", "8"], "2 ranks = 2, but --world-size is 8; write tp=2,dp=4"),
        ([*PLAN, "--world-size", "-2"], "--world-size -2 is too small"),
        ([*PLAN, "--world-size", "0"], "--world-size 0 is too small"),
        ([*PLAN[1:], "--world-size", "2"], "--world-size goes with --dry-run"),
        ([*PLAN[1:], "--device", "cuda"], "--device goes with --dry-run"),
        ([*PLAN, "--device", "gpu"], "--device is 'gpu', but should be one of cpu, cuda"),
        ([*PLAN, "--tensor-model-parallel-size", "5", "--world-size", "5"], "choose 1, 2, 3, 4, 6 or 12"),
    ],
)
def test_refusals_exit_2_with_a_way_out(arguments, text, capsys):
    assert pretrain_gpt.main(arguments) == 2
    assert text in capsys.readouterr().err


def test_data_of_another_tokenizer_are_refused_before_anything_starts(tmp_path, capsys):
    prefix = write_token_set(tmp_path / "set")
    tokens = IndexedReader(prefix).num_tokens
    facts = Provenance(
        "ByteTokenizer", TOKENIZER.fingerprint, TOKENIZER.vocab_size, True, 12, tokens, tokens, 1.0, {}, "a test"
    )
    plan = ["--dry-run", "--seq-length", "32", "--train-iters", "1", "--tokenizer-type", "ByteTokenizer"]
    plan += ["--data-path", str(prefix)]
    write_provenance(prefix, facts)
    assert pretrain_gpt.main(plan) == pretrain_gpt.main([*plan, "--special-tokens", "<new>"]) == 0
    write_provenance(prefix, dataclasses.replace(facts, tokenizer_fingerprint="of another"))
    assert pretrain_gpt.main(plan) == 2
    told = capsys.readouterr().err
    assert "made with another tokenizer" in told and "(fingerprint of another)" in told
    assert TOKENIZER.fingerprint[:12] in told and "preprocess the text again" in told


@pytest.mark.parametrize("words", ["pretrain_gpt.py --help", "tools/dataset.py", f"pretrain_gpt.py {' '.join(PLAN)}"])
def test_a_reader_who_leaves_early_is_no_error(words):
    """As in `... --help | head`."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, *words.split()]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=TOOLS.parent)
    os.close(writing)
    assert done.returncode == 0 and "BrokenPipe" not in done.stderr and "Traceback" not in done.stderr
