"""Every CUDA kernel compiles for every target without a warning or a spill, and the library links and registers.

It needs nvcc but no GPU and no CUDA build of torch: a stub stands for libtorch_cuda.so. Without nvcc it is skipped,
and says so (with CI=true it fails, unless MEGATRON_LITE_CUDA=0): test_cuda_on_cpu.py then runs the sources by the
C++ compiler.
"""

import os
import re
import subprocess
import sys

import pytest
import torch

from megatron_lite.errors import KernelError
from megatron_lite.kernels import build, extension, sources

# What the binding takes from libtorch_cuda.so; any other name the linker cannot find is an error of ours.
STUB = "int aoti_torch_get_current_cuda_stream(void) { return 1; }"


@pytest.fixture(scope="module")
def library():
    try:
        build.find_nvcc()
    except KernelError as error:
        if os.environ.get("CI") == "true" and os.environ.get("MEGATRON_LITE_CUDA") != "0":
            pytest.fail(
                f"{error}; where CI=true that is a failure, unless MEGATRON_LITE_CUDA=0 says that there is none"
            )
        pytest.skip(str(error))
    folder = build.CACHE / "stub"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stub.c").write_text(STUB)
    stub = [*build.find_compiler(), "-xc", "-shared", "-Wl,-soname,libtorch_cuda.so", "-o", folder / "libtorch_cuda.so"]
    subprocess.run([*stub, folder / "stub.c"], check=True)
    kernels = sources.cuda_kernels(extension.TORCH, torch_lib=folder)
    path = build.built(kernels, torch.__version__)
    log = "".join((path.parent / f"{unit.object}.log").read_text() for unit in kernels.units)
    return path, log, folder / "libtorch_cuda.so"


def test_no_warning_and_no_spill(library):
    _, log, _ = library
    assert "warning" not in log
    kernels = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(kernels) >= 3 * 2 * len(sources.OPERATIONS)
    assert set(kernels) == {("0", "0")}, re.sub(r"(?m)^.* 0 bytes spill stores, 0 bytes.*\n", "", log)
    for architecture in ("sm_80", "sm_90", "sm_100"):
        assert f"for '{architecture}'" in log


def test_the_library_registers_every_operator(library):
    path, _, stub = library
    script = f"""
import ctypes, importlib, torch
from megatron_lite.kernels import operators, sources
for operation in sources.OPERATIONS:
    importlib.import_module("megatron_lite.kernels." + operation)
ctypes.CDLL({str(stub)!r}, ctypes.RTLD_GLOBAL)
torch.ops.load_library({str(path)!r})
assert not [name for name in operators.OPERATORS if not operators.native(name, "cuda")]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
