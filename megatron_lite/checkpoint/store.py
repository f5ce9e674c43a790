"""A folder of checkpoints: names, the right to write, publishing by rename, and what is kept. No torch.

    ROOT/step-00001000/               a complete checkpoint
    ROOT/.step-00001000.tmp-1a2b3c4d  one being written or deleted: swept
    ROOT/.step-00001000.old-1a2b3c4d  one being replaced by a newer save of its step
    ROOT/abandoned-step-00001100      of a run that went back to an earlier step; never read, deleted as `prune` has it
    ROOT/latest, ROOT/best            a line naming a checkpoint; `latest` is only a hint
    ROOT/.lock                        held by the run that writes here

Nothing but a rename ever makes a checkpoint appear or go.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
from collections.abc import Collection, Iterator
from pathlib import Path

from megatron_lite import log
from megatron_lite.checkpoint.manifest import FILE_NAME
from megatron_lite.checkpoint.ranks import RankFailures, Ranks, together
from megatron_lite.errors import CheckpointError

_STEP = re.compile(r"step-([0-9]{8,})")
_TEMPORARY = re.compile(r"\.(step-[0-9]{8,}|latest|best)\.tmp-[0-9a-f]{8}")
_ABANDONED = re.compile(r"abandoned-step-([0-9]{8,})(-[0-9a-f]{8})?")
_REPLACED = re.compile(r"\.(step-([0-9]{8,}))\.old-[0-9a-f]{8}")


def step_name(step: int) -> str:
    """The folder of a step: `step-00001000`."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step that the name of a folder stands for; None for another name."""
    match = _STEP.fullmatch(folder.resolve().name)
    return int(match[1]) if match else None


def new_token() -> str:
    """Eight random hex digits that make a temporary name this save's own."""
    return secrets.token_hex(4)


def temporary_name(name: str, token: str) -> str:
    """The name under which `name` is written until it is complete."""
    return f".{name}.tmp-{token}"


def steps(root: Path) -> dict[int, Path]:
    """Step -> folder of every checkpoint under `root`, oldest first; not yet checked.

    One that was being replaced when its run was killed counts until the replacement is there.
    """
    if not root.is_dir():
        return {}
    found, replaced = {}, {}
    for path in root.iterdir():
        if match := _STEP.fullmatch(path.name):
            found[int(match[1])] = path
        elif match := _REPLACED.fullmatch(path.name):
            replaced[int(match[2])] = path
    return dict(sorted({**replaced, **found}.items()))


def holds_checkpoint(root: str | os.PathLike[str]) -> bool:
    """Whether some step was published under `root`; whether it is undamaged is for `find` to say."""
    return any((folder / FILE_NAME).is_file() for folder in steps(Path(root)).values())


def best(root: str | os.PathLike[str]) -> Path | None:
    """The checkpoint marked as the best one, if there is one. Raises OSError where that cannot be read."""
    try:
        name = (Path(root) / "best").read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    folder = Path(root) / name
    return folder if _STEP.fullmatch(name) and folder.is_dir() else None


def step_for_best(named: int | None, best: int | None, there: Collection[int]) -> int | None:
    """The step that `best` is to name, of those that are `there`; None if none.

    `named` is what it names now, `best` the best validated step of the run: older where the run went back, newer where
    that step's save failed.
    """
    if best in there:
        return best
    return named if None not in (named, best) and named in there and named < best else None


@contextlib.contextmanager
def claim(root: str | os.PathLike[str], ranks: Ranks) -> Iterator[Claim]:
    """The right to save under `root`, for the length of a run: rank 0 locks it and sweeps leftovers.

    The lock is the operating system's, so it ends with the process however that ends. Raises
    CheckpointError on all ranks when another run holds it, naming its process and host.
    """
    root = Path(root)
    with contextlib.ExitStack() as held:
        right = Claim(root, held)

        def lock_and_sweep() -> None:
            if ranks.global_rank == 0:
                make_folder(root)
                right.take()
                sweep(root)

        try:
            together(ranks, lock_and_sweep)
        except RankFailures as failures:
            raise CheckpointError(f"checkpoints cannot be saved under {root}: {failures}") from failures
        yield right


class Claim:
    """A lock on a folder that also tells its owner in words: some network file systems lock for one host alone."""

    def __init__(self, root: Path, held: contextlib.ExitStack):
        self._path = root / ".lock"
        self._held = held
        self._owner = f"process {os.getpid()} on {socket.gethostname()} ({new_token()})"

    def take(self) -> None:
        """Lock the folder. Raises CheckpointError when another process has it."""
        file = self._held.enter_context(open(self._path, "a+"))  # noqa: SIM115 (the stack closes it)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _taken(file.read(200).strip() or "another run") from None
        except OSError as error:
            log.warn(
                f"{self._path.parent} cannot be locked ({error.strerror}): make sure that no other run saves there"
            )
        file.truncate(0)
        file.write(f"{self._owner}\n")
        file.flush()

    def insist(self) -> None:
        """Raise CheckpointError if another run has taken the folder since, from a host that sees no lock."""
        try:
            owner = self._path.read_text().strip()
        except FileNotFoundError:
            # Deleted by hand, and the lock with it.
            return self.take()
        if owner != self._owner:
            raise _taken(owner)


