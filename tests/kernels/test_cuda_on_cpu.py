"""The CUDA kernels themselves, run on a CPU thread by thread (tests/cuda_on_cpu), equal the reference.

Where there is a GPU, test_operators.py is the better test; this one needs neither a GPU nor nvcc.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_lite.kernels import build, extension
from megatron_lite.kernels.sources import CPP_FLAGS, CSRC, CXX, OPERATIONS, TORCH_ABI, Library, Unit

TESTS = Path(__file__).resolve().parents[1]
SCRIPT = """
import sys, torch
from megatron_lite.kernels import extension
torch.ops.load_library(sys.argv[1])
extension._libraries["cpu"] = sys.argv[1]
from kernel_cases import (
    DTYPES, assert_equals_reference, assert_lists_equal_each_alone, assert_small_probabilities_keep_their_digits, cases
)
# No rows; no columns; less than a pack; odd; a few packs of one warp; rows that share a block; many warps a row; long
# and odd.
for shape in [(0, 8), (3, 0), (1, 1), (3, 7), (2, 3, 64), (37, 65), (21, 256), (19, 1024), (3, 2048), (2, 2051)]:
    for dtype in DTYPES:
        for name, arguments in cases(shape, dtype):
            assert_equals_reference(name, arguments)
# More packs than registers hold.
for name, arguments in cases((2, 16392), torch.float32):
    if name.startswith(("residual", "layer_norm", "rms_norm", "softmax", "bias")):
        assert_equals_reference(name, arguments)
assert_lists_equal_each_alone("cpu")
assert_small_probabilities_keep_their_digits("cpu")
"""


def as_cpp(text):
    """CUDA's own syntax of a launch as C++."""
    return re.sub(
        r"([\w:]+(?:<[^;{}]*?>)?)\s*<<<(.*?)>>>\((.*?)\);",
        r"cuda_on_cpu::launch(\2, [=] { \1(\3); });",
        text,
        flags=re.DOTALL,
    )


@pytest.fixture(scope="module")
def library():
    copy = build.CACHE / "cuda_on_cpu"
    for source in [*CSRC.rglob("*.cu"), *CSRC.rglob("*.cuh"), *CSRC.rglob("*.h")]:
        target = (copy / source.relative_to(CSRC)).with_suffix(".cpp" if source.suffix == ".cu" else source.suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = as_cpp(source.read_text())
        if not target.exists() or target.read_text() != text:
            target.write_text(text)
    binding = "".join(f'#include "{name}/{name}_bind.h"\n' for name in OPERATIONS)
    calls = "".join(f"  register_{name}<CudaOnCpu>(library);\n" for name in OPERATIONS)
    (copy / "bind.cpp").write_text(
        f'#include "bind.h"\n{binding}namespace megatron_lite {{\n'
        f"STABLE_TORCH_LIBRARY_IMPL(megatron_lite, CPU, library) {{\n{calls}}}\n}}\n"
    )
    flags = [flag for flag in CPP_FLAGS if not flag.startswith(("-I", "-W"))]
    command = (CXX, *flags, "-O2", "-w", f"-I{TESTS / 'cuda_on_cpu'}", f"-I{copy}")
    # As nvcc compiles code for a card: what such code alone has is run too.
    units = [
        Unit(copy / name / f"{name}_cuda.cpp", f"{name}.o", (*command, "-D__CUDA_ARCH__=800")) for name in OPERATIONS
    ]
    bind = (*command, "-isystem", str(extension.TORCH / "include"), TORCH_ABI)
    units.append(Unit(copy / "bind.cpp", "bind.o", bind))
    kernels = Library("libcuda_on_cpu", tuple(units), (CXX, "-shared"), (f"-L{extension.TORCH / 'lib'}", "-ltorch_cpu"))
    headers = "".join(path.read_text() for path in sorted((TESTS / "cuda_on_cpu").iterdir()))
    return build.built(kernels, torch.__version__ + headers)


def test_equals_the_reference(library):
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(library)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
