"""tools/which_samples.py names the samples that steps of real runs were trained on."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import run_on_ranks
from tiny_run import TOOLS, load_tool
from train.layouts import LENGTH, VOCABULARY, Case, config_of

from megatron_lite.checkpoint.manifest import FILE_NAME, encode, read_manifest
from megatron_lite.config import sources
from megatron_lite.data.indexed import IndexedReader, IndexedWriter
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.parallel.launch import StopRequest
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train import loop
from megatron_lite.train.ledger import Landmark, StepSamples
from megatron_lite.train.progress import Progress
from megatron_lite.train.start import train_on
from megatron_lite.train.stretches import continued, stretches_in

main = load_tool("which_samples").main


def _watched_training(configs) -> list[dict[int, list[tuple[int, list[int]]]]]:
    """Train with each configuration in turn; step -> (number in the batch, tokens) of this rank's samples."""
    mesh = ProcessMesh.create(MeshShape.of_world(torch.distributed.get_world_size(), tensor=1))
    original, seen = loop.train_step, {}

    def watched(engine, mesh, micro_batches, *, step, **options):
        seen[step] = [
            (batch.index * len(batch.tokens) + i, [*batch.tokens[i].tolist(), batch.labels[i, -1].item()])
            for batch in micro_batches
            for i in range(len(batch.tokens))
        ]
        return original(engine, mesh, micro_batches, step=step, **options)

    loop.train_step = watched
    for config in configs:
        train_on(mesh, config, StopRequest(), "test")
    return seen


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run over a blend whose batch grew, then became another at a resume that left samples out too."""
    folder = tmp_path_factory.mktemp("run")
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        with IndexedWriter(folder / name, vocab_size=VOCABULARY) as writer:
            for length in draw.integers(0, 3 * LENGTH, 40):
                writer.add_document(draw.integers(0, VOCABULARY, length))
    data_path = ("3", str(folder / "a"), "1", str(folder / "b"))
    config = config_of(
        Case(1, 2, 1),
        data={"data_path": data_path, "mock_data": False, "split": "1,0,0"},
        training={"train_iters": 6, "eval_interval": 0, "global_batch_size": 8, "rampup_batch_size": (4, 4, 12)},
        checkpoint={"save": str(folder / "run"), "save_interval": 4, "keep_last": 10},
        logging={"tensorboard_dir": "none"},
    )
    later = sources.override(
        config,
        {
            "training": {
                "train_iters": 9,
                "global_batch_size": 12,
                "rampup_batch_size": None,
                "skip_samples": ("50:60",),
            }
        },
    )
    seen = {}
    for rank in run_on_ranks(_watched_training, 2, [config, later]):
        for step, samples in rank.items():
            seen.setdefault(step, {}).update(samples)
    return folder, seen


def rows_of(capsys, folder: Path, *arguments: object) -> list[dict]:
    assert main(["--load", str(folder), "--json", *map(str, arguments)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def tokens_of(row: dict) -> list[int]:
    """What the token set holds where a row says that a sample lies."""
    reader, tokens = IndexedReader(row["data"]), []
    for extent in row["documents"]:
        start = reader.document_token(extent["document"]) + extent["first"]
        assert start + extent["tokens"] <= reader.document_token(extent["document"] + 1)
        tokens += reader.tokens(start, start + extent["tokens"]).tolist()
    return tokens


def test_the_samples_of_every_step_are_those_it_was_trained_on(run, capsys):
    folder, seen = run
    sizes = []
    for step in range(1, 10):
        rows = rows_of(capsys, folder / "run", "--step", step)
        assert {row["in_batch"]: tokens_of(row) for row in rows} == seen[step]
        assert {row["step"] for row in rows} == {step}
        sizes.append(len(rows))
    assert sizes == [4, 4, 4, 8, 8, 8, 12, 12, 12]
    assert any(len(row["documents"]) > 2 for row in rows) and {row["epoch"] for row in rows} != {0}


def without_stretches(folder: Path) -> Path:
    """Checkpoints as they were before their stretches were recorded."""
    for path in folder.glob(f"step-*/{FILE_NAME}"):
        manifest = json.loads(path.read_bytes())
        del manifest["state"]["stretches"]
        path.write_bytes(encode(**{name: manifest[name] for name in inspect.signature(encode).parameters}))
    return folder


def test_pruned_checkpoints_are_not_needed(run, capsys, tmp_path):
    folder, seen = run
    shutil.copytree(folder / "run" / "step-00000009", copy := tmp_path / "step-00000009")
    for root in (tmp_path, copy):
        for step in range(1, 10):
            rows = rows_of(capsys, root, "--step", step)
            assert {row["in_batch"]: tokens_of(row) for row in rows} == seen[step]


def test_older_checkpoints_are_needed_where_a_batch_size_is_lost_with_one(run, capsys, tmp_path):
    folder, seen = run
    copy = without_stretches(shutil.copytree(folder / "run", tmp_path / "run"))
    for step in range(1, 10):
        rows = rows_of(capsys, copy, "--step", step)
        assert {row["in_batch"]: tokens_of(row) for row in rows} == seen[step]
    shutil.rmtree(copy / "step-00000004")
    assert {row["in_batch"]: tokens_of(row) for row in rows_of(capsys, copy, "--step", 2)} == seen[2]
    shutil.rmtree(copy / "step-00000006")
    assert main(["--load", str(copy), "--step", "7"]) == 2
    said = capsys.readouterr().err
    assert "the batch size changed at a checkpoint that is no longer there; ask for a step from 9 on" in said
    assert {row["in_batch"]: tokens_of(row) for row in rows_of(capsys, copy, "--step", 9)} == seen[9]


@pytest.mark.parametrize("in_one_folder", [True, False])
def test_other_data_are_not_taken_for_those_of_a_step(run, capsys, tmp_path, in_one_folder):
    """Steps 1 to 2 on the one set, 3 to 5 on the other; the checkpoint between them is gone, or in another folder."""
    folder, _ = run
    first = config_of(
        Case(1, 1, 1),
        data={"data_path": (str(folder / "a"),), "mock_data": False, "split": "1,0,0"},
        training={"train_iters": 2, "eval_interval": 0},
        checkpoint={"save": str(tmp_path / "first"), "keep_last": 1},
        logging={"tensorboard_dir": "none"},
    )
    changes = {"data": {"data_path": (str(folder / "b"),)}, "training": {"train_iters": 4}}
    if not in_one_folder:
        changes["checkpoint"] = {"save": str(tmp_path / "second"), "load": str(tmp_path / "first")}
    second = sources.override(first, changes)
    again = sources.override(second, {"training": {"train_iters": 5}})
    (seen,) = run_on_ranks(_watched_training, 1, [first, second, again])
    saved = Path(second.checkpoint.save)
    assert [path.name for path in saved.glob("step-*")] == ["step-00000005"]
    for step in (3, 4, 5):
        assert {row["in_batch"]: tokens_of(row) for row in rows_of(capsys, saved, "--step", step)} == dict(seen[step])
    assert main(["--load", str(saved), "--step", "2"]) == 2
    said = capsys.readouterr()
    assert f"step 2 was trained on other data than those of the checkpoints under {saved}: {folder / 'a'}" in said.err
    assert "ask for a step from 3 on" in said.err and not said.out
    if not in_one_folder:
        rows = rows_of(capsys, tmp_path / "first", "--step", 2)
        assert {row["in_batch"]: tokens_of(row) for row in rows} == dict(seen[2])


def test_the_checkpoint_that_a_run_went_back_past_tells_nothing(run, capsys, tmp_path):
    """Step 2 again, by other samples, from step 1 on; the checkpoint of step 2 is still that of the first time."""
    first = config_of(
        Case(1, 1, 1),
        data={"data_path": (str(run[0] / "a"),), "mock_data": False, "split": "1,0,0"},
        training={"train_iters": 2, "eval_interval": 0},
        checkpoint={"save": str(tmp_path / "run"), "save_interval": 1},
        logging={"tensorboard_dir": "none"},
    )
    second = sources.override(
        first,
        {
            "training": {"train_iters": 3, "skip_samples": ("4:9",)},
            "checkpoint": {"ckpt_step": 1, "save_interval": 3},
        },
    )
    (seen,) = run_on_ranks(_watched_training, 1, [first, second])
    assert len(list((tmp_path / "run").glob("step-*"))) == 3
    for step in (1, 2, 3):
        rows = rows_of(capsys, tmp_path / "run", "--step", step)
        assert {row["in_batch"]: tokens_of(row) for row in rows} == dict(seen[step])


def test_stretches_of_before_they_were_recorded(run):
    """One that begins at 0 is supposed where nothing speaks against it, and one that begins now elsewhere."""
    manifest = read_manifest(run[0] / "run" / "step-00000004")
    config, facts = sources.from_plain(manifest.config, ""), manifest.state["facts"]
    progress = Progress.from_state(manifest.state["progress"])
    data = facts["train_data"]

    def begins(state, config=config, data=data):
        return [stretch["step"] for stretch in continued(state, progress, config, data)]

    other = sources.override(config, {"training": {"rampup_batch_size": None}})
    before = {"facts": facts}
    assert begins(before) == [0] and begins(before, other) == begins(before, data="x") == [4]
    assert begins(manifest.state) == [0] and begins(manifest.state, other) == begins(manifest.state, data="x") == [0, 4]
    gone_back = {"stretches": continued(manifest.state, progress, other, data)}
    assert begins(gone_back, data="x") == [0, 4] and begins(gone_back, other) == [0, 4] and begins(gone_back) == [0]
    first = manifest.state["stretches"][0]
    for damaged in ([{}], [{**first, "training": {"rampup_batch_size": "x"}}], [{**first, "training": None}], 3):
        with pytest.raises(CheckpointError, match="its stretches cannot be read"):
            stretches_in({"stretches": damaged}, "here")


@pytest.mark.parametrize(
    ("length", "ends_after", "said"),
    [
        ({"train_iters": 5}, None, ""),
        ({"train_iters": 4}, 40, " if the run is made longer than its 4 steps"),
        ({"train_iters": None, "train_samples": 40}, 40, ""),
        ({"train_iters": None, "train_samples": 39}, None, " if the run is made longer than its 32 samples"),
        ({"train_iters": None, "train_epochs": 2.0}, None, " if the run is made longer than its 24 samples"),
        ({"train_iters": 9}, 39, None),
    ],
)
def test_a_step_to_come_is_within_the_run_or_behind_its_end_or_that_of_the_data(length, ends_after, said):
    """Step 5 of steps of 8, over data of which an epoch is 15 samples."""
    config = config_of(Case(1, 1, 1), training={"global_batch_size": 8, "rampup_batch_size": None, **length})
    landmark = Landmark(Path("run"), 2, 16, config, {}, [])
    stream = SimpleNamespace(samples_per_epoch=15, ends_after=ends_after)
    data, samples = load_tool("which_samples")._Data(landmark, (), stream), StepSamples(5, 32, 8, (), landmark)
    if said is None:
        with pytest.raises(ConfigError, match="take samples up to number 39, and the data end after 39"):
            data.condition(samples)
    else:
        assert data.condition(samples) == said


def test_what_cannot_be_answered_is_refused(run, capsys, tmp_path):
    folder, _ = run
    saved = folder / "run"
    for arguments, said in (
        (["--load", tmp_path, "--step", 1], "holds no checkpoint"),
        (["--load", saved, "--step", 0], "counted from 1"),
        (["--load", saved, "--step"], "--step names no step"),
        (["--load", saved, "--step", 1, "--show-text"], "the run names none"),
        (["--load", saved, "--step", 1, "--data-path", "x"], "1 entries where the run had data_path of 4"),
        (["--load", saved, "--step", 1, "--data-path", 1, folder / "b", 3, folder / "a"], "not those of training"),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        assert said in capsys.readouterr().err


def test_it_answers_without_torch(run):
    folder, _ = run
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    tool = [str(TOOLS / "which_samples.py"), "--load", str(folder / "run"), "--step", "1", "11"]
    done = subprocess.run([sys.executable, "-c", code, *tool], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "step 1: 4 samples, numbers 0 to 3" and "sample 0  epoch 0  " in lines[1]
    assert "step 11 is behind the newest checkpoint, of step 9" in done.stderr
    assert "if the run is made longer than its 9 steps" in done.stderr