def _taken(owner: str) -> CheckpointError:
    return CheckpointError(f"{owner} is saving there; stop it, or give this run a --save folder of its own")


def sweep(root: Path) -> None:
    """Remove what a save or a deletion that was cut off left behind; put back what it had moved aside."""
    for path in list(root.iterdir()):
        replaced = _REPLACED.fullmatch(path.name)
        if replaced and not (root / replaced[1]).exists():
            os.rename(path, root / replaced[1])
            log.note(f"{root / replaced[1]} is back: its replacement was never finished")
        elif replaced or _TEMPORARY.fullmatch(path.name):
            log.note(f"removing {path}, left behind by a save that was cut off")
            discard(path)


def discard(path: Path) -> None:
    """Delete a temporary file or folder; what cannot be deleted now is left to a later sweep."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def make_folder(root: Path) -> None:
    """Make `root` and its parents, durably."""
    if not root.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        sync_folder(root.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems keep names durable by themselves and refuse this.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_durably(path: Path, raw: bytes) -> None:
    """Write a new file and its contents through to the disk."""
    with open(path, "xb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


def publish(root: Path, step: int, token: str) -> None:
    """Give the finished temporary folder of `step` its name, durably.

    A kill at any point leaves either the checkpoints that were there or the new one as well. Later
    steps are those of a run that has since gone back: they step aside first, or a restart would go
    on from them.
    """
    folder = root / step_name(step)
    temporary = root / temporary_name(folder.name, token)
    replaced = root / f".{folder.name}.old-{token}"
    sync_folder(temporary)
    for later, path in steps(root).items():
        if later > step:
            aside = root / f"abandoned-{step_name(later)}"
            aside = aside if not aside.exists() else root / f"{aside.name}-{token}"
            os.rename(path, aside)
            log.warn(
                f"{path} lies ahead of step {step}, to which this run went back: it is now {aside.name} (--keep-last N "
                "deletes it once N lie beyond it)"
            )
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(temporary, folder)
    sync_folder(root)
    discard(replaced)


def point(root: Path, name: str, step: int, token: str) -> None:
    """Let the file `name` (`latest`, `best`) name the checkpoint of `step`, atomically."""
    temporary = root / temporary_name(name, token)
    write_durably(temporary, f"{step_name(step)}\n".encode())
    os.replace(temporary, root / name)
    sync_folder(root)


def is_passed(step: int, there: Collection[int], keep_last: int) -> bool:
    """Whether `keep_last` of the steps that are `there` lie beyond this one."""
    return sum(at > step for at in there) >= keep_last


def unmark(root: Path, step: int) -> None:
    """Let `best` no longer name `step`, whose checkpoint is about to be another; what fails is left to `mark_best`."""
    with contextlib.suppress(OSError):
        if (root / "best").read_text(errors="replace").strip() == step_name(step):
            (root / "best").unlink()


def mark_best(root: Path, best_step: int | None, token: str) -> None:
    """Let `best` name the step that `step_for_best` has."""
    there, kept = steps(root), best(root)
    named = next((at for at, folder in there.items() if folder == kept), None)
    wanted = step_for_best(named, best_step, there)
    if wanted is None:
        (root / "best").unlink(missing_ok=True)
    elif wanted != named:
        point(root, "best", wanted, token)


def prune(root: Path, keep_last: int, keep_every: int | None = None, spared: Collection[int] = ()) -> None:
    """Delete checkpoints, oldest first: all but the newest `keep_last`, those of steps that are multiples of
    `keep_every`, those of the steps `spared`, and the best one; and the abandoned ones that so many have passed.

    Raises OSError, and deletes nothing, where it cannot be read which one is the best.
    """
    kept, there = best(root), steps(root)
    for step, folder in list(there.items())[:-keep_last]:
        if folder != kept and step not in spared and not (keep_every and step % keep_every == 0):
            # Renamed first, so that a deletion that is cut off leaves no half of a checkpoint.
            doomed = root / temporary_name(folder.name, new_token())
            os.rename(folder, doomed)
            discard(doomed)
    for path in sorted(root.iterdir()):
        match = _ABANDONED.fullmatch(path.name)
        if match and is_passed(int(match[1]), there, keep_last):
            log.note(f"deleting {path}: {keep_last} checkpoints lie beyond it (--keep-last)")
            discard(path)
