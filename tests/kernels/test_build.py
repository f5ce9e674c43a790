"""Native code is compiled once however many ask, again when a source changes, and never missed in silence."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_lite.data.order import Permutation
from megatron_lite.errors import KernelError
from megatron_lite.kernels import build, extension, sources
from megatron_lite.kernels.sources import CXX, NVCC, Library, Unit

ROOT = Path(__file__).resolve().parents[2]


def small_library(folder, text='extern "C" int answer() { return 42; }\n'):
    source = folder / "answer.cpp"
    source.write_text(text)
    return Library("answer", (Unit(source, "answer.o", (CXX, "-fPIC")),), (CXX, "-shared"))


def test_processes_that_start_together_compile_once(tmp_path):
    library = small_library(tmp_path)
    script = f"""
from pathlib import PosixPath
from megatron_lite.kernels.build import built
from megatron_lite.kernels.sources import Library, Unit
print(built({library!r}, "1", PosixPath({str(tmp_path / "cache")!r})))
"""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    results = [rank.communicate() for rank in ranks]
    assert len({path for path, _ in results}) == 1 and Path(results[0][0].strip()).exists()
    assert sum("compiling answer" in said for _, said in results) == 1


def test_an_edited_source_is_compiled_again_and_the_old_library_stays(tmp_path):
    first = build.built(small_library(tmp_path), "1", tmp_path / "cache")
    assert build.built(small_library(tmp_path), "1", tmp_path / "cache") == first
    edited = small_library(tmp_path, 'extern "C" int answer() { return 43; }\n')
    assert build.found(edited, "1", tmp_path / "cache") is None
    second = build.built(edited, "1", tmp_path / "cache")
    assert second != first and first.exists() and build.found(edited, "1", tmp_path / "cache") == second
    assert build.found(edited, "2", tmp_path / "cache") is None


def test_what_newer_libraries_have_replaced_is_removed(tmp_path):
    cache = tmp_path / "cache"
    newest = build.built(small_library(tmp_path), "1", cache)
    for age in range(1, 12):
        library, folder = newest.with_name(f"answer-{age}.so"), cache / f"answer-{age}"
        library.touch()
        folder.mkdir()
        for path in (library, folder):
            os.utime(path, (1e9 - age, 1e9 - age))
    (cache / "question-1").mkdir()
    second = build.built(small_library(tmp_path, 'extern "C" int answer() { return 43; }\n'), "1", cache)
    assert {path.name for path in newest.parent.glob("*.so")} == {newest.name, second.name, "answer-1.so"}
    kept = {newest.parent.name, "question-1", *(f"answer-{age}" for age in range(1, 8))}
    assert {path.name for path in cache.iterdir()} == kept


def test_a_library_is_named_for_its_own_sources_alone(tmp_path, monkeypatch):
    csrc = shutil.copytree(sources.CSRC, tmp_path / "csrc")
    for module in (build, sources):
        monkeypatch.setattr(module, "CSRC", csrc)

    def places():
        libraries = sources.cpu_kernels(extension.TORCH), sources.host_module(tmp_path)
        return [build._place(library, "1", tmp_path)[1] for library in libraries]

    before = places()
    for header, renamed in (
        ("host/permutation.h", [False, True]),
        ("layer_norm/layer_norm.h", [True, False]),
        ("base/cpu.h", [True, True]),
    ):
        with open(csrc / header, "a") as file:
            file.write("\n")
        assert [a != b for a, b in zip(before, places(), strict=True)] == renamed, header
        before = places()


def test_what_does_not_compile_is_told_in_the_compilers_words(tmp_path):
    with pytest.raises(KernelError, match=r"answer does not compile.*(?s:.)*error: .*nonsense"):
        build.built(small_library(tmp_path, "nonsense;\n"), "1", tmp_path / "cache")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(KernelError, match=re.escape(f"cannot be compiled into {tmp_path / 'cache'}")):
        build.built(small_library(tmp_path), "1", tmp_path / "cache")


def test_a_library_that_is_there_needs_no_compiler_whatever_its_name(tmp_path, monkeypatch):
    first = build.built(small_library(tmp_path), "1", tmp_path / "cache")
    for name in ("g++", "c++", "no-such-compiler"):
        monkeypatch.setenv("CXX", name)
        assert build.built(small_library(tmp_path), "1", tmp_path / "cache") == first


def test_the_compiler_may_have_a_launcher_and_arguments(tmp_path, monkeypatch):
    launcher = tmp_path / "launcher"
    launcher.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path / "calls"}\nexec "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setenv("CXX", f"{launcher} {' '.join(build.find_compiler())} -DNAMED=1")
    build.built(small_library(tmp_path), "1", tmp_path / "cache")
    compiled, linked = (tmp_path / "calls").read_text().splitlines()
    assert "-DNAMED=1 -fPIC" in compiled and "-DNAMED=1 -shared" in linked


def test_nvcc_is_given_the_compiler_without_its_launcher(monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", lambda: "/cuda/bin/nvcc")
    monkeypatch.setattr(build, "find_compiler", lambda: ("/usr/bin/ccache", "g++"))
    assert build._called((NVCC, "-O3")) == ("/cuda/bin/nvcc", "-ccbin=g++", "-O3")


def without_a_compiler(script):
    environment = {**os.environ, "CXX": "no-such-compiler"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_without_a_compiler_the_kernels_that_are_built_are_used():
    expected = Permutation(1000, 1)(7)
    done = without_a_compiler("""
