"""A run that stops and goes on is the run that never stopped, to the last bit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from ranks import run_on_ranks
from train.layouts import BATCH, Case, config_of

from megatron_lite.checkpoint.find import find
from megatron_lite.checkpoint.load import read_tensor
from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.config import cli, sources
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import CheckpointError, UserError
from megatron_lite.parallel.launch import StopRequest
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train.compare import assemble
from megatron_lite.train.start import train_on

STEPS = 6
LAYOUTS = {
    1: [Case(zero=0), Case(zero=1, dtype="bf16", llama=True)],
    2: [
        Case(2, 1, 0),
        Case(1, 2, 0),
        Case(2, 1, 1, sequence_parallel=True, dtype="bf16"),
        Case(1, 2, 1, llama=True, documents=True, pieces=5),
        Case(1, 2, 2, dtype="bf16", micro_batches=2),
        Case(1, 2, 3, llama=True),
        Case(2, 1, 3, dtype="bf16"),
        Case(1, 2, 1, optimizer="sgd"),
        Case(2, 1, 0, optimizer="adamw8bit"),
        Case(1, 2, 1, optimizer="adamw8bit", llama=True),
        Case(1, 2, 2, optimizer="adamw8bit", dtype="bf16"),
        Case(1, 2, 3, optimizer="adamw8bit"),
        Case(pipe=2, schedule="GPipe", zero=1),
        Case(pipe=2, schedule="LoopedBFS", zero=3, llama=True, dtype="bf16"),
        Case(pipe=2, layers=4, schedule="ZBVZeroBubble", zero=2),
        Case(context=2, zero=1, exchange="a2a", optimizer="adamw8bit", dtype="bf16"),
    ],
}


def _config(case: Case, folder: Path, **changes) -> RunConfig:
    config = config_of(
        case,
        model={"hidden_dropout": 0.1, "attention_dropout": 0.1},
        optimizer={"lr_warmup_iters": 2},
        training={
            "train_iters": STEPS,
            "eval_interval": 2,
            "eval_iters": 2,
            "micro_batch_size": BATCH // 2 // case.data,
            "rampup_batch_size": (BATCH // 2, BATCH // 2, 2 * BATCH),
        },
        checkpoint={"save": str(folder)},
        logging={"tensorboard_dir": "none", "log_interval": 100},
    )
    for name, value in changes.items():
        config = sources.override(config, {sources.section_of()[name]: {name: value}})
    return config


def _train(config: RunConfig) -> None:
    mesh = ProcessMesh.create(
        MeshShape.of_world(
            torch.distributed.get_world_size(),
            tensor=config.parallel.tensor_model_parallel_size,
            pipe=config.parallel.pipeline_model_parallel_size,
            context=config.parallel.context_parallel_size,
        )
    )
    train_on(mesh, config, StopRequest(), "test")


def _train_all(configs: list[RunConfig]) -> None:
    for config in configs:
        _train(config)


def _losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == sorted(set(steps)), "a step is logged twice"
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def _state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: read_tensor(folder, name) for name in read_manifest(folder).tensors}


@pytest.mark.parametrize("ranks", sorted(LAYOUTS))
def test_resume_is_bitwise(ranks, tmp_path):
    runs = []
    for number, case in enumerate(LAYOUTS[ranks]):
        whole, parts = tmp_path / f"{number}-whole", tmp_path / f"{number}-parts"
        runs += [
            _config(case, whole),
            # Stopped in the middle and once more, past what was logged after the last save.
            _config(case, parts, exit_interval=3),
            _config(case, parts, exit_interval=4),
            _config(case, parts),
        ]
    run_on_ranks(_train_all, ranks, runs, timeout=300)
    for number, case in enumerate(LAYOUTS[ranks]):
        whole, parts = tmp_path / f"{number}-whole", tmp_path / f"{number}-parts"
        assert _losses(parts) == _losses(whole), case
        assert len(_losses(whole)) == STEPS
        ours, theirs = _state(parts / f"step-{STEPS:08d}"), _state(whole / f"step-{STEPS:08d}")
        # Among what is stored of a box is its checksum: 8-bit codes are compared as they are.
        assert read_manifest(parts / f"step-{STEPS:08d}").tensors == read_manifest(whole / f"step-{STEPS:08d}").tensors
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert torch.equal(ours[name], theirs[name]), f"{case}: {name}"


def test_a_value_that_is_found_damaged_while_it_is_loaded_costs_one_step(tmp_path):
    """One rank finds it when much has been loaded: all take the step before, of which the same step follows."""
    case, folder = Case(1, 2, 2, optimizer="adamw8bit", dtype="bf16"), tmp_path / "run"
    config = _config(case, folder, train_iters=3, save_interval=1, rampup_batch_size=None)
    run_on_ranks(_train, 2, config)
    newest = folder / "step-00000003"
    before = read_manifest(newest)
    with open(newest / "rank-00001.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    run_on_ranks(_train, 2, config)
    after = read_manifest(newest)
    assert (after.tensors, after.state) == (before.tensors, before.state)
    assert len(_state(newest)) == len(before.tensors)


def test_a_step_whose_optimizer_state_was_not_read_counts_as_saved_only_if_it_is_whole(tmp_path):
    folder, mesh = tmp_path / "run", ProcessMesh.create(MeshShape())
    config = _config(Case(), folder, train_iters=1, rampup_batch_size=None)

    def newest():
        run = train_on(mesh, config, StopRequest(), "test")
        assert run.keeper.saved_step == run.progress.step == 1
        return (folder / "step-00000001").stat().st_ino

    first = newest()
    config = sources.override(config, {"checkpoint": {"no_load_optim": True}})
    assert newest() == first, "it is whole: nothing is put in its place"
    box = read_manifest(folder / "step-00000001").tensors["exp_avg/final_norm.weight"].boxes[0]
    with open(folder / "step-00000001" / box.file, "r+b") as file:
        file.seek(box.first_byte)
        file.write(b"\xff\xff")
    assert newest() != first
    assert find(folder, mesh) == folder / "step-00000001"


def test_state_is_the_same_at_another_layout(tmp_path):
    """Save at one layout, load at another, save again without a step: the gathered state is unchanged."""
    first = tmp_path / "first"
    run_on_ranks(_train, 2, _config(Case(2, 1, 1, llama=True), first, train_iters=2))
    stored = _state(first / "step-00000002")
    targets = [
        Case(1, 2, 3, llama=True),
        Case(1, 2, 1, llama=True),
        Case(2, 1, 0, llama=True),
        Case(2, 1, 3, llama=True),
        Case(pipe=2, zero=1, llama=True),
        Case(pipe=2, zero=3, llama=True),
        Case(context=2, zero=1, llama=True),
        Case(context=2, zero=3, llama=True),
    ]
    by_rank = run_on_ranks(_loaded_pieces, 2, [(str(first), case) for case in targets])
    four = run_on_ranks(
        _loaded_pieces, 4, [(str(first), Case(4, 1, 2, llama=True)), (str(first), Case(2, 2, 3, llama=True))]
    )
    for outcomes in itertools.chain(zip(*by_rank, strict=True), zip(*four, strict=True)):
        gathered = assemble([piece for pieces in outcomes for piece in pieces])
        assert gathered.keys() == stored.keys()
        for name in stored:
            assert torch.equal(gathered[name], stored[name]), name


def _loaded_pieces(jobs):
    from megatron_lite.checkpoint.load import load
    from megatron_lite.train import build

    found = []
    for folder, case in jobs:
        mesh = ProcessMesh.create(MeshShape(case.pipe, case.data, case.context, tensor=case.tensor))
        config = config_of(case, training={"seed": 99})
        engine = build.build_engine(config, build.build_model_to_train(config, mesh, config.model.vocab_size), mesh)
        load(Path(folder) / "step-00000002", engine.pieces(), mesh)
        engine.refresh()
        found.append([dataclasses.replace(piece, tensor=piece.tensor.clone()) for piece in engine.pieces()])
    return found


def test_training_goes_on_at_another_layout(tmp_path):
    """Dropout 0: the curve after the change is the unbroken one to rounding."""

    def config(case, folder, **changes):
        return _config(case, folder, hidden_dropout=0.0, attention_dropout=0.0, rampup_batch_size=None, **changes)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_on_ranks(_train, 2, config(Case(2, 1, 1), whole))
    run_on_ranks(_train, 2, config(Case(2, 1, 1), parts, exit_interval=3))
    run_on_ranks(_train, 2, config(Case(1, 2, 3), parts, micro_batch_size=1, exit_interval=4))
    run_on_ranks(_train, 2, config(Case(pipe=2, zero=1), parts, micro_batch_size=1, exit_interval=5))
    run_on_ranks(_train, 2, config(Case(context=2, zero=2), parts, micro_batch_size=1))
    ours, theirs = _losses(parts), _losses(whole)
    assert ours.keys() == theirs.keys()
    for step, loss in theirs.items():
        assert ours[step] == pytest.approx(loss, rel=1e-5), step


def test_resume_words(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(AssertionError, match="holds no complete checkpoint; take --resume auto"):
        run_on_ranks(_train, 1, _config(Case(), folder, resume="must", rampup_batch_size=None))
    assert not folder.exists()
    run_on_ranks(_train, 1, _config(Case(), folder, train_iters=2, rampup_batch_size=None))
    with pytest.raises(AssertionError, match=r"--resume never, but .* is not empty .* --overwrite to empty it"):
        run_on_ranks(_train, 1, _config(Case(), folder, resume="never", rampup_batch_size=None))
    run_on_ranks(
        _train, 1, _config(Case(), folder, resume="never", overwrite=True, train_iters=1, rampup_batch_size=None)
    )
    assert sorted(_losses(folder)) == [1]
    with pytest.raises(AssertionError, match="does not fit this model: num_layers is 2 there and 3 here"):
        run_on_ranks(_train, 1, _config(Case(), folder, num_layers=3, rampup_batch_size=None))


def test_one_folder_to_save_and_to_load_goes_on(tmp_path):
    """As Megatron's scripts have it, whether the folder is there yet or not."""
    folder = tmp_path / "run"
    for length in (1, 3):
        run_on_ranks(_train, 1, _config(Case(), folder, load=f"{folder}/", train_iters=length, rampup_batch_size=None))
    assert list(_losses(folder)) == [1, 2, 3]


