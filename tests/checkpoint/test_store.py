"""The folder of checkpoints: who may write, what is kept, what a cut-off save left behind."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_lite.checkpoint import store
from megatron_lite.checkpoint.find import find
from megatron_lite.checkpoint.load import load
from megatron_lite.checkpoint.piece import Piece
from megatron_lite.checkpoint.save import save
from megatron_lite.errors import CheckpointError, CheckpointNotSaved

RUN = {"layout": "tp=1", "config": {}, "versions": {}}
pytestmark = pytest.mark.usefixtures("no_fsync")


def pieces(value):
    return [Piece("weight/w", (4,), (0,), torch.full((4,), float(value)), owned=True)]


def save_value(root, step, ranks, value=None, **how):
    return save(root, step, pieces(step if value is None else value), {"step": step}, ranks, **RUN, **how)


def value_in(folder, ranks):
    target = pieces(-1)
    load(folder, target, ranks)
    return target[0].tensor[0].item()


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_newest_is_found_and_a_step_can_be_asked_for(one_rank, tmp_path):
    assert find(tmp_path / "nowhere", one_rank) is None
    assert find(tmp_path, one_rank) is None and not store.holds_checkpoint(tmp_path)
    for step in (10, 30, 20, 25):
        save_value(tmp_path, step, one_rank)
    assert store.holds_checkpoint(tmp_path)
    assert find(tmp_path, one_rank, step=10) == tmp_path / "step-00000010"
    with pytest.raises(CheckpointError, match="holds no checkpoint of step 15; it holds 25, 20, 10"):
        find(tmp_path, one_rank, step=15)


def test_one_checkpoint_is_the_step_that_its_folder_stands_for(one_rank, tmp_path):
    folder = save_value(tmp_path, 10, one_rank).rename(tmp_path / "step-00000012")
    with pytest.raises(CheckpointError, match="step is 10, but the folder stands for 12"):
        find(folder, one_rank)
    assert find(folder.rename(tmp_path / "mine"), one_rank, step=10) == tmp_path / "mine"


def test_steps_of_an_abandoned_future_are_set_aside(one_rank, tmp_path, capsys):
    for step in (10, 20, 30):
        save_value(tmp_path, step, one_rank)
    save_value(tmp_path, 15, one_rank)
    assert find(tmp_path, one_rank) == tmp_path / "step-00000015"
    assert names(tmp_path) == [
        "abandoned-step-00000020", "abandoned-step-00000030", "latest", "step-00000010", "step-00000015",
    ]  # fmt: skip
    assert "to which this run went back: it is now abandoned-step-00000020" in capsys.readouterr().err
    save_value(tmp_path, 20, one_rank)
    save_value(tmp_path, 15, one_rank)
    assert len(list(tmp_path.glob("abandoned-step-00000020*"))) == 2


def test_saving_a_step_again_replaces_it(one_rank, tmp_path):
    save_value(tmp_path, 10, one_rank, value=1)
    folder = save_value(tmp_path, 10, one_rank, value=2)
    assert value_in(folder, one_rank) == 2
    assert names(tmp_path) == ["latest", "step-00000010"]


def test_latest_is_only_a_hint(one_rank, tmp_path):
    for step in (1, 2):
        save_value(tmp_path, step, one_rank)
    assert (tmp_path / "latest").read_text() == "step-00000002\n"
    for text in ("step-00000001\n", "../../etc\n", ""):
        (tmp_path / "latest").write_text(text)
        assert find(tmp_path, one_rank) == tmp_path / "step-00000002"


def test_newest_and_best_are_kept(one_rank, tmp_path):
    save_value(tmp_path, 1, one_rank, keep_last=2)
    for step in (2, 3, 4, 5):
        save_value(tmp_path, step, one_rank, keep_last=2, best_step=2)
    assert names(tmp_path) == ["best", "latest", "step-00000002", "step-00000004", "step-00000005"]
    assert store.best(tmp_path) == tmp_path / "step-00000002"
    save_value(tmp_path, 6, one_rank, keep_last=2, best_step=6)
    assert names(tmp_path) == ["best", "latest", "step-00000005", "step-00000006"]


def test_the_best_is_that_of_the_run_that_went_back(one_rank, tmp_path):
    def best_after(step, best_step):
        save_value(tmp_path, step, one_rank, best_step=best_step)
        kept = store.best(tmp_path)
        return kept and kept.name

    assert best_after(1, 1) == "step-00000001" and best_after(2, 2) == best_after(3, 2) == "step-00000002"
    # Back to 1, and 2 is another now, which nobody validated.
    assert best_after(2, 1) == "step-00000001"
    # The save of a better one failed: the best of those that are there stays.
    assert best_after(4, 3) == best_after(5, 3) == "step-00000001"
    # Back to before the first validation.
    assert best_after(1, None) is None and not (tmp_path / "best").exists()
    (tmp_path / "best").write_text("step-00000002\n")
    assert best_after(2, None) is None


def test_best_names_no_other_save_of_its_step(one_rank, tmp_path, monkeypatch):
    save_value(tmp_path, 2, one_rank, best_step=2)
    monkeypatch.setattr(store, "mark_best", lambda *how: None)  # as if the run were killed before
    save_value(tmp_path, 2, one_rank, best_step=2)
    assert store.best(tmp_path) == tmp_path / "step-00000002"
    save_value(tmp_path, 2, one_rank, best_step=1)
    assert store.best(tmp_path) is None


def test_abandoned_checkpoints_go_when_so_many_are_beyond_them(one_rank, tmp_path, capsys):
    for step in (10, 20, 30, 20):
        save_value(tmp_path, step, one_rank, keep_last=2)
    assert "it is now abandoned-step-00000030 (--keep-last N deletes it" in capsys.readouterr().err
    (tmp_path / "abandoned-step-00000030-0a1b2c3d").mkdir()
    (tmp_path / "abandoned-step-00000099").mkdir()
    for step in (25, 30, 35):
        save_value(tmp_path, step, one_rank, keep_last=2)
        assert len(list(tmp_path.glob("abandoned-*"))) == 3
    save_value(tmp_path, 40, one_rank, keep_last=2)
    assert [path.name for path in tmp_path.glob("abandoned-*")] == ["abandoned-step-00000099"]
    assert "abandoned-step-00000030: 2 checkpoints lie beyond it (--keep-last)" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["../outside", "step-00000009", "", "latest"])
def test_a_best_that_leads_nowhere_is_none(text, tmp_path):
    assert store.best(tmp_path) is None
    (tmp_path / "best").write_text(text)
    assert store.best(tmp_path) is None


def test_pruning_is_oldest_first_and_after_publishing(one_rank, tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save_value(tmp_path, step, one_rank)
    moves = []
    rename = os.rename
    monkeypatch.setattr("os.rename", lambda a, b: moves.append((a.name, b.name)) or rename(a, b))
    save_value(tmp_path, 4, one_rank, keep_last=1)
    assert moves[0][1] == "step-00000004"
    assert [source for source, _ in moves[1:]] == ["step-00000001", "step-00000002", "step-00000003"]
    assert names(tmp_path) == ["latest", "step-00000004"]


def test_failing_to_prune_costs_no_checkpoint(one_rank, tmp_path, monkeypatch, capsys):
    save_value(tmp_path, 1, one_rank)

    def refuse(root, keep_last, *spared):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(store, "prune", refuse)
    assert find(tmp_path, one_rank) is not None
    save_value(tmp_path, 2, one_rank, keep_last=1)
    assert find(tmp_path, one_rank) == tmp_path / "step-00000002"
    assert "could not be tidied" in capsys.readouterr().err


def test_nothing_is_pruned_while_the_best_is_not_known(one_rank, tmp_path, monkeypatch, capsys):
    save_value(tmp_path, 1, one_rank, best_step=1)
    save_value(tmp_path, 2, one_rank, best_step=1)
    read = Path.read_text

    def failing(self, *how, **options):
        if self.name == "best":
            raise OSError(errno.EIO, "Input/output error")
        return read(self, *how, **options)

    monkeypatch.setattr(Path, "read_text", failing)
    save_value(tmp_path, 3, one_rank, keep_last=1, best_step=1)
    assert list(store.steps(tmp_path)) == [1, 2, 3]
    assert "could not be tidied: [Errno 5]" in capsys.readouterr().err
    monkeypatch.undo()
    save_value(tmp_path, 4, one_rank, keep_last=1, best_step=1)
    assert list(store.steps(tmp_path)) == [1, 4]


def test_leftovers_are_swept_and_nothing_else(one_rank, tmp_path):
    save_value(tmp_path, 1, one_rank)
    kept = [
        "mine.txt",
        ".hidden",
        ".step-00000002.tmp-mine",
        ".notes.tmp-0a1b2c3d",
        "abandoned-step-00000009",
        "step-2",
    ]
    for name in kept:
        (tmp_path / name).mkdir()
    for name in (".step-00000002.tmp-0a1b2c3d", ".step-00000001.old-0a1b2c3d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / ".latest.tmp-0a1b2c3d").write_text("step")
    with store.claim(tmp_path, one_rank):
        assert names(tmp_path) == sorted([*kept, ".lock", "latest", "step-00000001"])


def test_a_checkpoint_moved_aside_is_still_there(one_rank, tmp_path):
    """Killed between the two renames of a replacement: found where it is, and put back by the next run."""
    os.rename(save_value(tmp_path, 7, one_rank), tmp_path / ".step-00000007.old-0a1b2c3d")
    folder = find(tmp_path, one_rank)
    assert value_in(folder, one_rank) == 7
    with store.claim(tmp_path, one_rank):
        assert find(tmp_path, one_rank) == tmp_path / "step-00000007"


HOLD = """
import sys, time
from megatron_lite.checkpoint.store import claim
class One:
    global_rank, world_size = 0, 1
    def gather_json(self, value): return [value]
