"""Kills, full disks and damaged bytes: the last complete checkpoint loads, all ranks agree, nothing is left over."""

import builtins
import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import run_on_ranks

from megatron_lite.checkpoint import shard, store
from megatron_lite.checkpoint.background import Background
from megatron_lite.checkpoint.find import find, verify
from megatron_lite.checkpoint.load import load
from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.checkpoint.piece import Piece
from megatron_lite.checkpoint.save import save
from megatron_lite.errors import CheckpointDamaged, CheckpointError, CheckpointNotSaved, MegatronLiteError
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh

RUN = {"layout": "dp=2", "config": {}, "versions": {}}
ROWS = 8


def pieces(value, rank, size):
    """Rows of two tensors, split over the ranks."""
    rows = ROWS // size
    return [
        Piece(name, (ROWS, 3), (rank * rows, 0), torch.full((rows, 3), float(value)), owned=True)
        for name in ("weight/w", "exp_avg/w")
    ]


def save_value(root, step, ranks, value=None, **how):
    mine = pieces(step if value is None else value, ranks.global_rank, ranks.world_size)
    return save(root, step, mine, {"value": step if value is None else value}, ranks, **RUN, **how)


save_here = save_value


def value_in(folder, ranks):
    """The one value all of a checkpoint holds."""
    target = pieces(-1, ranks.global_rank, ranks.world_size)
    state = load(folder, target, ranks)
    values = set(torch.stack([piece.tensor for piece in target]).unique().tolist())
    assert values == {state["value"]}, f"a mix of checkpoints: {values}, {state}"
    return state["value"]


# The calls by which a save touches the disk, plus one between the chunks of a file.
POINTS = [(os, "mkdir"), (builtins, "open"), (shard, "crc32"), (os, "fsync"), (os, "rename"), (os, "replace"),
          (os, "unlink"), (os, "rmdir")]  # fmt: skip


def interrupt_at(point):
    """Kill this process where the point-th of those calls would begin; returns the calls seen so far."""
    seen = []

    def wrap(module, name):
        call = getattr(module, name)

        def wrapped(*args, **kwargs):
            seen.append(name)
            if len(seen) - 1 == point:
                os.kill(os.getpid(), signal.SIGKILL)
            # A kill, unlike a power cut, loses nothing that was written: no need to wait for the disk.
            return None if name == "fsync" else call(*args, **kwargs)

        setattr(module, name, wrapped)

    for module, name in POINTS:
        wrap(module, name)
    return seen


def _die_at_every_point(template, folder, how):
    """A save of each copy of `template`, the n-th one in a process killed at its n-th call; the calls."""

    def save_copy(name, point):
        root = shutil.copytree(template, folder / name)
        seen = interrupt_at(point)
        save_value(root, ranks=ProcessMesh(MeshShape(), 0), **how)
        return seen

    receiving, sending = multiprocessing.Pipe(duplex=False)
    point, calls = -1, [None]
    while point < len(calls):
        child = os.fork()
        if child == 0:
            sending.send(save_copy(str(point), point))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if point == -1:
            calls = receiving.recv()
        else:
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (point, status)
        point += 1
    return calls


@pytest.mark.parametrize(
    ("before", "how", "left"),
    [
        ([1, 2], {"step": 3, "keep_last": 1, "best_step": 3}, ["best", "latest", "step-00000003"]),
        ([1], {"step": 1, "value": 9}, ["latest", "step-00000001"]),
    ],
    ids=["new step", "same step again"],
)
def test_a_kill_at_any_point_leaves_a_complete_checkpoint(before, how, left, one_rank, tmp_path, no_fsync):
    template = tmp_path / "template"
    for step in before:
        save_value(template, step, one_rank)
    old, new = before[-1], how.get("value", how["step"])
    [calls] = run_on_ranks(_die_at_every_point, 1, template, tmp_path, how)
    assert {"mkdir", "open", "crc32", "fsync", "rename", "replace", "unlink"} <= set(calls)
    outcomes = []
    for point in range(len(calls)):
        root = tmp_path / str(point)
        outcomes.append(value_in(find(root, one_rank), one_rank))
        with store.claim(root, one_rank):
            assert value_in(find(root, one_rank), one_rank) == outcomes[-1]
            save_value(root, ranks=one_rank, **how)
        assert value_in(find(root, one_rank), one_rank) == new
        assert sorted(path.name for path in root.iterdir()) == [".lock", *left]
    # Once the new one is there it stays: it never goes back and forth.
    assert outcomes == sorted(outcomes) and set(outcomes) == {old, new}


