"""What a run was made with: versions of code and libraries, devices. No library is imported for it."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_lite.version import __version__

PACKAGES = ("torch", "deepspeed", "numpy", "tokenizers", "tiktoken", "sentencepiece", "safetensors", "tyro")


def versions(devices: Sequence[str] = ()) -> dict[str, str | list[str] | None]:
    """Versions by name: megatron_lite's and its commit, Python, the platform, `PACKAGES`, and `devices`.

    None stands for a package that is not installed and for code outside a git checkout.
    """
    found: dict[str, str | list[str] | None] = {
        "megatron_lite": __version__,
        "megatron_lite_commit": git_commit(Path(__file__).resolve().parents[2]),
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["devices"] = list(devices)
    return found


def git_commit(checkout: Path) -> str | None:
    """The commit checked out in `checkout`, read from git's files; None where it is no checkout."""
    git = checkout / ".git"
    try:
        if git.is_file():
            # A worktree: `.git` is a line that names the real folder.
            git = (checkout / git.read_text().removeprefix("gitdir:").strip()).resolve()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head
        name = head.removeprefix("ref:").strip()
        shared = git
        if (git / "commondir").is_file():
            shared = (git / (git / "commondir").read_text().strip()).resolve()
        for folder in (git, shared):
            if (folder / name).is_file():
                return (folder / name).read_text().strip()
        for line in (shared / "packed-refs").read_text().splitlines():
            commit, _, ref = line.partition(" ")
            if ref == name:
                return commit
    except OSError:
        return None
    return None
