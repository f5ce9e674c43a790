"""Compiled code under AddressSanitizer and UndefinedBehaviorSanitizer: every CPU kernel and instruction set; _host."""

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

HOST = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("megatron_lite._host", sys.argv[1])
host = importlib.util.module_from_spec(spec)
spec.loader.exec_module(host)
random = np.random.default_rng(0)
for n in (1, 2, 16, 1000, 2**40 + 7, 2**63):
    permutation = host.Permutation(n, random.integers(0, 2**32, 16).tolist())
    at = random.integers(0, n, 50, np.uint64)
    assert permutation.many(at).tolist() == [permutation(int(i)) for i in at]
for counts in ([1], [3, 1], random.integers(1, 50, 64).tolist()):
    assert np.bincount(host.draws_of_a_period(counts)).tolist() == counts
for sizes in ([], [5], random.integers(1, 33, 500)):
    items, starts = host.best_fit(np.asarray(sizes, np.int32), 32)
    assert sorted(items.tolist()) == list(range(len(sizes))) and starts[-1] == len(sizes)
for sequences in (1, 7, 300):
    lengths = random.integers(0, 4, sequences) + (np.arange(sequences) == sequences - 1)
    ends = np.cumsum(lengths) * 2
    documents = np.unique(np.append(random.integers(0, sequences, sequences // 2), [0, sequences]))
    # On the heap, exactly as long as the arrays, at an odd address: what reads beyond them is caught.
    index = bytearray(b"x" + (ends - 2 * lengths).astype("<i8").tobytes() + documents.astype("<i8").tobytes())
    bounds = host.DocumentBounds(index, 1, sequences, 1 + 8 * sequences, len(documents), 2)
    for start in range(ends[-1] // 2):
        assert bounds.starts(start, ends[-1] // 2)[0] == 0 <= bounds.document_at(start) < len(documents) - 1
    begins, stops = bounds.of(np.arange(len(documents) - 1), ends[-1] // 2)
    assert begins[0] == 0 and stops[-1] == ends[-1] // 2 and (begins <= stops).all()
fill_in = host.FillIn(2**32, 2**31, True, 7, 8, 9, None, 5, [1, 2, 3])
for size in (1, 4, 5, 300):
    for dtype in ("u1", "u2", "u4", "u8"):
        tokens, pieces = np.full(size, 5, dtype), np.unique(np.append(random.integers(0, size, size // 6), 0))
        counts = random.random(size) < 0.98
        assert fill_in(2**40, tokens, pieces, counts) == (7 in tokens)
        fill_in(1, tokens, pieces, None)
        assert not fill_in(1, tokens, np.array([size, size]), counts) and not fill_in(1, tokens[:0], pieces[:1], None)
for lengths in ([], [0], [3], random.integers(0, 5, 100)):
    for bos, eod, width in ((None, None, 2), (0, 9, 2), (None, 9, 4), (0, None, 4)):
        ids, counts = random.integers(0, 10, sum(lengths)).astype(np.int32), np.zeros(10, np.uint32)
        made, framed, outside = host.framed(ids, np.array(lengths, np.int64), bos, eod, width, counts)
        assert outside == -1 and len(made) == framed.sum() == counts.sum()
        if len(ids):
            ids[-1] = 10
            assert host.framed(ids, np.array(lengths, np.int64), bos, eod, width, counts)[2] == 10
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


@pytest.mark.skipif(platform.system() != "Linux", reason="the sanitizer is preloaded the way Linux does it")
def test_what_is_computed_for_the_data_reads_and_writes_within_bounds():
    library = sources.host_module(build.find_pybind11(), FLAGS)
    done = _run(HOST, str(build.built(library, "")))
    assert done.returncode == 0, done.stderr[-4000:]
