"""tools/check_parallel.py: good layouts agree, three planted faults are found and named, nonsense is refused."""

from __future__ import annotations

import re

import pytest
import torch.distributed as dist
from ranks import run_on_ranks
from tiny_run import load_tool

from megatron_lite.parallel.linear import TensorAxis
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train import build

tool = load_tool("check_parallel")
MODEL = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --vocab-size 101 --seq-length 16 --micro-batch-size 1 "
    "--gradient-accumulation-steps 4 --make-vocab-size-divisible-by 8"
).split()


class _WithoutReduction(TensorAxis):
    """Enters a split region without summing the gradient over its ranks."""

    def enter(self, hidden_SBH):
        return hidden_SBH


def _miss_a_reduction(model):
    mlp = model.layers["2"].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden, axis: forward(hidden, _WithoutReduction(axis.mesh))


def _scale_a_gradient(model):
    model.layers["1"].attention.output.weight.register_hook(lambda gradient: 2 * gradient)


def _take_a_wrong_slice(model):
    dist.broadcast(model.layers["3"].mlp.up.weight.data, 0)


def _be_rank(config, steps, folder, fault):
    parallel = config.parallel
    mesh = ProcessMesh.create(
        MeshShape.of_world(
            dist.get_world_size(),
            tensor=parallel.tensor_model_parallel_size,
            pipe=parallel.pipeline_model_parallel_size,
            context=parallel.context_parallel_size,
        )
    )
    if fault is not None:
        whole = build.build_model_to_train

        def faulty(*arguments):
            model = whole(*arguments)
            fault(model)
            return model

        build.build_model_to_train = faulty
    tool.train_into(folder, config, steps, mesh)


def _check(monkeypatch, layout, *flags, fault=None):
    """The tool's exit code, its ranks forked from those of all tests; a fault is the layout's alone."""

    def run(config, ranks, steps, folder, *, on_gpus):
        folder.mkdir()
        run_on_ranks(_be_rank, ranks, config, steps, folder, fault if ranks > 1 else None)

    monkeypatch.setattr(tool, "run", run)
    return tool.main(["--layout", layout, *MODEL, *flags])


def test_a_good_layout_agrees(capfd):
    """Started as a user does, with dropout."""
    flags = ["--hidden-dropout", "0.1", "--attention-dropout", "0.1", "--steps", "2", "--device", "cpu"]
    assert tool.main(["--layout", "tp=2,sp=1", *MODEL, *flags]) == 0
    told = capfd.readouterr()
    assert "the layout computes what one process does, within 1e-05" in told.out
    assert [line.split()[0] for line in told.out.splitlines() if line][:3] == ["step", "1", "2"]
    assert re.findall(r"^(embedding|layers\.\d|final_norm|head) ", told.out, re.M) == [
        "embedding", *(f"layers.{n}" for n in range(4)), "final_norm", "head"
    ]  # fmt: skip
    assert "attention_dropout is 0, not 0.1" in told.err and "adam_eps is 0.0001, not 1e-08" in told.err
    assert "no data are named" in told.err


@pytest.mark.parametrize(
    ("layout", "flags"),
    [
        ("tp=2,pp=2,sp=1,zero=0,schedule=ZBVZeroBubble", ["--untie-embeddings-and-output-weights"]),
        ("dp=2,cp=2,zero=3,cp-comm=a2a", ["--bf16", "--recompute-granularity", "full"]),
    ],
)
def test_four_ranks_agree(monkeypatch, capsys, layout, flags):
    assert _check(monkeypatch, layout, *flags) == 0, capsys.readouterr().err
    assert "computes what one process does" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "kind", "layer", "named"),
    [
        (_miss_a_reduction, "gradient", "layers.2", "mlp_norm.weight"),
        (_scale_a_gradient, "gradient", "layers.1", "attention.output.weight"),
        (_take_a_wrong_slice, "output", "layers.3", ""),
    ],
)
def test_a_planted_fault_is_found_where_it_is(monkeypatch, capsys, fault, kind, layer, named):
    assert _check(monkeypatch, "tp=2,zero=0", fault=fault) == 1
    told = capsys.readouterr()
    assert re.search(rf"^{re.escape(layer)} .* <- its {kind} is the first to differ$", told.out, re.M)
    assert told.out.count("<-") == 1
    assert f"more than 1e-05, is the {kind} of {layer}:" in told.err
    assert f"\n  {kind}/{layer}{'.' if named else ''}{named}: max " in told.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--layout is needed"),
        (["--layout", "tp=2,tq=2"], "--layout has 'tq=2'"),
        (["--layout", "tp=3"], "tensor_model_parallel_size=3 does not divide num_attention_heads=4; choose 1, 2 or 4"),
        (["--layout", "pp=2,zero=3,schedule=ZBVZeroBubble"], "choose --zero-stage 2"),
        (["--layout", "pp=8"], "8 stages, more than num_layers=4"),
        (["--layout", "tp=2", "--steps", "0"], "--steps 0 is too small"),
        (["--layout", "tp=2", "--tolerance", "1.5"], "--tolerance 1.5 is out of range"),
        (["--layout", "tp=2", "--device", "cuda"], "2 processes are to run on 0 GPUs; give --device cpu"),
        (["--layout", "tp=2", "--num-layer", "4"], "--num-layers"),
        (["--layout", "tp=2", "--data-path", "absent"], "cannot find absent.bin"),
    ],
)
def test_nonsense_is_refused_with_its_numbers(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert tool.main([*MODEL, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_it_starts_its_ranks_itself(monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # DeepSpeed has it set where it was imported
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert tool.main(["--layout", "tp=2", *MODEL]) == 2
    assert "start this tool as one process" in capsys.readouterr().err
