import json

import pytest
import torch

from megatron_lite.monitor.exit_file import remove_exit, write_exit
from megatron_lite.monitor.health import describe, first_hurt
from megatron_lite.monitor.versions import git_commit, versions


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_the_first_offending_tensor_is_named(loss):
    sound, odd = torch.ones(4), torch.tensor([1.0, float("nan"), float("inf")])
    looked_at = []

    def weights(*tensors):
        for name, tensor in zip("abcd", tensors, strict=False):
            looked_at.append(name)
            yield name, tensor

    first = first_hurt(weights(sound, odd, odd), 3, is_gradient=False)
    assert looked_at == ["a", "b", "c"], "getting a tensor is collective: all ranks go through all"
    assert first == (False, 1, 3, "b", 2, 3) and first_hurt(weights(sound), 0, is_gradient=False) is None
    earlier_rank = first_hurt(weights(sound, odd), 2, is_gradient=False)
    gradient = first_hurt(weights(odd), 0, is_gradient=True)
    later = first_hurt(weights(sound, sound, odd), 0, is_gradient=False)
    assert min(first, gradient, later, earlier_rank) == earlier_rank

    text = describe(loss, step=120, ranks=[1, 3], hurt=first)
    assert text.startswith(f"step 120: the loss is {loss} on rank 1; the first non-finite weight is b on rank 3 (2 of")
    assert "--skip-samples" in text and "data ranks" not in text
    text = describe(loss, step=1, what="gradient norm", hurt=gradient, data_size=4)
    assert f"the gradient norm is {loss}; the first non-finite gradient is a on rank 0 (2 of 3 elements, summed" in text
    assert "finite, so what became the loss overflowed" in describe(loss, step=1)
    assert "gradients are not held any more" in describe(loss, step=1, holds_gradients=False)


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
    # A build for a GPU says "2.13.0+cu130" of itself, and is installed as 2.13.0.
    assert torch.__version__.startswith(found["torch"]) and found["devices"] == ["cpu"]
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
