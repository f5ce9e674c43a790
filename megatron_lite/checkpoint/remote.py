"""Copies of checkpoints behind a URL: a shared or remote folder, by fsspec.

    URL/step-00001000/rank-00000.safetensors, ...   as they are under --save
    URL/step-00001000/manifest.json                 sent last: a copy without it is none
    URL/step-00001100/manifest.abandoned.json       of a run that went back to an earlier step; never read
    URL/best                                        a line naming the best copy, which a restored run may be without

Stores of objects have no rename, but an object appears whole; on others a manifest that was cut off does not
match the hash in its last line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from megatron_lite import log
from megatron_lite.checkpoint import store
from megatron_lite.checkpoint.find import Found, search, verify
from megatron_lite.checkpoint.manifest import FILE_NAME, MAX_BYTES, Manifest, read_manifest
from megatron_lite.checkpoint.ranks import RankFailures, Ranks, together
from megatron_lite.checkpoint.shard import keep_to
from megatron_lite.credentials import stay_in
from megatron_lite.errors import CheckpointError, ConfigError

_ABANDONED = "manifest.abandoned.json"
_STEP = re.compile(r"step-([0-9]{8,})")


class RemoteCopies:
    """The copies under `url`. Raises ConfigError where fsspec, or what it needs for that kind of URL, is missing,
    for a service that refuses, and for credentials in a URL whose kind takes none."""

    def __init__(self, url: str):
        self.url = url
        try:
            from fsspec.core import url_to_fs

            self._files, root = url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"--save-copy-to {url} cannot be reached: {error}; `pip install megatron_lite[remote]` brings what "
                "s3:// and gs:// need; for other kinds of URL fsspec says it"
            ) from None
        except Exception as error:
            # Some kinds connect at once, and each service has errors of its own.
            raise ConfigError(
                f"--save-copy-to {url} cannot be reached: {type(error).__name__}: {error}; see that the service runs "
                "and lets you in, or leave it out"
            ) from None
        if stay_in(root):
            raise ConfigError(
                f"--save-copy-to {url} has credentials, and addresses of this kind take none; leave them to the "
                "environment or a file of the service"
            )
        self._root = root.rstrip("/")

    def send(
        self,
        folder: Path,
        ranks: Ranks,
        keep_last: int | None = None,
        keep_every: int | None = None,
        best_step: int | None = None,
        deadline: Callable[[], float | None] = lambda: None,
    ) -> bool:
        """Copy the checkpoint in `folder`, which all ranks see; whether that went well. All ranks call.

        Each takes its share of the files. A copy that fails is said and costs itself alone. Copies of later steps are
        set aside. Then `best` is made to name that of `best_step`, and others are deleted, as under --save; where that
        fails it is said, and costs no copy.
        """
        step, target = int(_STEP.fullmatch(folder.name)[1]), f"{self._root}/{folder.name}"

        def clear() -> None:
            if ranks.global_rank == 0:
                if best_step != step == self.best():
                    self._files.rm_file(f"{self._root}/best")
                self._remove(target)
                self._files.makedirs(target, exist_ok=True)

        def send_shards() -> None:
            shards = sorted(path for path in folder.iterdir() if path.name != FILE_NAME)
            for path in shards[ranks.global_rank :: ranks.world_size]:
                keep_to(deadline)
                self._put(path, f"{target}/{path.name}")

        def publish() -> None:
            if ranks.global_rank == 0:
                for later in [at for at in self.steps() if at > step]:
                    manifest = f"{self._root}/{store.step_name(later)}/{FILE_NAME}"
                    self._files.mv(manifest, f"{manifest.rpartition('/')[0]}/{_ABANDONED}")
                self._put(folder / FILE_NAME, f"{target}/{FILE_NAME}")

        try:
            for action in (clear, send_shards, publish):
                together(ranks, action)
        except RankFailures as failures:
            log.warn(f"{folder} is saved, but its copy to {self.url} failed: {failures}")
            return False
        if ranks.global_rank == 0:
            try:
                self._tidy(keep_last, keep_every, best_step)
            except Exception as error:
                # Each service has errors of its own.
                text = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
                log.warn(f"the copy of {folder.name} is there, but {self.url} could not be tidied: {text}")
        return True

    def steps(self) -> list[int]:
        """Steps of which there is a copy, oldest first; not yet checked."""
        names = {step: f"{self._root}/{store.step_name(step)}/{FILE_NAME}" for step in self._folders()}
        return [step for step, manifest in names.items() if self._files.exists(manifest)]

    def _folders(self) -> list[int]:
        """Steps of which there is a copy, a part of one, or one that was set aside, oldest first."""
        self._files.invalidate_cache()
        if not self._files.isdir(self._root):
            return []
        names = [path.rstrip("/").rpartition("/")[2] for path in self._files.ls(self._root, detail=False)]
        return sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match)

    def bring(self, root: Path, ranks: Ranks, newer_than: int | None, step: int | None = None) -> Found | None:
        """The newest complete copy (or that of `step`), made a checkpoint under `root`; None if none is newer.

        All ranks call and get the same answer. One that is damaged is named, and the one before it tried.
        """
        try:
            steps = together(ranks, lambda: self.steps() if ranks.global_rank == 0 else None)[0]
        except RankFailures as failures:
            log.warn(f"{self.url} cannot be read: {failures}")
            return None
        for at in reversed(steps):
            if (step is not None and at != step) or (newer_than is not None and at <= newer_than):
                continue
            if manifest := self._fetch(root, at, ranks):
                log.note(f"brought step {at} from {self.url}")
                return Found(root / store.step_name(at), manifest)
        return None

    def _fetch(self, root: Path, step: int, ranks: Ranks) -> Manifest | None:
        name = store.step_name(step)
        source, temporary = f"{self._root}/{name}", root
        manifest: Manifest

        def begin() -> str | None:
            if ranks.global_rank != 0:
                return None
            # Some services tell no size.
            if (size := self._files.size(f"{source}/{FILE_NAME}")) is None or size > MAX_BYTES:
                raise CheckpointError(f"{source}/{FILE_NAME} has {size} bytes, and a manifest has {MAX_BYTES} at most")
            token = store.new_token()
            folder = root / store.temporary_name(name, token)
            folder.mkdir(parents=True)
            self._get(f"{source}/{FILE_NAME}", folder / FILE_NAME)
            return token

        def fetch_shards() -> None:
            # The manifest is checked before a name in it is used.
            files = sorted(read_manifest(temporary).files.items())
            for file, entry in files[ranks.global_rank :: ranks.world_size]:
                if (size := self._files.size(f"{source}/{file}")) != entry.size:
                    raise CheckpointError(f"{source}/{file} has {size} bytes, and the manifest says {entry.size}")
                self._get(f"{source}/{file}", temporary / file)

        def check() -> None:
            nonlocal manifest
            manifest = verify(temporary, step, "", ranks.global_rank, ranks.world_size)

        def publish() -> None:
            if ranks.global_rank == 0:
                store.publish(root, step, token)

        try:
            token = together(ranks, begin)[0]
            temporary = root / store.temporary_name(name, token)
            together(ranks, fetch_shards)
            together(ranks, check)
            together(ranks, publish)
        except RankFailures as failures:
            log.warn(f"the copy {self.url}/{name} cannot be used: {failures}")
            if temporary != root and ranks.global_rank == 0:
                store.discard(temporary)
            return None
        return manifest

    def _put(self, path: Path, target: str) -> None:
        self._files.put_file(str(path), target)
        self._files.invalidate_cache()
        if (size := self._files.size(target)) != path.stat().st_size:
            raise OSError(f"{target} has {size} bytes after copying the {path.stat().st_size} of {path}")

    def _get(self, source: str, path: Path) -> None:
        self._files.get_file(source, str(path))
        with open(path, "rb") as file:
            os.fsync(file.fileno())

    def best(self) -> int | None:
        """The step that `best` names; None where it names none of which there is a copy."""
        path = f"{self._root}/best"
        if not self._files.exists(path):
            return None
        match = _STEP.fullmatch(self._files.read_bytes(path, 0, 100).decode(errors="replace").strip())
        return int(match[1]) if match and int(match[1]) in self.steps() else None

    def _tidy(self, keep_last: int | None, keep_every: int | None, best_step: int | None) -> None:
        there, named, path = self.steps(), self.best(), f"{self._root}/best"
        kept = store.step_for_best(named, best_step, there)
        if kept is not None and kept != named:
            self._files.pipe_file(path, f"{store.step_name(kept)}\n".encode())
        elif kept is None and self._files.exists(path):
            self._files.rm_file(path)
        if keep_last is None:
            return
        for step in there[:-keep_last]:
            if step != kept and not (keep_every and step % keep_every == 0):
                self._remove(f"{self._root}/{store.step_name(step)}")
        for step in self._folders():
            if step not in there and store.is_passed(step, there, keep_last):
                self._remove(f"{self._root}/{store.step_name(step)}")

    def _remove(self, target: str) -> None:
        """Delete a copy, its manifest first: what is cut off leaves none that looks complete."""
        manifest = f"{target}/{FILE_NAME}"
        if self._files.exists(manifest):
            self._files.rm_file(manifest)
        if self._files.exists(target):
            self._files.rm(target, recursive=True)


def find_newest(
    root: str | os.PathLike[str],
    ranks: Ranks,
    step: int | None = None,
    copies: RemoteCopies | None = None,
    *,
    values: bool = True,
) -> Found | None:
    """What `search` finds under `root`, unless a newer checkpoint is among the copies, or that of `step` only there.

    Where nothing under `root` can be used a copy stands in; without one the error of `search` is raised.
    """
    error: CheckpointError | None = None
    found: Found | None = None
    try:
        found = search(root, ranks, step, values=values)
    except CheckpointError as failure:
        if copies is None:
            raise
        error = failure
    if copies is None or (step is not None and found is not None):
        return found
    brought = copies.bring(Path(root), ranks, None if found is None else found.manifest.step, step)
    if brought is None and error is not None:
        raise error
    return brought or found
