"""setup.py: which libraries are compiled ahead of time, and that a wheel carries them."""

import runpy
from pathlib import Path

import pytest
import setuptools

from megatron_lite.errors import KernelError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The build_ext of setup.py, into a wheel; nothing is compiled: each library is a file of its name."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.delenv("MEGATRON_LITE_CUDA", raising=False)
    runpy.run_path(str(ROOT / "setup.py"))
    command = given["cmdclass"]["build_ext"](setuptools.Distribution())
    command.build_lib, command.editable_mode, command.inplace = str(tmp_path / "wheel"), False, False
    for name in ("host", "cpu", "cuda"):
        library = tmp_path / name
        library.write_text(name)
        monkeypatch.setattr(command, f"_{name}", lambda library=library: library)
    return command


def carried(command):
    """What the wheel holds, {name without what depends on Python: which library it is}."""
    files = [path for path in Path(command.build_lib, "megatron_lite").rglob("*") if path.is_file()]
    return {path.name.split(".cpython")[0]: path.read_text() for path in files}


@pytest.mark.parametrize(
    ("wish", "torch_has_cuda", "compiled"),
    [(None, False, False), (None, True, True), ("0", True, False), ("1", False, True)],
)
def test_a_wheel_carries_the_libraries_that_are_wished(wish, torch_has_cuda, compiled, command, monkeypatch):
    monkeypatch.setattr(command, "_torch", lambda: (None, {"cuda": "13.0" if torch_has_cuda else None}))
    if wish:
        monkeypatch.setenv("MEGATRON_LITE_CUDA", wish)
    command.run()
    expected = {"_host": "host", "libmegatron_lite_cpu.so": "cpu"}
    assert carried(command) == expected | ({"libmegatron_lite_cuda.so": "cuda"} if compiled else {})
    assert Path(command.build_lib, "megatron_lite/kernels/libmegatron_lite_cpu.so").is_file()


def test_a_source_tree_keeps_its_libraries_where_it_looks(command):
    command.editable_mode = True
    command.run()
    assert not Path(command.build_lib).exists()


def test_cuda_that_cannot_be_had_is_an_error_only_if_insisted_on(command, monkeypatch):
    def without_nvcc():
        raise KernelError("no nvcc")

    monkeypatch.setattr(command, "_cuda", without_nvcc)
    monkeypatch.setattr(command, "_torch", lambda: (None, {"cuda": "13.0"}))
    said = []
    monkeypatch.setattr(command, "warn", said.append)
    command.run()
    assert said == ["kernels/libmegatron_lite_cuda.so is not compiled now: no nvcc"] and len(carried(command)) == 2
    monkeypatch.setenv("MEGATRON_LITE_CUDA", "1")
    with pytest.raises(KernelError, match="no nvcc"):
        command.run()
