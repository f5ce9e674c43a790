"""The compiled module `megatron_lite._host`: what is no tensor operation and too slow in Python. Needs no torch."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import threading
from types import ModuleType

from megatron_lite import log
from megatron_lite.errors import KernelError
from megatron_lite.kernels import sources
from megatron_lite.kernels.build import built, find_pybind11

_LOADING = threading.Lock()
"""A module that one thread is initialising is empty to another."""


def module() -> ModuleType | None:
    """`megatron_lite._host`, compiled first in a source tree that has none; None where it cannot be had.

    Its users have the same in Python; the log says once that it is used, and why.
    """
    with _LOADING:
        return _module()


@functools.cache
def _module() -> ModuleType | None:
    try:
        return _load()
    except (KernelError, ImportError) as error:
        log.once(f"tokens are put in order, packed and framed in Python, which is slower, since {error}")
        return None


def description() -> str:
    """What it computes, for the table of kernels."""
    loaded = module()
    return ", ".join(name for name in dir(loaded) if name[0] != "_") if loaded else "none, all of it is Python's"


def _load() -> ModuleType:
    if not sources.CSRC.is_dir():
        return importlib.import_module("megatron_lite._host")
    path = built(sources.host_module(find_pybind11()), "")
    spec = importlib.util.spec_from_file_location("megatron_lite._host", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
