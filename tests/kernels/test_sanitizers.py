"""Every CPU kernel under AddressSanitizer and UndefinedBehaviorSanitizer, over every case and instruction set."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_lite.kernels import build, extension, sources

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1")
SCRIPT = """
import sys, torch
from megatron_lite.kernels import extension
torch.ops.load_library(sys.argv[1])
extension._libraries["cpu"] = sys.argv[1]
from kernel_cases import DTYPES, SHAPES, cases
for name in ("baseline", "avx2", "avx512"):
    if extension.choose_instruction_set(name):
        for shape in SHAPES:
            for dtype in DTYPES:
                for operator, arguments in cases(shape, dtype):
                    getattr(torch.ops.megatron_lite, operator)(*arguments)
        # From 8 MiB on results go past the caches (csrc/base/stream.h), rows that a causal mask cuts short too.
        for dtype in DTYPES:
            x = torch.randn(5, 1024, 1024, dtype=dtype)
            for causal in (False, True):
                y = torch.ops.megatron_lite.softmax(x, None, 0.5, causal)
                torch.ops.megatron_lite.softmax_backward(x, y, 0.5, causal)
"""


def _run(*script: str) -> subprocess.CompletedProcess:
    runtime = subprocess.run([*build.find_compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True)
    tests = Path(__file__).resolve().parents[1]
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": f"{tests.parent}:{tests}",
    }
    return subprocess.run([sys.executable, "-c", *script], env=environment, capture_output=True, text=True)


@pytest.mark.skipif(platform.system() != "Linux", reason="the sanitizer is preloaded the way Linux does it")
def test_no_kernel_reads_or_writes_out_of_bounds():
    library = sources.cpu_kernels(extension.TORCH, FLAGS)
    done = _run(SCRIPT, str(build.built(library, torch.__version__)))
    assert done.returncode == 0, done.stderr[-4000:]
