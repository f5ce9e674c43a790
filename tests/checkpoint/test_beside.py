"""Saves beside training: killed, stopped or refused at any point on any rank, as saves that training waits for are."""

import errno
import fcntl
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from checkpoint.forked import fork_ranks
from checkpoint.test_failures import RUN, interrupt_at, pieces, value_in
from ranks import run_on_ranks

from megatron_lite.checkpoint import shard, store
from megatron_lite.checkpoint.background import Background
from megatron_lite.checkpoint.find import find
from megatron_lite.checkpoint.host_copies import HostCopies
from megatron_lite.checkpoint.piece import Piece
from megatron_lite.checkpoint.save import save
from megatron_lite.errors import CheckpointError
from megatron_lite.kernels.code_maps import blocks
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh

OLD, NEW = 1, 2


def save_beside(root, step, ranks, **how):
    """Save in the background, and spoil the originals as soon as that is allowed."""
    live = pieces(step, ranks.global_rank, ranks.world_size)
    copying = HostCopies(live).begin(lambda: live)
    work = Background("save", lambda: save(root, step, copying.finish(), {"value": step}, ranks, **RUN, **how))
    copying.allow_change()
    for piece in live:
        piece.tensor.fill_(-7)
    assert work.wait(60)
    return work.result()


def save_and_wait(root, step, ranks, **how):
    return save(root, step, pieces(step, ranks.global_rank, ranks.world_size), {"value": step}, ranks, **RUN, **how)


WAYS = {"beside training": save_beside, "training waits": save_and_wait}


def _copies_of(template, folder, way):
    """Save to each copy of `template` on two ranks, one of them killed at each of its points; what came of it."""
    seen = {}
    for dying in (0, 1):
        point, points = -1, 0
        while point < points:
            root = shutil.copytree(template, folder / f"{way}-{dying}-{point}")
            told = folder / f"told-{way}-{dying}"

            def act(rank, root=root, told=told, dying=dying, point=point):
                calls = interrupt_at(point if rank.global_rank == dying else -1)
                WAYS[way](root, NEW, rank, keep_last=1)
                (root / f"acknowledged-{rank.global_rank}").touch()
                if point < 0 and rank.global_rank == dying:
                    told.write_text(" ".join(calls))

            statuses = [os.waitpid(process, 0)[1] for process in fork_ranks(act, 2)]
            if point < 0:
                assert statuses == [0, 0]
                points = len(told.read_text().split())
            else:
                assert os.WIFSIGNALED(statuses[dying]) and os.WTERMSIG(statuses[dying]) == signal.SIGKILL
            seen[dying, point] = sorted(path.name for path in root.glob("acknowledged-*"))
            point += 1
    return seen


@pytest.mark.parametrize("way", WAYS)
def test_a_kill_at_any_point_of_any_rank_leaves_a_complete_checkpoint(way, as_ranks, one_rank, tmp_path, no_fsync):
    template = tmp_path / "template"
    as_ranks(lambda ranks: save_and_wait(template, OLD, ranks), 2)
    [seen] = run_on_ranks(_copies_of, 1, template, tmp_path, way)
    assert len([point for dying, point in seen if dying == 0]) > 15
    assert len([point for dying, point in seen if dying == 1]) > 5
    outcomes = {}
    for (dying, point), acknowledged in seen.items():
        root = tmp_path / f"{way}-{dying}-{point}"
        outcomes.setdefault(dying, {})[point] = value = value_in(find(root, one_rank), one_rank)
        assert value == NEW or not acknowledged, f"rank {dying} killed at {point}: acknowledged and lost"
        # The next run sweeps, and saves the step again.
        with store.claim(root, one_rank):
            assert not list(root.glob(".step-*"))
            save_and_wait(root, NEW, one_rank)
        assert value_in(find(root, one_rank), one_rank) == NEW
    for by_point in outcomes.values():
        assert {*by_point.values()} == {OLD, NEW} or min(by_point) < 0
        in_order = [by_point[point] for point in sorted(by_point) if point >= 0]
        assert in_order == sorted(in_order), "once the new one is there it stays"


@pytest.mark.parametrize("then", [signal.SIGCONT, signal.SIGKILL])
def test_a_rank_that_is_stopped_during_a_save(then, as_ranks, one_rank, tmp_path, no_fsync):
    as_ranks(lambda ranks: save_and_wait(tmp_path, OLD, ranks), 2)
    run_on_ranks(_stop_rank_one, 1, tmp_path, then)
    assert value_in(find(tmp_path, one_rank), one_rank) == (NEW if then == signal.SIGCONT else OLD)