def test_what_is_said_goes_on_where_a_run_may_not_be_resumed(tmp_path):
    folder = tmp_path / "run"
    config = _config(Case(), folder, resume="never", overwrite=True, exit_interval=1, rampup_batch_size=None)
    run_on_ranks(_train, 1, config)
    told = json.loads((folder / "exit.json").read_text())["how_to_go_on"]
    assert told == "the same command, but for --resume, goes on from step 1: test --resume auto --no-overwrite"
    config, _ = cli.load("--overwrite --resume never --resume auto --no-overwrite".split())
    assert config.checkpoint.resume == "auto" and not config.checkpoint.overwrite


@pytest.mark.parametrize("mine", [("chapter1.tex",), ("config.yaml", "exit.json", "latest", "metrics.jsonl")])
def test_overwrite_spares_a_folder_that_is_no_run(mine, tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    for name in mine:
        (folder / name).write_text("years of work")
    with pytest.raises(UserError, match="holds neither checkpoints nor"):
        train_on(
            ProcessMesh.create(MeshShape()), _config(Case(), folder, resume="never", overwrite=True), StopRequest(), ""
        )
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(mine, "years of work")


def test_finetune_takes_weights_alone(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run_on_ranks(_train, 1, _config(Case(), first, train_iters=3, rampup_batch_size=None))
    config = _config(
        Case(),
        second,
        train_iters=1,
        lr=1e-30,
        weight_decay=0.0,
        load=str(first),
        finetune=True,
        rampup_batch_size=None,
    )
    run_on_ranks(_train, 1, config)
    ours, theirs = _state(second / "step-00000001"), _state(first / "step-00000003")
    weights = [name for name in theirs if name.startswith("weight/")]
    assert weights and all(torch.equal(ours[name], theirs[name]) for name in weights)
    assert not torch.equal(ours["exp_avg/final_norm.weight"], theirs["exp_avg/final_norm.weight"])
    assert list(_losses(second)) == [1]


def test_schedule_of_the_checkpoint_is_kept_unless_overridden(tmp_path):
    def rates(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line["lr"] for line in lines if "lr" in line}

    kept, changed = tmp_path / "kept", tmp_path / "changed"
    for folder in (kept, changed):
        run_on_ranks(_train, 1, _config(Case(), folder, lr=1e-3, exit_interval=2, rampup_batch_size=None))
    run_on_ranks(_train, 1, _config(Case(), kept, lr=5e-4, rampup_batch_size=None))
    run_on_ranks(
        _train, 1, _config(Case(), changed, lr=5e-4, override_opt_param_scheduler=True, rampup_batch_size=None)
    )
    assert rates(changed)[3] == pytest.approx(rates(kept)[3] / 2)


def test_errors_of_one_rank_reach_all(tmp_path):
    with pytest.raises(AssertionError, match="UserError"):
        run_on_ranks(_fail_together, 2)


def _fail_together() -> None:
    from megatron_lite.errors import DataError
    from megatron_lite.train import build

    mesh = ProcessMesh.create(MeshShape(data=2))

    def action():
        if mesh.global_rank == 1:
            raise DataError("planted")

    try:
        build.together(mesh, action)
    except UserError as error:
        assert "planted" in str(error) and not isinstance(error, CheckpointError)
        raise
