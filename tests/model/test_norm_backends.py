"""Norms by native kernels, torch and apex: each adds a residual alike, and refuses what it cannot do."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_lite.config.kernels import KernelsConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.errors import KernelError
from megatron_lite.model.norm import Norm, norm_function
from megatron_lite.parallel.linear import TensorAxis
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh

NVIDIA = {
    "apex/__init__.py": "",
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": """
import torch.nn.functional as F

def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps, memory_efficient):
    return F.layer_norm(input, normalized_shape, weight, bias, eps), memory_efficient

def fused_rms_norm_affine(input, weight, normalized_shape, eps, memory_efficient):
    return F.rms_norm(input, normalized_shape, weight, eps), memory_efficient
""",
    "fused_layer_norm_cuda.py": "",
}
"""What is called of NVIDIA's apex, by its arguments' names."""

PYPI = {
    "apex/__init__.py": "raise AssertionError('the web toolkit was imported')",
    "apex/lib/__init__.py": "",
    "apex/models.py": "",
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Puts files where packages are found, and nothing else named apex."""

    def put(files: dict[str, str]) -> Path:
        for name in [name for name in sys.modules if name.split(".")[0] in ("apex", "fused_layer_norm_cuda")]:
            monkeypatch.delitem(sys.modules, name)
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        return tmp_path

    return put


def chosen(device_type: str = "cuda", lean: bool = False):
    return norm_function(KernelsConfig(norm_backend="apex", memory_efficient_layer_norm=lean), device_type)


@pytest.mark.parametrize("lean", [False, True])
def test_nvidias_is_called(installed, lean):
    installed(NVIDIA)
    norm, hidden, weight, bias = chosen(lean=lean), torch.randn(3, 8), torch.randn(8), torch.randn(8)
    (output, said), total = norm(hidden, None, weight, bias, 1e-3)
    assert torch.equal(output, F.layer_norm(hidden, (8,), weight, bias, 1e-3)) and said is lean and total is hidden
    (output, said), total = norm(hidden, 2 * hidden, weight, None, 1e-3)
    assert torch.equal(output, F.rms_norm(total, (8,), weight, 1e-3)) and said is lean
    assert torch.equal(total, 3 * hidden)


@pytest.mark.parametrize(
    ("files", "device_type", "sentence"),
    [
        ({}, "cuda", "NVIDIA's apex is not installed; install it from source"),
        (PYPI, "cuda", "is not NVIDIA's apex, which has apex.normalization, but another project"),
        ({k: v for k, v in NVIDIA.items() if "cuda" not in k}, "cuda", "without its CUDA extension"),
        (NVIDIA, "cpu", "run on a GPU, and this device is a CPU"),
    ],
    ids=["nothing", "pypi", "no extension", "cpu"],
)
def test_anything_else_is_refused_with_the_way_out(installed, files, device_type, sentence):
    folder = installed(files)
    with pytest.raises(KernelError, match=sentence) as caught:
        chosen(device_type)
    assert "leave --norm-backend at native" in str(caught.value) and caught.value.exit_code == 2
    assert files is not PYPI or str(folder / "apex" / "__init__.py") in str(caught.value)


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("lean", [False, True])
def test_a_residual_is_added_before(kind, backend, lean):
    mesh = ProcessMesh.create(MeshShape())
    kernels = KernelsConfig(norm_backend=backend, memory_efficient_layer_norm=lean)
    norm = Norm(ModelConfig(hidden_size=24, normalization=kind), mesh, kernels)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    hidden, residual = torch.randn(2, 5, 3, 24, generator=torch.Generator().manual_seed(0))
    normal, total = norm(hidden, TensorAxis(mesh), residual)
    assert torch.equal(total, hidden + residual)
    assert torch.equal(normal, norm(total, TensorAxis(mesh)))


def test_a_norm_that_divides_by_its_weight_refuses_zeros():
    mesh = ProcessMesh.create(MeshShape())
    norm = Norm(ModelConfig(hidden_size=24), mesh, KernelsConfig(memory_efficient_layer_norm=True))
    with torch.no_grad():
        norm.weight.fill_(1)[[3, 5]] = 0
        norm(torch.ones(2, 1, 24), TensorAxis(mesh))
    with pytest.raises(KernelError, match="2 of the 24 weights of one are 0; leave it out"):
        norm(torch.ones(2, 1, 24), TensorAxis(mesh))


@pytest.mark.parametrize(
    ("dtype", "bias", "told"), [("float32", 20, False), ("bfloat16", 20, True), ("float32", 1e6, True)]
)
def test_a_bias_far_beyond_its_weight_is_told_once(dtype, bias, told, capsys):
    mesh, dtype = ProcessMesh.create(MeshShape()), getattr(torch, dtype)
    norm = Norm(ModelConfig(hidden_size=24), mesh, KernelsConfig(memory_efficient_layer_norm=True), dtype=dtype)
    with torch.no_grad():
        norm.weight.fill_(1)
        norm.bias.fill_(0)[3] = -bias
    for _ in range(2):
        norm(torch.ones(2, 1, 24, dtype=dtype), TensorAxis(mesh))
    assert capsys.readouterr().err.count(f"is up to {bias:.3g} times its weight") == told