def _stop_rank_one(root, then):
    crc32 = shard.crc32

    def act(rank):
        def stop(*values):
            os.kill(os.getpid(), signal.SIGSTOP)
            shard.crc32 = crc32
            return crc32(*values)

        if rank.global_rank == 1:
            shard.crc32 = stop
        save_beside(root, NEW, rank)

    first, second = fork_ranks(act, 2)
    _, status = os.waitpid(second, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert os.waitpid(first, os.WNOHANG) == (0, 0), "the other rank cannot have published"
    assert find(root, ProcessMesh(MeshShape(), 0)).name == store.step_name(OLD)
    os.kill(second, then)
    codes = [os.waitpid(process, 0)[1] for process in (first, second)]
    assert codes == [0, 0] if then == signal.SIGCONT else all(codes)


def test_originals_may_change_only_when_they_are_copied():
    live = pieces(1, 0, 1)
    copying = HostCopies(live).begin(lambda: live)
    changed = threading.Thread(target=lambda: (copying.allow_change(), live[0].tensor.fill_(2)))
    changed.start()
    changed.join(0.1)
    assert changed.is_alive()
    copies = copying.finish()
    changed.join(30)
    assert live[0].tensor.unique().tolist() == [2] and copies[0].tensor.unique().tolist() == [1]


def test_host_memory_is_used_again_and_holds_what_is_owned_alone():
    whole = torch.arange(600, dtype=torch.uint8)
    live = [
        Piece("weight/a", (3, 5), (0, 0), torch.arange(15.0).view(3, 5), owned=True),
        Piece("weight/b", (2,), (0,), torch.ones(2, dtype=torch.bfloat16), owned=False),
        Piece("weight/c", (), (), torch.tensor(4.5), owned=True),
        Piece("exp_avg/a", (2, 300), (0, 0), whole.view(2, 300), True, absmax=torch.rand(blocks(600)), signed=True),
    ]
    copies = HostCopies(live)
    assert copies.nbytes == 64 + 64 + 640 + 64
    first = copies.begin(lambda: live).finish()
    assert [piece.name for piece in first] == ["weight/a", "weight/c", "exp_avg/a"]
    live[0].tensor.add_(1)
    again = copies.begin(lambda: live).finish()
    for copy, original in zip(again, (live[0], live[2], live[3]), strict=True):
        assert torch.equal(copy.tensor, original.tensor) and copy.bytes_view() == original.bytes_view()
    assert [a.tensor.data_ptr() for a in first] == [a.tensor.data_ptr() for a in again]


def test_every_nth_step_is_kept_beside_the_newest(one_rank, tmp_path, no_fsync):
    for step in range(1, 10):
        save_and_wait(tmp_path, step, one_rank, keep_last=2, keep_every=3, spared=[4])
    assert list(store.steps(tmp_path)) == [3, 4, 6, 8, 9]


def test_a_run_whose_folder_another_host_took_saves_no_more(one_rank, tmp_path, monkeypatch, no_fsync, capsys):
    """Where locks are not seen across hosts, the later run has the folder."""

    def no_locks(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with store.claim(tmp_path, one_rank) as first:
        save_and_wait(tmp_path, 1, one_rank, claim=first)
        with store.claim(tmp_path, one_rank) as second:
            with pytest.raises(CheckpointError, match=r"process \d+ on .* is saving there; stop it"):
                save_and_wait(tmp_path, 2, one_rank, claim=first)
            save_and_wait(tmp_path, 2, one_rank, claim=second)
    assert capsys.readouterr().err.count("cannot be locked (No locks available)") == 2
    assert list(store.steps(tmp_path)) == [1, 2]


def test_a_lock_that_was_deleted_is_taken_again(one_rank, tmp_path, no_fsync):
    with store.claim(tmp_path, one_rank) as claim:
        (tmp_path / ".lock").unlink()
        save_and_wait(tmp_path, 1, one_rank, claim=claim)
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_task_is_over_with_its_result_or_its_error(tmp_path):
    gate = threading.Event()
    task = Background("task", lambda: gate.wait() and Path("there"))
    assert not task.wait(0.01) and not task.is_done
    gate.set()
    assert task.wait(30) and task.result() == Path("there") and task.ended is not None
    failing = Background("task", lambda: 1 / 0)
    assert failing.wait(30) and isinstance(failing.error, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        failing.result()
