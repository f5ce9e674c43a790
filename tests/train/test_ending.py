"""However a run ends, `exit.json` says so, and what happened on one rank is told by all or by that one."""

from __future__ import annotations

import gc
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from train.layouts import Case, config_of

import pretrain_gpt
from megatron_lite import log
from megatron_lite.checkpoint import store
from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.data.loader import BatchLoader
from megatron_lite.errors import (
    CheckpointNotSaved,
    DataError,
    HangError,
    LostRankError,
    NonFiniteError,
    UserError,
)
from megatron_lite.monitor import rank_log
from megatron_lite.monitor.sinks import Sinks
from megatron_lite.parallel.failure import explained
from megatron_lite.parallel.launch import Launch, StopRequest
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.parallel.roll_call import Lost, RollCall, lost_rank
from megatron_lite.train import loop, start
from megatron_lite.train.ending import Ending
from megatron_lite.train.keeper import Keeper


def _config(folder: Path, case: Case | None = None, **fields) -> RunConfig:
    config = config_of(
        case or Case(),
        training={"eval_interval": 0, "train_iters": 4},
        checkpoint={"save": str(folder), "save_interval": 2},
        logging={"tensorboard_dir": "none"},
    )
    for name, value in fields.items():
        config = sources.override(config, {sources.section_of()[name]: {name: value}})
    return config


def _train(config: RunConfig, timeout: timedelta = timedelta(minutes=1)) -> None:
    size = dist.get_world_size() if dist.is_initialized() else 1
    mesh = ProcessMesh.create(MeshShape.of_world(size), timeout=timeout)
    start.train_on(mesh, config, StopRequest(), "the command")


def _told(folder: Path) -> dict:
    return json.loads((folder / "exit.json").read_text())


def _outcomes(jobs: list[tuple[RunConfig, str]]) -> list[tuple[str, str, bool]]:
    """Kind, text and `on_all_ranks` of the error that each run ends with, rank 1 alone being sabotaged."""
    found = []
    step, train_step = BatchLoader.step, loop.train_step
    sys.modules["wandb"] = None
    for config, sabotage in jobs:
        if dist.get_rank() == 1:
            _SABOTAGE[sabotage](Path(config.checkpoint.save))
        try:
            _train(config, timedelta(seconds=2 if sabotage == "is late" else 60))
        except Exception as error:
            found.append((type(error).__name__, str(error), getattr(error, "on_all_ranks", False)))
        BatchLoader.step, loop.train_step = step, train_step
        if sabotage == "runs out of memory":
            gc.collect()
            dist.destroy_process_group()  # as the end of its process would
    return found


def _lose_a_sample(number: int, time: int) -> None:
    """The batch that begins at that sample cannot be read the time-th time that one does."""
    step, asked = BatchLoader.step, []

    def lost(self, consumed_samples, global_batch_size):
        asked.append(consumed_samples)
        if consumed_samples == number and asked.count(number) == time:
            raise DataError(f"sample {number} cannot be read")
        return step(self, consumed_samples, global_batch_size)

    BatchLoader.step = lost


