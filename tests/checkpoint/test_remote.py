"""Copies behind a URL: complete or not there, checked when they are brought back, and of no cost when they fail."""

import hashlib
import shutil
import socket
from pathlib import Path

import fsspec
import pytest
from checkpoint.test_failures import save_value, value_in

from megatron_lite.checkpoint import store
from megatron_lite.checkpoint.manifest import FILE_NAME
from megatron_lite.checkpoint.remote import RemoteCopies, find_newest
from megatron_lite.errors import CheckpointError, ConfigError

URL = "memory://copies/of a run"


@pytest.fixture
def copies(no_fsync):
    yield RemoteCopies(URL)
    fsspec.filesystem("memory").rm("/copies", recursive=True)


def save_and_send(root, step, ranks, copies, **kept):
    return copies.send(save_value(root, step, ranks), ranks, **kept)


def flip(path):
    files = fsspec.filesystem("memory")
    raw = bytearray(files.cat_file(path))
    raw[-1] ^= 1
    files.pipe_file(path, bytes(raw))


def test_a_copy_is_sent_by_all_ranks_and_brought_by_all(as_ranks, copies, tmp_path):
    assert as_ranks(lambda ranks: save_and_send(tmp_path / "here", 1, ranks, copies), 2) == [True, True]
    assert copies.steps() == [1]
    found = as_ranks(lambda ranks: find_newest(tmp_path / "there", ranks, copies=copies).folder, 2)
    assert found == [tmp_path / "there" / "step-00000001"] * 2
    files = sorted(path.name for path in found[0].iterdir())
    assert files == [FILE_NAME, "rank-00000.safetensors", "rank-00001.safetensors"]
    for name in files:
        assert (found[0] / name).read_bytes() == (tmp_path / "here" / "step-00000001" / name).read_bytes()


def test_the_newest_of_both_is_used(one_rank, copies, tmp_path, capsys):
    for step in (1, 2, 3):
        save_and_send(tmp_path, step, one_rank, copies)
    save_value(tmp_path, 4, one_rank)

    def newest(step=None):
        return value_in(find_newest(tmp_path, one_rank, step, copies).folder, one_rank)

    assert newest() == 4
    shutil.rmtree(tmp_path / "step-00000004")
    shutil.rmtree(tmp_path / "step-00000003")
    assert newest(step=2) == 2 and newest() == 3
    # Damaged here, whole there: taken from there.
    (tmp_path / "step-00000003" / FILE_NAME).write_text("{}")
    assert newest() == 3
    said = capsys.readouterr().err
    assert "that can be used is" in said.splitlines()[-2] and "brought step 3 from" in said.splitlines()[-1]
    assert "going back" not in said, "a newer one is brought after it"
    # Of a step that is damaged in both places the one before is used.
    (tmp_path / "step-00000003" / FILE_NAME).write_text("{}")
    flip("/copies/of a run/step-00000003/rank-00000.safetensors")
    capsys.readouterr()
    assert newest() == 2
    assert "step-00000003 cannot be used" in capsys.readouterr().err
    assert not list(Path(tmp_path).glob(".step-*"))
    with pytest.raises(CheckpointError, match="holds no checkpoint of step 9"):
        find_newest(tmp_path, one_rank, 9, copies)


def test_a_copy_without_its_manifest_is_none(one_rank, copies, tmp_path, monkeypatch, capsys):
    save_and_send(tmp_path, 1, one_rank, copies)
    put = RemoteCopies._put

    def refuse(self, path, target):
        if path.name == FILE_NAME:
            raise OSError("the connection was reset")
        put(self, path, target)

    monkeypatch.setattr(RemoteCopies, "_put", refuse)
    assert not save_and_send(tmp_path, 2, one_rank, copies)
    said = capsys.readouterr().err
    assert "step-00000002 is saved, but its copy to" in said and "the connection was reset" in said
    monkeypatch.undo()
    assert copies.steps() == [1]
    assert save_and_send(tmp_path, 2, one_rank, copies) and copies.steps() == [1, 2]


def test_a_copy_that_is_there_is_one_even_if_the_others_cannot_be_deleted(
    one_rank, copies, tmp_path, monkeypatch, capsys
):
    save_and_send(tmp_path, 1, one_rank, copies)

    def refuse(self, target):
        if target.endswith("1"):
            raise PermissionError("deletion is forbidden")

    monkeypatch.setattr(RemoteCopies, "_remove", refuse)
    assert save_and_send(tmp_path, 2, one_rank, copies, keep_last=1)
    said = capsys.readouterr().err
    assert f"the copy of step-00000002 is there, but {URL} could not be tidied: deletion is forbidden" in said
    assert "failed" not in said and copies.steps() == [1, 2]


def test_copies_are_pruned_as_the_originals_are(one_rank, copies, tmp_path):
    for step in range(1, 8):
        save_and_send(tmp_path, step, one_rank, copies, keep_last=2, keep_every=3)
    assert copies.steps() == [3, 6, 7]