def test_names_appear_only_after_what_they_name_is_on_disk(one_rank, tmp_path, monkeypatch):
    save_value(tmp_path, 1, one_rank)
    events = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def note_fsync(descriptor):
        events.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", note_fsync)
    monkeypatch.setattr("os.rename", lambda a, b: events.append(f"{a.name} -> {b.name}") or rename(a, b))
    monkeypatch.setattr("os.replace", lambda a, b: events.append(f"{a.name} -> {b.name}") or replace(a, b))
    monkeypatch.setattr(store, "new_token", lambda: "0a1b2c3d")
    save_value(tmp_path, 2, one_rank, keep_last=1)
    assert events == [
        "fsync rank-00000.safetensors",
        "fsync manifest.json",
        "fsync .step-00000002.tmp-0a1b2c3d",
        ".step-00000002.tmp-0a1b2c3d -> step-00000002",
        f"fsync {tmp_path.name}",
        "fsync .latest.tmp-0a1b2c3d",
        ".latest.tmp-0a1b2c3d -> latest",
        f"fsync {tmp_path.name}",
        "step-00000001 -> .step-00000001.tmp-0a1b2c3d",
    ]


def _two_ranks_one_dies(root, dying, point):
    mesh = ProcessMesh.create(MeshShape(data=2))
    interrupt_at(point if mesh.global_rank == dying else -1)
    save_value(root, 2, mesh)


@pytest.mark.parametrize(("dying", "point"), [(0, 3), (1, 3), (1, 5), (0, 8)])
def test_a_rank_killed_among_others(dying, point, as_ranks, tmp_path):
    as_ranks(lambda ranks: save_value(tmp_path, 1, ranks), 2)
    with pytest.raises(AssertionError, match=r"rank [01] of 2"):
        run_on_ranks(_two_ranks_one_dies, 2, tmp_path, dying, point, timeout=30)
    assert as_ranks(lambda ranks: value_in(find(tmp_path, ranks), ranks), 2) == [1, 1]


@contextmanager
def failing(module, name, number, matches):
    """`module.name` raises OSError `number` when `matches` its first argument."""
    call = getattr(module, name)

    def wrapped(first, *args, **kwargs):
        if matches(str(first)):
            raise OSError(number, os.strerror(number), str(first))
        return call(first, *args, **kwargs)

    setattr(module, name, wrapped)
    try:
        yield
    finally:
        setattr(module, name, call)


