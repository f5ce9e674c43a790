"""Saves beside training: what they hold, what they cost, and that a failed one costs itself alone."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run_on_ranks
from train.layouts import VOCABULARY, Case, config_of

from megatron_lite import log
from megatron_lite.checkpoint import host_copies, store
from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import CheckpointError, LostRankError, NonFiniteError
from megatron_lite.parallel.launch import StopRequest
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.plan.memory import host_copy_bytes
from megatron_lite.train import build, keeper, loop
from megatron_lite.train.start import train_on

STEPS = 4
CASES = [
    Case(data=2, zero=0),
    Case(tensor=2, zero=1, dtype="bf16"),
    Case(data=2, zero=1),
    Case(data=2, zero=2, optimizer="adamw8bit", dtype="bf16"),
    Case(data=2, zero=3, llama=True),
    Case(pipe=2, zero=1, micro_batches=2),
]


def _config(folder: Path, case: Case | None = None, **checkpoint) -> RunConfig:
    return config_of(
        case or Case(),
        training={"train_iters": STEPS, "eval_interval": 0},
        checkpoint={"save": str(folder), "save_interval": 1} | checkpoint,
        logging={"tensorboard_dir": "none"},
    )


def _train(*configs: RunConfig) -> None:
    for config in configs:
        parallel, size = config.parallel, dist.get_world_size() if dist.is_initialized() else 1
        shape = MeshShape.of_world(
            size, tensor=parallel.tensor_model_parallel_size, pipe=parallel.pipeline_model_parallel_size
        )
        train_on(ProcessMesh.create(shape), config, StopRequest(), "the command")


def _train_and_log(config: RunConfig) -> None:
    with open(f"{config.checkpoint.save}.log-{dist.get_rank()}", "w") as stream:
        log.configure(dist.get_rank(), dist.get_world_size(), stream)
        _train(config)
        log.configure(dist.get_rank(), dist.get_world_size())


def _told(folder: Path) -> dict:
    return json.loads((folder / "exit.json").read_text())


def test_what_is_saved_beside_training_is_the_state_of_its_step(tmp_path):
    """Every step, while the next one is being trained; equal to saves that training waits for."""
    runs = [
        _config(tmp_path / f"{number}-{way}", case, async_save=way == "beside")
        for number, case in enumerate(CASES)
        for way in ("beside", "waited for")
    ]
    run_on_ranks(_train, 2, *runs, timeout=300)
    for number, case in enumerate(CASES):
        for step in range(1, STEPS + 1):
            ours, theirs = (
                read_manifest(tmp_path / f"{number}-{way}" / store.step_name(step)) for way in ("beside", "waited for")
            )
            # Among what is stored of a box is its checksum.
            assert ours.tensors == theirs.tensors, f"{case}, step {step}"
            assert ours.state == theirs.state


def _bytes_to_copy(cases: list[Case]) -> list[int]:
    found = []
    for case in cases:
        mesh = ProcessMesh.create(MeshShape(case.pipe, case.data, case.context, tensor=case.tensor))
        config = config_of(case)
        engine = build.build_engine(config, build.build_model_to_train(config, mesh, VOCABULARY), mesh)
        found.append(sum(piece.nbytes for piece in engine.pieces() if piece.owned))
    return found


def test_host_memory_for_copies_is_as_planned():
    by_rank = run_on_ranks(_bytes_to_copy, 2, CASES)
    for case, *copied in zip(CASES, *by_rank, strict=True):
        # Rows beyond the vocabulary are planned for, and not saved.
        assert 0.9 < max(copied) / host_copy_bytes(config_of(case), VOCABULARY, case.data) < 1.02, case


def _train_while_rank_one_has_no_space(config: RunConfig) -> None:
    fsync, seen = os.fsync, []

    def full(descriptor):
        seen.append(descriptor)
        if len(seen) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    if dist.get_rank() == 1:
        os.fsync = full
    _train_and_log(config)
    os.fsync = fsync


@pytest.mark.parametrize("beside", [True, False])
def test_a_full_disk_costs_one_checkpoint(beside, tmp_path):
    run_on_ranks(
        _train_while_rank_one_has_no_space, 2, _config(tmp_path / "run", Case(data=2, zero=1), async_save=beside)
    )
    assert list(store.steps(tmp_path / "run")) == [1, 3, 4]
    assert not list((tmp_path / "run").glob(".step-*"))
    said = (tmp_path / "run.log-0").read_text()
    assert "checkpoint of step 2 was not saved (rank 1: " in said and "No space left on device" in said
    assert "training goes on" in said and _told(tmp_path / "run")["cause"] == "done"


def _train_without_memory_on_rank_one(config: RunConfig) -> None:
    if dist.get_rank() == 1:

        def none(pieces):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        keeper.HostCopies = none
    _train_and_log(config)
    keeper.HostCopies = host_copies.HostCopies


def test_without_host_memory_training_waits_for_saves(tmp_path):
    run_on_ranks(_train_without_memory_on_rank_one, 2, _config(tmp_path / "run", Case(data=2, zero=0)))
    assert list(store.steps(tmp_path / "run")) == [1, 2, 3, 4]
    assert "not every rank has the host memory" in (tmp_path / "run.log-0").read_text()


def test_the_next_save_waits_for_the_one_before(tmp_path, monkeypatch, capfd):
    """One at a time, in order, and training goes on in between."""
    save, running, seen = keeper.save, threading.Lock(), []

    def watched(root, step, *arguments, **options):
        assert running.acquire(blocking=False), "two saves at once"
        seen.append((step, threading.current_thread() is threading.main_thread()))
        saved = save(root, step, *arguments, **options)
        running.release()
        return saved

    monkeypatch.setattr(keeper, "save", watched)
    _train(_config(tmp_path / "run", save_interval=2))
    assert seen == [(2, False), (4, True)], "the last one is waited for, and needs no copy"
    said = capfd.readouterr().err
    assert "GB of host memory on rank 0" in said and said.count("saved step ") == 2


def test_a_run_that_ends_badly_keeps_the_save_on_its_way(tmp_path, monkeypatch):
    """A loss that is not finite while step 2 is being saved: exit.json names step 2, which is there."""
    step, save, gate = loop.train_step, keeper.save, threading.Event()

    def failing(*arguments, **options):
        if options["step"] == 3:
            gate.set()
            raise NonFiniteError("planted")
        return step(*arguments, **options)

    def late(*arguments, **options):
        assert gate.wait(60)
        return save(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", failing)
    monkeypatch.setattr(keeper, "save", late)
    with pytest.raises(NonFiniteError, match="planted"):
        _train(_config(tmp_path / "run", save_interval=2))
    assert "goes on from step 2" in _told(tmp_path / "run")["how_to_go_on"]
    assert list(store.steps(tmp_path / "run")) == [2]


@pytest.mark.parametrize("error", [CheckpointError("the ranks' pieces do not fit"), RuntimeError("Broken pipe")])
def test_what_a_run_cannot_go_on_with_ends_it(error, tmp_path, monkeypatch):
    def failing(*arguments, **options):
        raise error

    monkeypatch.setattr(keeper, "save", failing)
    with pytest.raises(CheckpointError if isinstance(error, CheckpointError) else LostRankError, match=str(error)):
        _train(_config(tmp_path / "run"))


def test_a_run_goes_on_from_the_copy_of_its_folder(tmp_path):
    """Local disk first, a copy behind it; the local folder is lost, and in part older."""
    folder, url = tmp_path / "run", (tmp_path / "copies").as_uri()
    _train(_config(folder, save_copy_to=url, keep_last=2))
    assert list(store.steps(tmp_path / "copies")) == list(store.steps(folder)) == [3, 4]
    whole = read_manifest(folder / store.step_name(4))
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "copies" / store.step_name(4))
    _train(_config(folder, save_copy_to=url, resume="must"))
    assert list(store.steps(folder)) == [3, 4], "brought, and trained on from"
    assert read_manifest(folder / store.step_name(4)).tensors == whole.tensors
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "copies")
    with pytest.raises(CheckpointError, match=r"neither .*run nor file://.*copies holds a checkpoint"):
        _train(_config(folder, save_copy_to=url, resume="must"))


def test_every_nth_step_needs_a_number_of_newest(tmp_path):
    from megatron_lite.config.check import problems

    found = problems(sources.override(RunConfig(), {"checkpoint": {"save": str(tmp_path), "keep_every": 5}}), 1)
    assert any("give --keep-last N too" in text for text in found)
