"""The loop's once-in-a-while: validation, the best checkpoint, early stopping, looks at gradients, NaN."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from ranks import run_on_ranks
from train.layouts import BATCH, LENGTH, VOCABULARY, Case, config_of

from megatron_lite.checkpoint import store
from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.checkpoint.remote import RemoteCopies
from megatron_lite.config import cli, sources
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import CheckpointError, NonFiniteError
from megatron_lite.parallel.launch import StopRequest
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train import build
from megatron_lite.train.start import train_on
from megatron_lite.train.step import train_step


def _config(folder: Path, case: Case | None = None, **fields) -> RunConfig:
    config = config_of(
        case or Case(),
        training={"eval_interval": 0, "train_iters": 6},
        checkpoint={"save": str(folder)},
        logging={"tensorboard_dir": "none"},
    )
    for name, value in fields.items():
        config = sources.override(config, {sources.section_of()[name]: {name: value}})
    return config


def _train(*configs: RunConfig) -> None:
    for config in configs:
        size, parallel = torch.distributed.get_world_size(), config.parallel
        sizes = {"tensor": parallel.tensor_model_parallel_size, "pipe": parallel.pipeline_model_parallel_size}
        mesh = ProcessMesh.create(MeshShape.of_world(size, **sizes))
        train_on(mesh, config, StopRequest(), "test")


def _records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_early_stopping_keeps_the_best_checkpoint(tmp_path):
    """A learning rate that climbs makes the validation loss fall at first and rise later."""
    folder = tmp_path / "run"
    config = _config(
        folder,
        train_iters=200,
        eval_interval=2,
        eval_iters=2,
        early_stopping_patience=2,
        keep_last=1,
        save_interval=1,
        save_copy_to=f"file://{tmp_path}/copies",
        lr=1.0,
        lr_warmup_iters=60,
        lr_warmup_init=1e-3,
    )
    run_on_ranks(_train, 1, config)
    losses = {r["step"]: r["valid_loss"] for r in _records(folder) if "valid_loss" in r}
    best = min(losses, key=losses.get)
    assert max(losses) == best + 4, "stopped after two validations without a better one"
    assert json.loads((folder / "exit.json").read_text())["cause"] == "early_stopping"
    assert store.best(folder).name == f"step-{best:08d}"
    assert sorted(store.steps(folder)) == [best, best + 4], "all but the newest and the best are pruned"
    copies = RemoteCopies(config.checkpoint.save_copy_to)
    assert copies.steps() == [best, best + 4] and copies.best() == best
    # Started again it ends at once and says so; with more patience it goes on.
    for patience, last in ((2, best + 4), (3, best + 6)):
        (folder / "exit.json").unlink()
        run_on_ranks(_train, 1, sources.override(config, {"training": {"early_stopping_patience": patience}}))
        assert _records(folder)[-1]["step"] == last
        told = json.loads((folder / "exit.json").read_text())
        assert told["cause"] == "early_stopping"
        assert f"with a larger --early-stopping-patience, goes on from step {last}" in told["how_to_go_on"]
    progress = read_manifest(folder / f"step-{best + 6:08d}").state["progress"]
    assert progress["best_step"] == best and progress["best_valid_loss"] == losses[best]


def test_a_complete_run_started_again_adds_nothing(tmp_path):
    config = _config(tmp_path / "run", train_iters=3, eval_interval=2, eval_iters=1)
    run_on_ranks(_train, 1, config)
    before = _records(tmp_path / "run")
    run_on_ranks(_train, 1, config)
    assert _records(tmp_path / "run") == before
    assert [r["step"] for r in before if "valid_loss" in r] == [2, 3]


def test_histograms_and_zeros_are_taken_when_asked(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    configs = [
        _config(
            tmp_path / f"zero{zero}",
            Case(1, 2, zero),
            train_iters=2,
            tensorboard_dir=None,
            log_histograms_interval=2,
            log_num_zeros_in_grad=True,
        )
        for zero in (0, 1, 2, 3)
    ]
    run_on_ranks(_train, 2, *configs)
    seen = {}
    for zero in (0, 1, 2, 3):
        events = EventAccumulator(str(tmp_path / f"zero{zero}" / "tensorboard"), {"histograms": 0})
        events.Reload()
        tag = "gradients/layers.1.mlp.up.weight"
        assert "weights/embedding.word.weight" in events.Tags()["histograms"]
        (histogram,) = events.Histograms(tag)
        seen[zero] = histogram.histogram_value.sum_squares
        assert histogram.step == 2
        zeros = [r["num_zeros_in_grad"] for r in _records(tmp_path / f"zero{zero}") if "loss" in r]
        # Padding rows have no gradient and do not count; with a tied head every other element has one.
        assert len(zeros) == 2 and max(zeros) < 10
    for zero in (1, 2, 3):
        assert seen[zero] == pytest.approx(seen[0], rel=1e-4)


@pytest.mark.parametrize(
    "case",
    [Case(1, 2, 0), Case(1, 2, 1), Case(2, 1, 2), Case(1, 2, 3, dtype="bf16"), Case(pipe=2, zero=1, schedule="GPipe")],
    ids=str,
)
def test_non_finite_loss_stops_all_ranks_and_names_the_weight(case, tmp_path):
    config = _config(tmp_path / "run", case, save_interval=1, train_iters=10, exit_interval=2)
    assert run_on_ranks(_poisoned, 2, config) == ["NonFiniteError"] * 2
    told = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert told["code"] == 3 and told["step"] == 2
    # The last stage alone has the final norm and a loss.
    last = 1 if case.pipe == 2 else 0
    hurt = "layers.0.mlp.up.weight on rank 1" if case.tensor == 2 else f"final_norm.weight on rank {last}"
    assert f"step 3: the loss is nan on rank {last}; the first non-finite weight is {hurt}" in told["message"]
    assert list(store.steps(tmp_path / "run")) == [1, 2], "the last good checkpoint is intact"


def _poisoned(config: RunConfig) -> str:
    """Train two steps, put a NaN into the weights as they are loaded, go on.

    A weight that is split over tensor ranks is hurt on the second of them alone.
    """
    from megatron_lite.train import start

    _train(config)
    load = start.load

    def load_with_a_nan(folder, pieces, mesh, **options):
        state = load(folder, pieces, mesh, **options)
        is_split = mesh.size("tensor") > 1
        name = "weight/layers.0.mlp.up.weight" if is_split else "weight/final_norm.weight"
        for piece in pieces:
            if piece.name == name and mesh.rank("tensor") == mesh.size("tensor") - 1:
                piece.tensor[...] = float("nan")
        return state

    start.load = load_with_a_nan
    try:
        _train(sources.override(config, {"training": {"exit_interval": None}}))
    except NonFiniteError as error:
        return type(error).__name__
    finally:
        start.load = load
    return "nothing happened"


def _step_with_a_hurt_gradient(cases: list[Case]) -> list[str]:
    """What is said of a step in which rank 1 alone makes a gradient NaN."""
    said = []
    for case in cases:
        mesh = ProcessMesh.create(MeshShape(data=case.data, tensor=case.tensor))
        config = config_of(case)
        engine = build.build_engine(config, build.build_model_to_train(config, mesh, VOCABULARY), mesh)
        if mesh.global_rank == 1:
            engine.module.get_parameter("layers.1.mlp.up.weight").register_hook(lambda gradient: gradient * math.nan)
        loader = build.open_loader(config, build.open_stream(config, "train", VOCABULARY), mesh, VOCABULARY)
        numbers = {"target_tokens": BATCH * LENGTH, "step": 1, "seed": None, "learning_rate": 1e-2}
        with pytest.raises(NonFiniteError) as caught:
            train_step(engine, mesh, loader.step(0, BATCH), **numbers)
        said.append(str(caught.value))
    return said


def test_a_gradient_that_is_not_finite_is_named_while_it_is_there():
    cases = [Case(2, 1, 0), *(Case(1, 2, zero) for zero in (0, 1, 2, 3)), Case(1, 2, 1, dtype="bf16")]
    mine, theirs = run_on_ranks(_step_with_a_hurt_gradient, 2, cases)
    assert mine == theirs
    for case, text in zip(cases, mine, strict=True):
        if case.zero < 2:
            where = "on rank 1" if case.tensor == 2 else "on rank 0"
            assert f"gradient norm is nan; the first non-finite gradient is layers.1.mlp.up.weight {where}" in text
            assert ("summed over 2 data ranks" in text) == (case.data == 2)
        else:
            assert "all weights are finite, and gradients are not held any more" in text


def test_optimizer_state_on_the_host_trains_alike(tmp_path):
    """CPU offload of a user's DeepSpeed JSON: the same losses, and a checkpoint that resumes."""
    for name, user in (("here", {}), ("offloaded", {"offload_optimizer": {"device": "cpu"}})):
        for zero in (2, 3):
            path = tmp_path / f"{name}{zero}.json"
            path.write_text(json.dumps({"zero_optimization": {"stage": zero, **user}}))
    configs = {
        (name, zero): _config(
            tmp_path / f"{name}{zero}",
            Case(1, 2, zero, dtype="bf16", optimizer=optimizer),
            deepspeed_config=str(tmp_path / f"{name}{zero}.json"),
            train_iters=4,
        )
        for name in ("here", "offloaded")
        for zero, optimizer in ((2, "adamw"), (3, "adamw8bit"))
    }
    halves = [sources.override(c, {"training": {"exit_interval": 2}}) for c in configs.values()]
    run_on_ranks(_train, 2, *halves, *configs.values())
    for zero in (2, 3):
        curves = [[r["loss"] for r in _records(tmp_path / f"{name}{zero}")] for name in ("here", "offloaded")]
        assert len(curves[0]) == 4 and curves[1] == pytest.approx(curves[0], rel=2e-3)


