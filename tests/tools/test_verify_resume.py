"""tools/verify_resume.py: what it finds the same, what it finds out, how it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_on_ranks
from tiny_run import load_tool
from train.layouts import LENGTH, VOCABULARY, Case, config_of

from megatron_lite.config import sources
from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.errors import MegatronLiteError
from megatron_lite.parallel.launch import StopRequest
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train.start import train_on

tool = load_tool("verify_resume")


def _train(*configs):
    for config in configs:
        mesh = ProcessMesh.create(MeshShape.of_world(torch.distributed.get_world_size(), tensor=1))
        train_on(mesh, config, StopRequest(), "test")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a run of four steps, of the same taken up again after two, and of one from another seed."""
    folder = tmp_path_factory.mktemp("runs")

    def config(name, steps, **training):
        return config_of(
            Case(1, 2, 1),
            training={"train_iters": steps, "eval_interval": 0, **training},
            optimizer={"lr_decay_iters": 4},
            checkpoint={"save": str(folder / name)},
            logging={"tensorboard_dir": "none"},
        )

    configs = [config("unbroken", 4), config("broken", 2), config("broken", 4), config("other", 4, seed=5)]
    run_on_ranks(_train, 2, *configs)
    begun = configs[0]
    return folder, tool.Plan(begun, 2, begun, 2)


def test_a_run_that_goes_on_exactly_is_found_the_same(runs, capsys):
    folder, planned = runs
    tool.judge(folder / "unbroken", folder / "broken", planned, tool.VerifyOptions(steps=4, kills=1))
    rows = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines() if line[:1].strip()}
    assert rows["loss"][-3:] == ["4", "0", "0"] and rows["samples_crc32"][-3:] == ["4", "0", "0"]
    assert rows["weight at step 4"][-2:] == ["0", "0"] and rows["exp_avg_sq at step 4"][-2:] == ["0", "0"]


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda record: record.update(loss=record["loss"] * (1 + 2**-20)), "loss differs"),
        (lambda record: record.update(samples_crc32=record["samples_crc32"] ^ 1), "samples_crc32 differs"),
        (lambda record: record.pop("lr"), "lr differs"),
        (lambda record: record.update(step=1), "step 1 twice"),
        (lambda record: record.update(step=9), "has steps [1, 2, 4, 9]"),
    ],
)
def test_one_number_of_one_step_is_enough(runs, tmp_path, break_it, said):
    folder, planned = runs
    copy = shutil.copytree(folder / "broken", tmp_path / "broken")
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[2])
    break_it(record)
    lines[2] = json.dumps(record)
    (copy / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(MegatronLiteError) as found:
        tool.judge(folder / "unbroken", copy, planned, tool.VerifyOptions(steps=4, kills=1))
    assert said in str(found.value)


def test_another_state_is_found_out_though_the_curve_be_the_same(runs, tmp_path, capsys):
    folder, planned = runs
    other = shutil.copytree(folder / "other", tmp_path / "other")
    shutil.copy(folder / "broken" / "metrics.jsonl", other / "metrics.jsonl")
    with pytest.raises(
        MegatronLiteError, match=r"exp_avg at step 4.*weight at step 4.*counters, schedule, seed differ"
    ):
        tool.judge(folder / "unbroken", other, planned, tool.VerifyOptions(steps=4, kills=1))
    assert "<- differs" in capsys.readouterr().out


def test_a_killed_run_of_everything_that_has_state_goes_on_to_the_last_bit(tmp_path, capsys):
    """8-bit AdamW, dropout, a batch that grows, a blend whose sets are gone through more than once; killed twice."""
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        with IndexedWriter(tmp_path / name, vocab_size=VOCABULARY) as writer:
            for _ in range(12):
                writer.add_document(draw.integers(0, VOCABULARY, 2 * LENGTH))
    config = config_of(
        Case(1, 1, 1),
        model={"hidden_dropout": 0.1},
        data={"data_path": ("3", str(tmp_path / "a"), "1", str(tmp_path / "b")), "mock_data": False, "split": "1,0,0"},
        training={"train_iters": 1, "global_batch_size": 8, "rampup_batch_size": (4, 2, 40), "micro_batch_size": 2},
        optimizer={"optimizer": "adamw8bit"},
    )
    path = tmp_path / "config.yaml"
    path.write_text(sources.dump(config))
    assert tool.main(["--config", str(path), "--steps", "60", "--kills", "2"]) == 0
    said = capsys.readouterr()
    assert "killed 2 times, the run is the same to the last bit" in said.out
    assert said.err.count("then killing them") == 2


def test_what_cannot_be_asked_is_refused(capsys):
    sound = ["--num-layers", "2", "--hidden-size", "16", "--num-attention-heads", "2", "--vocab-size", "99"]
    sound += ["--seq-length", "8", "--global-batch-size", "4"]
    for arguments, said in (
        (["--kills", "0"], "--kills 0 is too small"),
        (["--steps", "5"], "--steps 5 leaves no room for 2 kills with steps between them; give 6 or more"),
        (["--tolerance", "1"], "out of range"),
        (["--layout", "tp=3"], "tensor_model_parallel_size=3"),
        (["--world-size", "3"], "global_batch_size"),
    ):
        assert tool.main([*sound, *arguments]) == 2
        assert said in capsys.readouterr().err


def test_training_that_fails_is_said_with_its_words(tmp_path, capsys):
    arguments = ["--config", str(Path(tmp_path, "none.yaml"))]
    assert tool.main(arguments) == 2
    assert "none.yaml cannot be read" in capsys.readouterr().err
