"""NVIDIA's apex, told apart from the project that has its name on PyPI."""

from __future__ import annotations

import importlib
import importlib.util
from importlib.machinery import PathFinder
from types import ModuleType

from megatron_lite.errors import KernelError

_BUILD = (
    "install it from source: git clone https://github.com/NVIDIA/apex, and in it pip install -v --no-build-isolation "
    '--config-settings "--build-option=--cpp_ext" --config-settings "--build-option=--cuda_ext" ./'
)
_INSTEAD = "or leave --norm-backend at native, which needs no other package"


def nvidia_apex_norms(device_type: str) -> ModuleType:
    """The module of NVIDIA's fused norms, for a device type.

    Nothing of a package that is not NVIDIA's is imported. Raises KernelError, with what is there instead, where it
    is not installed, without its CUDA extension, or the device is none of its own.
    """
    package = importlib.util.find_spec("apex")
    if package is None:
        raise KernelError(f"--norm-backend apex: NVIDIA's apex is not installed; {_BUILD}; {_INSTEAD}.")
    if PathFinder.find_spec("apex.normalization", package.submodule_search_locations) is None:
        raise KernelError(
            f"--norm-backend apex: {package.origin} is not NVIDIA's apex, which has apex.normalization, but another "
            f"project of that name (pip install apex gives a web toolkit): pip uninstall apex, then {_BUILD}; "
            f"{_INSTEAD}."
        )
    if importlib.util.find_spec("fused_layer_norm_cuda") is None:
        raise KernelError(
            f"--norm-backend apex: {package.origin} was installed without its CUDA extension fused_layer_norm_cuda; "
            f"{_BUILD}; {_INSTEAD}."
        )
    if device_type == "cpu":
        raise KernelError(f"--norm-backend apex: apex's norms run on a GPU, and this device is a CPU; {_INSTEAD}.")
    return importlib.import_module("apex.normalization.fused_layer_norm")
