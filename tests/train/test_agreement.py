"""Ranks compare what they were started with, and say who has what where they are not alike."""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from train.layouts import Case, config_of

from megatron_lite import log
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import UserError
from megatron_lite.kernels import operators
from megatron_lite.parallel.process_mesh import Exchange
from megatron_lite.train import agreement
from megatron_lite.train.agreement import Fact, agree, agree_on_launch


class Told:
    """All ranks but this one, as their answers would be; what this one says is kept."""

    def __init__(self, world_size: int, answer):
        self.global_rank, self.world_size = 0, world_size
        self.said: list = []
        self._answer = answer

    def gather_json(self, value):
        self.said.append(value)
        return [value, *(self._answer(rank, len(self.said), value) for rank in range(1, self.world_size))]


def _change(what: str, change: contextlib.ExitStack) -> RunConfig:
    """The configuration of a rank on which something is not as on the others."""
    config = config_of(Case(data=2))
    if what == "flag":
        return config_of(Case(data=2), optimizer={"lr": 5e-4})
    if what == "path":
        return config_of(Case(data=2), logging={"run_dir": "/elsewhere"})
    if what == "code":
        sources = agreement._sources()
        change.enter_context(mock.patch.object(agreement, "_sources", lambda: sources[:-1]))
    if what == "version":
        versions = {**agreement.versions(), "torch": "1.0"}
        change.enter_context(mock.patch.object(agreement, "versions", lambda: versions))
    if what == "clock":
        clock = SimpleNamespace(time=lambda: time.time() - 3600.5)
        change.enter_context(mock.patch.object(agreement, "time", clock))
    return config


def _unlike(changes: list[str]) -> list[tuple[str | None, list[str]]]:
    """The error and the warnings of this rank for each change of the last rank."""
    ends = []
    for what in changes:
        said: list[str] = []
        with contextlib.ExitStack() as change, mock.patch.object(log, "warn", said.append):
            last = dist.get_rank() == dist.get_world_size() - 1
            config = _change(what if last else "nothing", change)
            try:
                agree_on_launch(Exchange(dist.get_rank(), dist.get_world_size(), dist.group.WORLD), config)
                ends.append((None, said))
            except UserError as error:
                assert error.on_all_ranks
                ends.append((str(error), said))
    return ends


def test_what_must_be_alike_ends_all_ranks_and_what_may_differ_is_said():
    errors = {
        "flag": ["ranks 0 and 1  rank 2", "--lr", "0.01           0.0005"],
        "code": ["pretrain_gpt.py", "none"],
        "version": ["torch", "1.0"],
    }
    warnings = {"path": ["--run-dir", "/elsewhere"], "clock": ["rank 2", "-3600.", "times in logs"], "nothing": []}
    changes = [*errors, *warnings]
    ends = run_on_ranks(_unlike, 3, changes)
    assert ends[0] == ends[1] == ends[2]
    for change, (error, said) in zip(changes, ends[0], strict=True):
        if change in errors:
            assert error.startswith("the ranks are not alike") and all(word in error for word in errors[change]), error
            assert error.count("\n") == 3, "a head, one line for what differs, and the way out"
        else:
            assert error is None and len(said) == bool(warnings[change]), change
            assert all(word in said[0] for word in warnings[change]), said


def test_digests_alone_are_sent_where_all_is_well():
    ranks = Told(1000, lambda rank, round, value: value)
    agree(ranks, [Fact("configuration", f"--flag-{n}", "x" * 1000) for n in range(1000)])
    assert len(ranks.said) == 1 and len(str(ranks.said)) < 100


def test_many_variants_are_a_short_table():
    def answer(rank, round, value):
        return (
            {"code must": f"digest {rank}"}
            if round == 1
            else {"code must": {f"file {n}": str(rank) for n in range(50)}}
        )

    with pytest.raises(UserError) as caught:
        agree(Told(64, answer), [Fact("code", f"file {n}", "0") for n in range(50)])
    text = str(caught.value)
    assert "... and 38 more" in text and "... and 60 more variants" in text and len(text) < 2000


def test_kernels_that_one_rank_lacks(monkeypatch):
    mine = list(agreement.of_kernels(torch.device("cpu")))
    monkeypatch.setattr(operators, "native", lambda name, device: name != "rms_norm")
    some, all_of_them = {fact.name: fact for fact in agreement.of_kernels(torch.device("cpu"))}, {f.name for f in mine}
    assert set(some) == all_of_them and some["rms_norm"].value == "plain torch" and some["softmax"].value == "native"
    assert some["rms_norm"].must_agree and not some["device"].must_agree