def test_the_best_copy_is_kept_and_named(one_rank, copies, tmp_path):
    for step in range(1, 5):
        save_and_send(tmp_path, step, one_rank, copies, keep_last=1, best_step=min(step, 2))
    assert copies.steps() == [2, 4] and copies.best() == 2
    # A run that is restored from its copies has the newest alone, and the best stays there.
    assert find_newest(tmp_path / "there", one_rank, copies=copies).manifest.step == 4
    save_and_send(tmp_path / "there", 5, one_rank, copies, keep_last=1, best_step=2)
    assert copies.steps() == [2, 5] and copies.best() == 2
    save_and_send(tmp_path / "there", 6, one_rank, copies, keep_last=1, best_step=6)
    assert copies.steps() == [6] and copies.best() == 6
    for text in (b"step-00000009", b"\xff", b"../x", b""):
        fsspec.filesystem("memory").pipe_file("/copies/of a run/best", text)
        assert copies.best() is None
    save_and_send(tmp_path / "there", 7, one_rank, copies)
    assert not fsspec.filesystem("memory").exists("/copies/of a run/best")


def test_best_names_no_copy_of_another_save_of_its_step(one_rank, copies, tmp_path, monkeypatch):
    save_and_send(tmp_path, 2, one_rank, copies, best_step=2)
    monkeypatch.setattr(RemoteCopies, "_tidy", lambda *how: None)  # as if the run were killed before
    save_and_send(tmp_path, 2, one_rank, copies, best_step=2)
    assert copies.best() == 2
    save_and_send(tmp_path, 2, one_rank, copies, best_step=1)
    assert copies.steps() == [2] and copies.best() is None


def test_copies_that_were_set_aside_or_cut_off_go_when_so_many_are_beyond_them(one_rank, copies, tmp_path):
    files = fsspec.filesystem("memory")
    for step in (1, 2, 3, 2):
        save_and_send(tmp_path, step, one_rank, copies, keep_last=1)
    files.pipe_file("/copies/of a run/step-00000004/rank-00000.safetensors", b"half")
    assert copies.steps() == [2] and files.exists("/copies/of a run/step-00000003")
    save_and_send(tmp_path, 4, one_rank, copies, keep_last=2)
    assert copies.steps() == [2, 4] and files.exists("/copies/of a run/step-00000003")
    save_and_send(tmp_path, 5, one_rank, copies, keep_last=2)
    assert copies.steps() == [4, 5] and not files.exists("/copies/of a run/step-00000003")


def test_later_copies_of_a_run_that_went_back_are_set_aside(one_rank, copies, tmp_path):
    for step in (1, 2, 3):
        save_and_send(tmp_path, step, one_rank, copies)
    save_and_send(tmp_path, 2, one_rank, copies)
    assert copies.steps() == [1, 2]
    assert fsspec.filesystem("memory").exists("/copies/of a run/step-00000003/manifest.abandoned.json")


def test_a_shard_of_another_size_is_not_fetched(one_rank, copies, tmp_path, capsys):
    save_and_send(tmp_path / "here", 1, one_rank, copies)
    fsspec.filesystem("memory").pipe_file("/copies/of a run/step-00000001/rank-00000.safetensors", b"x" * 10**6)
    assert find_newest(tmp_path / "there", one_rank, copies=copies) is None
    assert "has 1000000 bytes, and the manifest says" in capsys.readouterr().err
    assert not store.steps(tmp_path / "there")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda raw: signed(raw.replace(b"rank-00000.safetensors", b"../../escaped.safetensors")), "not a name of the"),
        (lambda raw: raw + b" " * 20_000, "bytes, and a manifest has 10000 at most"),
    ],
)
def test_a_copy_is_not_trusted(damage, said, one_rank, copies, tmp_path, capsys, monkeypatch):
    """Names that lead out of the folder, and files without end, of whoever can write there."""
    save_and_send(tmp_path / "here", 1, one_rank, copies)
    files = fsspec.filesystem("memory")
    manifest = f"/copies/of a run/step-00000001/{FILE_NAME}"
    files.pipe_file("/copies/of a run/escaped.safetensors", b"x")
    files.pipe_file(manifest, damage(files.cat_file(manifest)))
    monkeypatch.setattr("megatron_lite.checkpoint.remote.MAX_BYTES", 10_000)
    assert find_newest(tmp_path / "there", one_rank, copies=copies) is None
    assert said in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if "escaped" in path.name or path.name.startswith(".step")]


def signed(raw: bytes) -> bytes:
    """A manifest that was changed, with a hash that fits it."""
    body = raw.rpartition(b'\n"sha256"')[0]
    return body + b'\n"sha256": "%s"\n}\n' % hashlib.sha256(body).hexdigest().encode()


def test_a_url_of_no_known_kind_is_refused():
    with pytest.raises(
        ConfigError, match=r"--save-copy-to gopher://there cannot be reached: .*megatron_lite\[remote\]"
    ):
        RemoteCopies("gopher://there")


def test_a_service_that_refuses_is_told_by_its_address_without_the_password():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # the port is taken, and nobody listens
        with pytest.raises(ConfigError, match=r"cannot be reached: ConnectionRefusedError: .* leave it out") as told:
            RemoteCopies(f"ftp://user:canary@127.0.0.1:{nobody.getsockname()[1]}/copies")
    assert "ftp://***@127.0.0.1" in str(told.value) and "canary" not in str(told.value)