def _run_out_of_memory(folder: Path) -> None:
    def overflow(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    loop.train_step = overflow


def _sleep(folder: Path) -> None:
    step = BatchLoader.step

    def late(self, *where):
        while not (folder / "exit.json").exists():
            time.sleep(0.05)
        return step(self, *where)

    BatchLoader.step = late


_SABOTAGE: dict[str, Callable[[Path], None]] = {
    "loses a sample": lambda _: _lose_a_sample(8, 1),
    # A validation begins at sample 0, as the first step does.
    "loses a sample of validation": lambda _: _lose_a_sample(0, 2),
    "runs out of memory": _run_out_of_memory,
    "is late": _sleep,
    "nothing": lambda _: None,
}


def test_what_one_rank_cannot_do_stops_all_of_them(tmp_path):
    jobs = {
        "loses a sample": _config(tmp_path / "training", Case(data=2)),
        "loses a sample of validation": _config(tmp_path / "valid", Case(data=2), eval_interval=1, eval_iters=2),
        "nothing": _config(tmp_path / "tracked", Case(data=2), wandb_project="mine"),
    }
    mine, theirs = run_on_ranks(_outcomes, 2, [(config, sabotage) for sabotage, config in jobs.items()])
    assert mine == theirs and mine[:2] == [
        ("UserError", "rank 1: sample 8 cannot be read", True),
        ("UserError", "rank 1: sample 0 cannot be read", True),
    ]
    assert mine[2][0] == "UserError" and "pip install wandb" in mine[2][1] and mine[2][2]
    for folder, step in (("training", 2), ("valid", 1), ("tracked", None)):
        told = _told(tmp_path / folder)
        assert (told["cause"], told["code"], told["step"]) == ("user_error", 2, step)
    assert _told(tmp_path / "training")["how_to_go_on"] == "the same command goes on from step 2: the command"
    assert (
        _told(tmp_path / "tracked")["how_to_go_on"] == "nothing was trained; the same command tries again: the command"
    )


def test_what_ends_one_rank_is_told_by_it_and_not_by_those_it_leaves(tmp_path):
    out_of_memory = [(_config(tmp_path / "run", Case(data=2)), "runs out of memory")]
    (left, *_), (ended, *_) = run_on_ranks(_outcomes, 2, out_of_memory)
    assert left[0] == "LostRankError" and ended == (
        "OutOfMemoryError",
        "CUDA out of memory. Tried to allocate 1 TiB",
        False,
    )
    told = _told(tmp_path / "run")
    assert (told["cause"], told["code"], told["step"]) == ("error", 1, 0)
    assert told["message"].startswith("OutOfMemoryError: CUDA out of memory")


def test_a_rank_that_does_not_come_is_a_hang(tmp_path):
    # The watch over hangs would end the late one, which this test wants to see alive.
    config = _config(tmp_path / "run", Case(data=2), hang_limit_minutes=0)
    (waited, *_), _ = run_on_ranks(_outcomes, 2, [(config, "is late")])
    told = _told(tmp_path / "run")
    assert (told["cause"], told["code"]) == ("hang", 4) and "--distributed-timeout-minutes" in told["message"]
    # A machine so busy that the ranks meet late may let the other one see it first.
    assert waited[0] in ("HangError", "LostRankError") and not waited[2]


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_rank_lost_while_folders_are_claimed_is_told_and_a_refusal_leaves_them_alone(
    is_refused, tmp_path, monkeypatch
):
    def fail(*arguments):
        raise UserError("another run's") if is_refused else RuntimeError("Connection closed by peer [127.0.0.1]:1")

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(start, "_claim_folders", fail)
    with pytest.raises(UserError if is_refused else LostRankError):
        _train(_config(tmp_path / "run"))
    if is_refused:
        assert not any((tmp_path / "run").iterdir())
    else:
        assert _told(tmp_path / "run")["cause"] == "lost_rank"


def test_an_error_before_the_first_step_is_told(tmp_path, monkeypatch):
    def overflow(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(start.build, "build_engine", overflow)
    with pytest.raises(torch.OutOfMemoryError):
        _train(_config(tmp_path / "run"))
    assert (_told(tmp_path / "run")["cause"], _told(tmp_path / "run")["code"]) == ("error", 1)
    # Such a folder is no run yet: --resume never begins in it.
    monkeypatch.undo()
    _train(_config(tmp_path / "run", resume="never"))
    assert _told(tmp_path / "run")["cause"] == "done"


def test_a_last_save_that_fails_is_no_success(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    usage = shutil.disk_usage

    def full(path):
        return SimpleNamespace(total=1, free=0) if (folder / "step-00000002").exists() else usage(path)

    monkeypatch.setattr(shutil, "disk_usage", full)
    with pytest.raises(CheckpointNotSaved, match=r"free some space.*; .* holds that of step 2 the newest") as caught:
        _train(_config(folder))
    assert caught.value.on_all_ranks
    told = _told(folder)
    assert (told["cause"], told["code"], told["step"]) == ("checkpoint_not_saved", 1, 4)
    assert told["how_to_go_on"] == "the same command goes on from step 2: the command"
    assert sorted(store.steps(folder)) == [2]


def test_a_save_that_is_due_while_a_stop_is_asked_for_has_its_deadline(tmp_path, monkeypatch):
    stop, seen = StopRequest(grace_seconds=50.0), []
    step, save = loop.train_step, Keeper.save

    def signalled(*arguments, **options):
        if options["step"] == 2:
            stop.ask("signal", pressing=True)
        return step(*arguments, **options)

    def noted(self, engine, progress, **options):
        seen.append((progress.step, options["deadline"]()))
        save(self, engine, progress, **options)

    monkeypatch.setattr(loop, "train_step", signalled)
    monkeypatch.setattr(Keeper, "save", noted)
    monkeypatch.setattr(Sinks, "flush", lambda self: seen.append("records are on disk"))
    start.train_on(ProcessMesh.create(MeshShape()), _config(tmp_path / "run", save_interval=1), stop, "")
    at_last = [(2, stop.deadline()), "records are on disk", (2, stop.deadline())]
    assert seen == ["records are on disk", (1, None), "records are on disk", *at_last] and stop.deadline() is not None


def test_a_validation_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "validate", lambda *arguments: math.nan)
    with pytest.raises(NonFiniteError, match="step 2: the validation loss is nan; all weights are finite"):
        _train(_config(tmp_path / "run", eval_interval=2, eval_iters=1))
    assert (_told(tmp_path / "run")["cause"], _told(tmp_path / "run")["code"]) == ("non_finite", 3)


def test_the_last_validation_is_in_the_last_checkpoint(tmp_path, monkeypatch):
    folder, losses = tmp_path / "run", [1.0, 2.0]
    monkeypatch.setattr(loop, "validate", lambda *arguments: losses.pop())
    _train(_config(folder, train_iters=3, eval_interval=2, eval_iters=1, save_interval=1))
    progress = read_manifest(folder / "step-00000003").state["progress"]
    assert progress["best_step"] == 3 and store.best(folder) == folder / "step-00000003"


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (RuntimeError, "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1", LostRankError),
        (
            RuntimeError,
            "[gloo/unbound_buffer.cc:78] Timed out waiting 1000ms for recv operation to complete",
            HangError,
        ),
        (
            dist.DistBackendError,
            "NCCL error in: x.cpp:1\nncclRemoteError: A call failed possibly due to",
            LostRankError,
        ),
        (dist.DistBackendError, "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(", HangError),
        (dist.DistBackendError, "NCCL error\nncclUnhandledCudaError: Call to CUDA function failed.", None),
        (dist.DistNetworkError, "failed to recv, got 0 bytes", LostRankError),
        (dist.DistStoreError, "wait timeout after 600000ms, keys: /default_pg/0//3", HangError),
        (RuntimeError, "mat1 and mat2 shapes cannot be multiplied", None),
        (RuntimeError, "", None),
    ],
)
def test_errors_of_other_ranks_are_recognised(kind, text, expected):
    error = kind(text)
    found = explained(error, 3)
    if expected is None:
        assert found is error
    else:
        assert type(found) is expected and "rank 3" in str(found)