def test_two_runs_refuse_each_other_and_the_folder_tells_how_it_was_made(tmp_path):
    folder = tmp_path / "run"
    config = _config(folder, train_iters=2)
    run_on_ranks(_train, 1, config)
    again, _ = cli.load(["--config", str(folder / "config.yaml"), "--save", str(tmp_path / "again")])
    run_on_ranks(_train, 1, again)
    assert [r["loss"] for r in _records(folder)] == [r["loss"] for r in _records(tmp_path / "again")]
    mesh = ProcessMesh(MeshShape(), 0)
    with (
        store.claim(folder, mesh),
        pytest.raises(AssertionError, match=r"CheckpointError.*is saving there; stop it"),
    ):
        run_on_ranks(_train, 1, config)
    with pytest.raises(CheckpointError), store.claim(folder, mesh), store.claim(folder, mesh):
        pass


def test_skipped_samples_and_lengths(tmp_path):
    """A run given in samples, with a range left out, trains on the samples after it."""
    plain, skipping = tmp_path / "plain", tmp_path / "skipping"
    run_on_ranks(
        _train,
        1,
        _config(plain, train_iters=6, lr=1e-30, weight_decay=0.0),
        _config(skipping, train_iters=None, train_samples=16, skip_samples=("4:12",), lr=1e-30, weight_decay=0.0),
    )
    losses = {r["step"]: r["loss"] for r in _records(plain)}
    assert [r["loss"] for r in _records(skipping)] == pytest.approx([losses[1], losses[4], losses[5], losses[6]])
