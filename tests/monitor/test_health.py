import json

import pytest
import torch

from megatron_lite.monitor.exit_file import remove_exit, write_exit
from megatron_lite.monitor.health import describe
from megatron_lite.monitor.memory import MemoryMeter, peak_resident_bytes, resident_bytes
from megatron_lite.monitor.metrics import METRICS
from megatron_lite.monitor.versions import git_commit, versions


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_the_first_offending_tensor_is_named(loss):
    sound, odd = torch.ones(4), torch.tensor([1.0, float("nan"), float("inf")])
    weights = [("a", sound), ("layers.3.mlp.up.weight", odd), ("z", odd)]
    text = describe(loss, step=120, rank=3, weights=weights)
    assert text.startswith(f"step 120: the loss is {loss} on rank 3; the first non-finite weight is layers.3.mlp.up")
    assert "(2 of 3 elements)" in text and "--skip-samples" in text
    text = describe(loss, step=1, rank=0, weights=[("a", sound)], gradients=[("a", None), ("b", odd)])
    assert "non-finite gradient is b (2 of 3" in text
    assert "an activation overflowed" in describe(loss, step=1, rank=0, weights=[("a", sound)])


def test_exit_file(tmp_path):
    path = write_exit(tmp_path / "run", "signal", 0, 17, "run the same command again")
    record = json.loads(path.read_text())
    assert record.items() >= {"cause": "signal", "code": 0, "step": 17}.items()
    assert record["how_to_go_on"] == "run the same command again"
    assert [entry.name for entry in path.parent.iterdir()] == ["exit.json"]
    remove_exit(path.parent)
    remove_exit(path.parent)
    assert not path.exists()


def test_versions_name_what_is_installed():
    found = versions(["cpu"])
    assert found["torch"] == torch.__version__ and found["devices"] == ["cpu"]
    json.dumps(found)


def test_the_commit_is_read_from_every_form_git_keeps_it_in(tmp_path):
    commit, other = "a" * 40, "b" * 40
    git = tmp_path / "repository" / ".git"
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text(f"# pack-refs with: peeled\n{other} refs/heads/old\n{commit} refs/heads/main\n")
    assert git_commit(git.parent) == commit
    (git / "refs/heads/main").write_text(other + "\n")
    assert git_commit(git.parent) == other
    worktree, private = tmp_path / "worktree", git / "worktrees/w"
    worktree.mkdir()
    private.mkdir(parents=True)
    (worktree / ".git").write_text(f"gitdir: {private}\n")
    (private / "HEAD").write_text("ref: refs/heads/main\n")
    (private / "commondir").write_text("../..\n")
    assert git_commit(worktree) == other
    (private / "HEAD").write_text(commit + "\n")
    assert git_commit(worktree) == commit
    assert git_commit(tmp_path) is None


def test_the_peak_grows_with_what_is_allocated():
    meter = MemoryMeter("cpu")
    # Fresh memory can come from what the process already held, so more than it could hide is taken.
    held = torch.ones(64 * 2**20, dtype=torch.float32)
    assert resident_bytes() >= held.nbytes
    assert peak_resident_bytes() >= resident_bytes() - 2**20
    used = meter.metrics()
    assert set(used) <= set(METRICS) and used["memory_allocated"] > held.nbytes
    del held
    assert meter.peak_growth() >= 0
