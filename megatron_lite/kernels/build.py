"""Compiles a `Library` with ninja into build/kernels/ of the checkout; ranks that start together build once.

A folder holds the objects of one set of commands and one torch, so an edit recompiles what it touches. The
finished library's name carries a hash of sources and flags: a library that is there is up to date, one that
another process has loaded is never written to, and neither a lock nor a compiler is needed to find it. The
oldest go when a new one is there.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from megatron_lite import log
from megatron_lite.errors import KernelError
from megatron_lite.kernels.sources import CSRC, CXX, NVCC, ROOT, Library

CACHE = ROOT / "build" / "kernels"
_KEPT_LIBRARIES = 3  # of one set of commands: today's, and those of checkouts of some days ago
_KEPT_FOLDERS = 8  # sets of commands: two Pythons, two compilers, sanitizers


def _digest(*texts: str | bytes) -> str:
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode() if isinstance(text, str) else text
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def _place(library: Library, versions: str, cache: Path) -> tuple[Path, Path]:
    """The folder of a library's objects, and the path it will have when it is built from today's sources."""
    commands = repr((library, versions, platform.machine(), sys.implementation.cache_tag))
    folders = {unit.source.parent for unit in library.units} | {CSRC / "base"}
    headers = {path for folder in folders for path in folder.iterdir() if path.suffix in (".h", ".cuh")}
    sources = headers | {unit.source for unit in library.units}
    contents = _digest(commands, *(part for path in sorted(sources) for part in (path.name, path.read_bytes())))
    folder = cache / f"{library.name}-{_digest(commands)}"
    return folder, folder / f"{library.name}-{contents}.so"


def find_ninja() -> str:
    """The ninja of the Python package (a requirement of DeepSpeed), else of the PATH."""
    spec = importlib.util.find_spec("ninja")
    if spec and spec.origin:
        candidates = [Path(spec.origin).parent / "data" / "bin" / "ninja", Path(sys.executable).parent / "ninja"]
        for candidate in candidates:
            if candidate.exists():
                return str(candidate)
    found = shutil.which("ninja")
    if not found:
        raise KernelError("ninja, which compiles the kernels, is not installed: pip install ninja")
    return found


def find_compiler() -> tuple[str, ...]:
    """The words that call the C++ compiler: CXX's ("ccache g++ -m64"), else c++, g++ or clang++."""
    named = os.environ.get("CXX", "").strip()
    for name, *arguments in [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]:
        found = shutil.which(name)
        if found:
            return found, *arguments
    raise KernelError(
        f"no C++ compiler ({named or 'c++, g++ or clang++'}) is on the PATH, so nothing can be compiled; on Debian and "
        "Ubuntu: apt install g++; or name one: CXX=/path/to/g++"
    )


def find_nvcc() -> str:
    """CUDA's compiler: of CUDA_HOME if that is set, else of the PATH, else of /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    found = found or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not found:
        raise KernelError("no nvcc is on the PATH or in CUDA_HOME, so the CUDA kernels cannot be compiled")
    return found


def _called(command: tuple[str, ...]) -> tuple[str, ...]:
    """A unit's or a link's command with the tools of this machine."""
    tool, *arguments = command
    compiler = find_compiler()
    if tool == CXX:
        return *compiler, *arguments
    assert tool == NVCC
    # nvcc takes one program, which must be the compiler itself.
    host = next((word for word in compiler if Path(word).name not in ("ccache", "sccache", "distcc")), compiler[0])
    return find_nvcc(), f"-ccbin={host}", *arguments


def find_pybind11() -> Path:
    """The folder of pybind11's headers: its own package's, else those torch brings."""
    for package in ("pybind11", "torch"):
        # Found, not imported: neither is needed to run what is compiled.
        folders = [Path(entry) / package / "include" for entry in sys.path]
        for folder in folders:
            if (folder / "pybind11" / "pybind11.h").exists():
                return folder
    raise KernelError("pybind11's headers are not installed: pip install pybind11")


def _ninja_file(library: Library, target: Path) -> str:
    def quoted(text: object) -> str:
        return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def command(parts: tuple[str, ...]) -> str:
        return " ".join("'" + part.replace("'", "'\\''").replace("$", "$$") + "'" for part in parts)

    link, libraries = command(_called(library.link)), command(library.link_libraries)
    lines = ["ninja_required_version = 1.5"]
    for index, unit in enumerate(library.units):
        lines += [
            f"rule compile{index}",
            # What the compiler says stays beside the object, also when a later build skips it.
            f"  command = {command(_called(unit.command))} -MD -MF $out.d -c $in -o $out "
            ">$out.log 2>&1 || (cat $out.log; exit 1)",
            "  deps = gcc",
            "  depfile = $out.d",
            f"build {quoted(unit.object)}: compile{index} {quoted(unit.source)}",
        ]
    lines += [
        "rule link",
        f"  command = {link} $in {libraries} -o $out.new && mv $out.new $out",
        f"build {quoted(target.name)}: link {' '.join(quoted(unit.object) for unit in library.units)}",
        f"default {quoted(target.name)}",
    ]
    return "\n".join(lines) + "\n"


def found(library: Library, versions: str, cache: Path = CACHE) -> Path | None:
    """The path of `library` if it is there and up to date."""
    _, target = _place(library, versions, cache)
    return target if target.exists() else None


def built(library: Library, versions: str, cache: Path = CACHE) -> Path:
    """The path of `library`, compiled now if it is not there yet.

    `versions` says what else it depends on (torch's version). Raises KernelError, with the compiler's own words,
    when it cannot be compiled.
    """
    folder, target = _place(library, versions, cache)
    if target.exists():
        return target
    ninja, instructions = find_ninja(), _ninja_file(library, target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").touch()
    except OSError as error:
        raise KernelError(f"the kernels cannot be compiled into {folder}: {error.strerror}") from error
    with open(folder / "lock", "r+") as lock:
        # Released by the system when this process ends, however it ends.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        # Whichever rank has the lock speaks: the others wait for it.
        log.every_rank(f"compiling {library.name}, once: {len(library.units)} files, {library.effort}, into {folder}")
        began = time.monotonic()
        written = folder / "build.ninja.new"
        written.write_text(instructions, encoding="utf-8")
        written.rename(folder / "build.ninja")
        done = subprocess.run([ninja, "-C", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise KernelError(f"{library.name} does not compile; in {folder} ninja says:\n{done.stdout[-4000:]}")
        log.every_rank(f"compiled {library.name} in {time.monotonic() - began:.1f} s")
        _remove_oldest(library.name, folder)
    return target


def _remove_oldest(name: str, folder: Path) -> None:
    """Keep the newest libraries of a folder, and the newest folders of a name: of each as many as may be in use.

    A process that has loaded one keeps what it has: a file lives as long as someone holds it.
    """

    def newest_first(paths: Iterable[Path]) -> list[Path]:
        return sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)

    for library in newest_first(folder.glob(f"{name}-*.so"))[_KEPT_LIBRARIES:]:
        library.unlink(missing_ok=True)
    for other in newest_first(folder.parent.glob(f"{name}-*"))[_KEPT_FOLDERS:]:
        shutil.rmtree(other, ignore_errors=True)