@pytest.mark.parametrize("is_told_elsewhere", [False, True])
def test_a_rank_that_cannot_go_on_names_the_lost_one_unless_another_does(is_told_elsewhere, tmp_path, capsys):
    record = rank_log.path_of(tmp_path, 3)
    record.parent.mkdir(parents=True)
    record.write_text("its last line\n")
    roll = RollCall(None, 1, 1)
    Ending(1, tmp_path, "the command", roll)
    lost = {3: Lost("its process ended", spoke=False)}
    error = lost_rank(lost, "seen")
    error.is_told_elsewhere = is_told_elsewhere
    roll.give_up(error, lost)
    said = capsys.readouterr().err
    assert ("error: lost rank 3 its process ended (seen)" in said) != is_told_elsewhere
    assert ("  its last line" in said) != is_told_elsewhere
    assert _told(tmp_path)["cause"] == "lost_rank"


@pytest.mark.parametrize("rank", [0, 1])
def test_the_door_tells_an_error_once(rank, monkeypatch, capsys):
    monkeypatch.setattr(log, "_rank", 0), monkeypatch.setattr(log, "_world_size", 1)
    monkeypatch.setattr(Launch, "from_environment", lambda: Launch(rank, 2, rank, 2, "localhost"))
    monkeypatch.setattr(start, "run_training", lambda *arguments: (_ for _ in ()).throw(errors.pop()))
    of_all, of_this = UserError("known to all"), UserError("known here")
    of_all.on_all_ranks = True
    errors = [of_this, of_all]
    flags = ["--mock-data", "--vocab-size", "64", "--train-iters", "1"]
    assert [pretrain_gpt.main(flags), pretrain_gpt.main(flags)] == [2, 2]
    said = capsys.readouterr().err
    assert "error: known here" in said and ("error: known to all" in said) == (rank == 0)
