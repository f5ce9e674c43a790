"""Finds, builds and loads the native code; says once what is native and what is reference.

In a source tree (csrc/ beside the package) the library in build/kernels/ is used, compiled first if it is not
there. A wheel carries its libraries beside this file. Nothing happens at import: the first call of a kernel,
or `load`, or `require_native`, starts it.
"""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import torch

from megatron_lite import log
from megatron_lite.errors import KernelError
from megatron_lite.kernels import sources
from megatron_lite.kernels.build import built, find_compiler, find_nvcc, found

DEVICES = ("cpu", "cuda")
LEAST_CAPABILITY = (8, 0)  # what the oldest of sources.CUDA_ARCHITECTURES needs
TORCH = Path(torch.__file__).parent
_lock = threading.Lock()
_libraries: dict[str, Path] = {}
_reasons: dict[str, str] = {}


def load(device: str) -> bool:
    """Whether the native kernels for a device type are loaded; the first call finds or builds them.

    Where they cannot be had, the reference in plain torch runs and the log says why, once.
    """
    loaded = _try_to_load(device)
    if not loaded and available(device):
        log.once(f"kernels on {device}: plain torch is used, since {_reasons[device]}")
    return loaded


def _try_to_load(device: str) -> bool:
    with _lock:
        if device not in _libraries and device not in _reasons:
            try:
                path = _find(device)
                torch.ops.load_library(path)
                _libraries[device] = path
            except (KernelError, OSError) as error:
                _reasons[device] = str(error)
        return device in _libraries


def forgo(device: str, reason: str) -> None:
    """Have the reference run on a device type in this process, for comparisons; before its first kernel is called."""
    with _lock:
        assert device not in _libraries, f"the native kernels for {device} are loaded, and stay"
        _reasons[device] = reason


def available(device: str) -> bool:
    """Whether torch itself can use a device type here."""
    return device == "cpu" or torch.cuda.is_available()


def library(device: str) -> Path:
    """The file that the native kernels of a device type were loaded from."""
    return _libraries[device]


def description(device: str) -> str:
    """A line on a device type that `load` was asked for: what its kernels are and where from, or why they are not."""
    if device not in _libraries:
        return _reasons[device]
    if device == "cpu":
        return f"{instruction_set()} instructions, {torch.get_num_threads()} threads, {_libraries[device]}"
    return f"CUDA {torch.version.cuda}, {_libraries[device]}"


def summary(device: str) -> str:
    """A few words on a device type that `load` was asked for: "native (cpu avx512, 2 threads)"."""
    if device not in _libraries:
        return f"plain torch ({device})"
    if device == "cpu":
        threads = torch.get_num_threads()
        return f"native (cpu {instruction_set()}, {threads} thread{'s' if threads > 1 else ''})"
    return f"native ({device} {torch.version.cuda})"


def instruction_set() -> str:
    """The instruction set the native CPU kernels use: baseline, avx2 or avx512."""
    kernels = ctypes.CDLL(str(_libraries["cpu"]))
    kernels.megatron_lite_instruction_set.restype = ctypes.c_char_p
    return kernels.megatron_lite_instruction_set().decode()


def choose_instruction_set(name: str) -> bool:
    """Use a narrower instruction set from now on, for tests; False if the processor lacks it."""
    return ctypes.CDLL(str(_libraries["cpu"])).megatron_lite_choose_instruction_set(name.encode()) == 0


def _find(device: str) -> Path:
    if device not in DEVICES:
        raise KernelError(f"there are native kernels for cpu and cuda, none for {device}")
    if device == "cuda" and not torch.version.cuda:
        raise KernelError(f"torch {torch.__version__} is built without CUDA")
    if device == "cuda":
        _require_capability()
    if not sources.CSRC.is_dir():
        return _packed(device)
    if device == "cpu":
        return built(sources.cpu_kernels(find_compiler(), TORCH), torch.__version__)
    # What was compiled ahead of time serves every card; what is compiled now, this machine's alone, in a quarter
    # of the time.
    command = find_compiler(), find_nvcc(), TORCH
    return found(sources.cuda_kernels(*command), torch.__version__) or built(
        sources.cuda_kernels(*command, _architectures()), torch.__version__
    )


def _require_capability() -> None:
    """Raise KernelError on a card older than the oldest machine code, which would fail at its first launch only."""
    if not torch.cuda.is_available():
        return
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        least, has = (".".join(map(str, numbers)) for numbers in (LEAST_CAPABILITY, capability))
        raise KernelError(
            f"the CUDA kernels want compute capability {least} or above and {torch.cuda.get_device_name()} has {has}"
        )


def _packed(device: str) -> Path:
    path = Path(__file__).parent / f"libmegatron_lite_{device}.so"
    if not path.exists():
        raise KernelError(f"this installation carries no {path.name}; install from a source tree: pip install -e .")
    return path


def _architectures() -> tuple[str, ...]:
    if not torch.cuda.is_available():
        return sources.CUDA_ARCHITECTURES
    major, minor = torch.cuda.get_device_capability()
    return (f"sm_{major}{minor}",)


def require_native(device: str) -> None:
    """Raise KernelError unless the native kernels for a device type are loaded (--require-native-kernels)."""
    if not _try_to_load(device):
        raise KernelError(
            f"--require-native-kernels: the kernels for {device} are not native, since {_reasons[device]}"
        )
