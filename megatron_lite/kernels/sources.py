"""What is compiled: the one list of sources and flags, for building ahead of time and just in time.

Needs no torch, only to be told where its headers are, and no compiler: a command begins with `CXX` or `NVCC`, for
which build.py puts this machine's when it compiles. To add an operation: its name in `OPERATIONS`, and one
line in each of csrc/bind_cpu.cpp and csrc/bind_cuda.cpp.
"""

from __future__ import annotations

import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CXX, NVCC = "c++", "nvcc"

OPERATIONS = (
    "adamw",
    "adamw8bit",
    "bias_dropout_add",
    "bias_gelu",
    "cross_entropy",
    "l2_norm",
    "layer_norm",
    "quantize_blockwise",
    "rms_norm",
    "rotary",
    "softmax",
    "swiglu",
)

# No -ffast-math: linked by g++ 12 it flushes denormals for the whole process, and a NaN must stay one. What
# vector code does need is that nobody watches errno or traps; `omp simd reduction` names the sums that may be
# reordered. -fopenmp-simd brings no OpenMP runtime: threads are torch's.
KERNEL_FLAGS = (
    *("-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    "-Wno-maybe-uninitialized",  # said of g++ 12's own AVX-512 header
)
# Tuned for a processor of the set's own day, on which g++ takes vectors of table look-ups for worth their while.
INSTRUCTION_SETS = {
    "baseline": ("-O1",),  # of processors older than AVX2 (2013): a fifth slower, compiled in half the time
    "avx2": ("-mavx2", "-mfma", "-mf16c", "-mtune=haswell"),
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
        "-mtune=icelake-server",
    ),
}
CPP_FLAGS = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", f"-I{CSRC}")
# The oldest torch whose stable ABI the bindings use: a library runs on it and on every later one.
TORCH_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"

# Machine code for A100, H100/H200, B200, and PTX that a newer card's driver compiles at start.
CUDA_ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "compute_100")
CUDA_FLAGS = ("-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v", "-Werror=all-warnings")


@dataclass(frozen=True)
class Unit:
    """One compilation: a source, the object it becomes and the whole command but for in- and output."""

    source: Path
    object: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Library:
    """A shared library: its file name, its units, and the command that links them (objects come in between).

    `effort` says how long compiling it takes.
    """

    name: str
    units: tuple[Unit, ...]
    link: tuple[str, ...]
    link_libraries: tuple[str, ...] = ()
    effort: str = "a few seconds"


def _torch_include(torch: Path) -> tuple[str, ...]:
    return ("-isystem", str(torch / "include"))


# macOS looks symbols up in what is already loaded only when told to.
_SHARED = (CXX, "-shared", *(("-undefined", "dynamic_lookup") if platform.system() == "Darwin" else ()))


def cpu_kernels(torch: Path, extra: tuple[str, ...] = ()) -> Library:
    """The CPU launchers, once per instruction set of this kind of processor, and their binding to `torch`'s folder.

    extra: further flags for compiling and linking, of a sanitizer say.
    """
    sets = INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else {"baseline": ()}
    plain = (CXX, *CPP_FLAGS, "-O1", *extra)
    units = [  # the longest first, so that no core is left alone with it
        Unit(CSRC / "bind_cpu.cpp", "bind_cpu.o", (*plain, *_torch_include(torch), TORCH_ABI)),
        Unit(CSRC / "base/instruction_set.cpp", "instruction_set.o", plain),
    ]
    units += [
        Unit(
            CSRC / operation / f"{operation}_cpu.cpp",
            f"{operation}_{name}.o",
            (CXX, *CPP_FLAGS, *KERNEL_FLAGS, *flags, f"-DMEGATRON_LITE_INSTRUCTION_SET={name}", *extra),
        )
        for operation in OPERATIONS
        for name, flags in sets.items()
    ]
    link, libraries = (*_SHARED, *extra), (f"-L{torch / 'lib'}", "-ltorch_cpu")
    return Library("libmegatron_lite_cpu", tuple(units), link, libraries, "some 20 s on two cores")


def cuda_kernels(
    torch: Path, architectures: tuple[str, ...] = CUDA_ARCHITECTURES, torch_lib: Path | None = None
) -> Library:
    """The CUDA launchers and their binding; `torch_lib` holds libtorch_cuda.so or a stub of that name."""
    command = (NVCC, *CUDA_FLAGS, f"-I{CSRC}")
    targets = [f"-gencode=arch=compute_{name.split('_')[1]},code={name}" for name in architectures]
    units = [
        Unit(CSRC / operation / f"{operation}_cuda.cu", f"{operation}_cuda.o", (*command, *targets))
        for operation in OPERATIONS
    ]
    binding = (*command, *_torch_include(torch), TORCH_ABI, "-DUSE_CUDA")
    units.append(Unit(CSRC / "bind_cuda.cpp", "bind_cuda.o", binding))
    # nvcc links as well: it knows where its own runtime is, and puts it in, so none need be found at load.
    link = (NVCC, "-shared", "-cudart=static")
    libraries = (f"-L{torch_lib or torch / 'lib'}", f"-L{torch / 'lib'}", "-ltorch_cuda", "-ltorch_cpu")
    return Library("libmegatron_lite_cuda", tuple(units), link, libraries, "a minute or more")


def host_module(pybind11: Path, extra: tuple[str, ...] = ()) -> Library:
    """The Python module `megatron_lite._host`: what is no tensor operation. Needs pybind11's headers, not torch.

    extra: as for `cpu_kernels`.
    """
    # -O1: as fast as -O3, and compiled in half the time, which is pybind11's.
    include = ("-isystem", str(pybind11), "-isystem", sysconfig.get_paths()["include"])
    units = tuple(
        Unit(source, f"{source.stem}.o", (CXX, *CPP_FLAGS, "-O1", *extra, *include))
        for source in sorted((CSRC / "host").glob("*.cpp"))
    )
    return Library("_host", units, (*_SHARED, *extra))