from megatron_lite.data.order import Permutation
from megatron_lite.kernels import extension
print(Permutation(1000, 1)(7))
extension.require_native("cpu")
""")
    assert done.stdout == f"{expected}\n" and not done.stderr


def test_a_device_without_kernels_is_said_aloud(capsys):
    assert not extension.load("mps")
    assert "kernels on mps: plain torch is used, since there are native kernels" in capsys.readouterr().err


def test_without_a_compiler_the_reference_runs_and_the_log_says_so_once():
    done = without_a_compiler("""
import torch
from megatron_lite.kernels import extension, sources
sources.CPP_FLAGS += ("-DNEVER_BUILT",)
from megatron_lite.data.order import Permutation
from megatron_lite.kernels.rms_norm import rms_norm
from megatron_lite.errors import KernelError
for _ in range(3):
    print(rms_norm(torch.full((2, 3), 5.0), torch.full((3,), 2.0)).sum().round().item(), Permutation(1000, 1)(7))
try:
    extension.require_native("cpu")
except KernelError as error:
    print(error)
""")
    assert done.stdout.count(f"12.0 {Permutation(1000, 1)(7)}\n") == 3
    assert "--require-native-kernels: the kernels for cpu are not native, since no C++ compiler" in done.stdout
    said = done.stderr.splitlines()
    assert len(said) == 2 and all("no C++ compiler (no-such-compiler)" in line and "CXX=" in line for line in said)


def test_the_table_names_every_operator():
    command = [sys.executable, "-m", "megatron_lite.kernels", "--require-native-kernels", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^layer_norm\s+native", done.stdout, re.M) and "instructions" in done.stdout
    if not torch.version.cuda:
        assert "cuda: torch" in done.stdout
        refused = subprocess.run([*command[:-1], "cuda"], cwd=ROOT, capture_output=True, text=True)
        assert refused.returncode == 2 and "built without CUDA" in refused.stdout and "Traceback" not in refused.stderr


def test_no_function_is_shared_between_instruction_sets():
    """A weak symbol is merged by the linker: code of a wide set would run on a processor that lacks it."""
    objects = sorted(extension.library("cpu").parent.glob("*_avx*.o"))
    assert len(objects) >= len(sources.OPERATIONS)
    symbols = subprocess.run(["nm", "-C", *objects], capture_output=True, text=True, check=True).stdout
    weak = re.findall(r"(?m)^[0-9a-f]+ [WVu] (.*)$", symbols)
    assert not [symbol for symbol in weak if symbol != "DW.ref.__gxx_personality_v0"]