with claim(sys.argv[1], One()):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_refuse_each_other(as_ranks, one_rank, tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"

        def enter(ranks):
            with store.claim(tmp_path, ranks):
                raise AssertionError("both runs may write")

        for outcome in as_ranks(enter, 2):
            assert isinstance(outcome, CheckpointError)
            assert f"process {other.pid} on " in str(outcome) and "--save folder of its own" in str(outcome)
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    with store.claim(tmp_path, one_rank):
        pass
    with store.claim(tmp_path, one_rank):
        pass


def test_ranks_at_different_steps_save_nothing(as_ranks, tmp_path):
    outcomes = as_ranks(lambda ranks: save_value(tmp_path, 5 + ranks.global_rank, ranks), 2)
    assert [str(outcome) for outcome in outcomes] == [str(outcomes[0])] * 2
    assert "different steps, [5, 6]" in str(outcomes[0]) and isinstance(outcomes[0], CheckpointError)
    assert names(tmp_path) == []


def test_pieces_that_do_not_tile_are_refused(as_ranks, tmp_path):
    """Both ranks own the same values: a mistake of the caller, not of the disk."""
    outcomes = as_ranks(lambda ranks: save_value(tmp_path, 5, ranks), 2)
    assert all(type(outcome) is CheckpointError for outcome in outcomes)
    assert "element [0] lies in more than one box" in str(outcomes[0]) and str(outcomes[0]) == str(outcomes[1])
    assert names(tmp_path) == []


def test_a_disk_too_small_is_known_beforehand(as_ranks, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=10**9, free=2 * 10**5))
    outcomes = as_ranks(lambda ranks: save_value(tmp_path, 5, ranks), 2)
    assert all(isinstance(outcome, CheckpointNotSaved) for outcome in outcomes)
    assert "it needs 0.001 GB and" in str(outcomes[1]) and "has 0.000 GB free" in str(outcomes[1])
    assert names(tmp_path) == []