@contextmanager
def small_files(size):
    """A real refusal by the kernel in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FAULTS = {
    "no space while rank 1 writes": (1, lambda: failing(os, "fsync", errno.ENOSPC, str.isdigit), "No space left"),
    "no space on rank 0": (0, lambda: failing(os, "fsync", errno.ENOSPC, str.isdigit), "No space left"),
    "file of rank 1 cut short": (1, lambda: small_files(100), "File too large"),
    "folder refused on rank 1": (1, lambda: failing(Path, "mkdir", errno.EACCES, lambda p: ".tmp-" in p), "denied"),
    "manifest refused": (0, lambda: failing(builtins, "open", errno.EIO, lambda p: "manifest" in p), "Input/output"),
    "rename refused": (0, lambda: failing(os, "rename", errno.EIO, lambda p: ".tmp-" in p), "Input/output"),
}


def _fail_each_way(root, beside):
    mesh = ProcessMesh.create(MeshShape(data=2))
    exchange = mesh.make_exchange()

    def save_value(*arguments, **how):
        if not beside:
            return save_here(*arguments, **how)
        task = Background("save", lambda: save_here(*arguments[:-1], exchange, **how))
        assert task.wait(100)
        return task.result()

    save_value(root, 1, mesh)
    outcomes = {}
    for fault, (rank, inject, _) in FAULTS.items():
        try:
            if mesh.global_rank == rank:
                with inject():
                    save_value(root, 2, mesh)
            else:
                save_value(root, 2, mesh)
        except CheckpointNotSaved as error:
            outcomes[fault] = str(error)
        # The second of these reads what rank 0 has finished removing.
        mesh.barrier()
        outcomes[f"left by {fault}"] = sorted(path.name for path in root.iterdir())
        mesh.barrier()
    late = time.monotonic() - 1 if mesh.global_rank == 1 else None
    try:
        save_value(root, 2, mesh, deadline=lambda: late)
    except CheckpointNotSaved as error:
        outcomes["late"] = str(error)
    outcomes["value before"] = value_in(find(root, mesh), mesh)
    save_value(root, 2, mesh)
    outcomes["value after"] = value_in(find(root, mesh), mesh)
    return outcomes


@pytest.mark.parametrize("beside", [False, True], ids=["training waits", "beside training"])
def test_a_failure_on_one_rank_is_the_same_exception_on_all(beside, tmp_path):
    first, second = run_on_ranks(_fail_each_way, 2, tmp_path, beside)
    assert first == second
    for fault, (rank, _, text) in FAULTS.items():
        assert f"rank {rank}: " in first[fault] and text in first[fault], first[fault]
        assert "step 2 was not saved" in first[fault]
        assert first[f"left by {fault}"] == ["latest", "step-00000001"]
    assert "rank 1: " in first["late"] and "time for this save is used up" in first["late"]
    assert (first["value before"], first["value after"]) == (1, 2)


def damaged_copies(folder):
    """(what was done, the file at fault, the damage as a function of a copy) for every file of a checkpoint."""
    generator = random.Random(5)
    for name in sorted(path.name for path in folder.iterdir()):
        size = (folder / name).stat().st_size
        for position in {0, 7, 8, size - 1, *(generator.randrange(size) for _ in range(3))}:
            yield f"{name} bit {position}", name, lambda copy, name=name, at=position: flip(copy / name, at)
        yield f"{name} cut", name, lambda copy, name=name, half=size // 2: os.truncate(copy / name, half)
        yield f"{name} longer", name, lambda copy, name=name: append(copy / name)
        yield f"{name} gone", name, lambda copy, name=name: (copy / name).unlink()
        yield f"{name} a link", name, lambda copy, name=name: relink(copy / name)
    shards = ["rank-00000.safetensors", "rank-00001.safetensors"]
    yield "swapped", shards[0], lambda copy: swap(copy / shards[0], copy / shards[1])


def flip(path, position):
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1 << position % 8
    path.write_bytes(raw)


def append(path):
    with open(path, "ab") as file:
        file.write(b"x")


def relink(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def swap(a, b):
    a.rename(a.with_name("aside"))
    b.rename(a)
    a.with_name("aside").rename(b)


def test_any_damage_is_named_and_the_step_before_is_used(as_ranks, one_rank, tmp_path, no_fsync, capsys):
    for step in (1, 2):
        as_ranks(lambda ranks, step=step: save_value(tmp_path, step, ranks), 2)
    intact = tmp_path / "step-00000002"
    kept = shutil.copytree(intact, tmp_path / "kept")
    for what, file, damage in damaged_copies(kept):
        shutil.rmtree(intact)
        shutil.copytree(kept, intact)
        damage(intact)
        capsys.readouterr()
        assert as_ranks(lambda ranks: find(tmp_path, ranks), 2) == [tmp_path / "step-00000001"] * 2, what
        said = capsys.readouterr().err
        assert str(intact / file) in said and "that can be used is" in said, (what, said)
        with pytest.raises(CheckpointError, match=file):
            load(intact, pieces(0, 0, 1), one_rank)
        with pytest.raises(CheckpointError, match=file):
            verify(intact)
    with pytest.raises(CheckpointError, match=r"no checkpoint under .* can be used:\n.*step-00000002"):
        find(tmp_path, one_rank, step=2)
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match="no checkpoint under"):
        find(tmp_path, one_rank)


def test_damage_outside_what_is_asked_for_does_not_matter(one_rank, tmp_path, no_fsync):
    """`only` reads no optimizer state, so damage there does not stand in the way of the weights."""
    folder = save_value(tmp_path, 1, one_rank)
    flip(folder / "rank-00000.safetensors", (folder / "rank-00000.safetensors").stat().st_size - ROWS * 3 * 4 - 1)
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors: bytes .* do not match their checksum"):
        find(tmp_path, one_rank)
    assert find(tmp_path, one_rank, only="weight/") == folder


def test_a_checkpoint_under_another_steps_name_is_refused(one_rank, tmp_path, no_fsync, capsys):
    save_value(tmp_path, 1, one_rank)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000005")
    assert find(tmp_path, one_rank) == tmp_path / "step-00000001"
    assert "step is 1, but the folder stands for 5" in capsys.readouterr().err


def test_an_interrupted_read_ends_with_what_is_being_read(monkeypatch):
    read = []

    def slow(reader, task):
        read.append(task)
        time.sleep(0.01)

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shard.by_readers(Path(), SimpleNamespace(chunk_bytes=1), range(2000), slow)
    assert len(read) < 2000


@pytest.mark.parametrize(
    ("planted", "raised", "elsewhere"),
    [
        (RuntimeError("out of device memory"), RuntimeError, MegatronLiteError),
        (OSError(errno.EMFILE, "Too many open files"), CheckpointError, CheckpointError),
        (OSError(errno.EIO, "Input/output error"), CheckpointDamaged, CheckpointDamaged),
    ],
)
def test_what_says_nothing_against_a_checkpoint_is_no_damage(
    planted, raised, elsewhere, as_ranks, tmp_path, no_fsync, monkeypatch
):
    folder = as_ranks(lambda ranks: save_value(tmp_path, 1, ranks), 2)[0]
    manifest = read_manifest(folder)

    def refuse(path):
        if path.name.startswith("rank-00001"):
            raise planted
        return open(path, "rb")

    monkeypatch.setattr(shard, "open_regular", refuse)
    outcomes = as_ranks(lambda ranks: load(folder, pieces(0, ranks.global_rank, 2), ranks, manifest=manifest), 2)
    assert [type(outcome) for outcome in outcomes] == [elsewhere, raised]
    assert all(str(planted.args[-1]) in str(outcome) for outcome in outcomes)


def test_a_damaged_tensor_is_the_same_error_on_every_rank(as_ranks, tmp_path, no_fsync):
    folder = as_ranks(lambda ranks: save_value(tmp_path, 1, ranks), 2)[0]
    flip(folder / "rank-00001.safetensors", (folder / "rank-00001.safetensors").stat().st_size - 1)
    outcomes = as_ranks(lambda ranks: load(folder, pieces(0, ranks.global_rank, 2), ranks), 2)
    assert all(isinstance(outcome, CheckpointError) for outcome in outcomes)
    assert str(outcomes[0]) == str(outcomes[1]) and "rank 1: " in str(outcomes[0])
