"""Documents and shorter sequences within samples train alike in every layout, and are what their flags say."""

from __future__ import annotations

import json

import pytest
from ranks import run_on_ranks
from train.layouts import VOCABULARY, Case, config_of
from train.serial import Reference, assert_equals_serial, run_serially

from megatron_lite.config import sources
from megatron_lite.data.tokenizer_byte import ByteTokenizer
from megatron_lite.errors import ConfigError
from megatron_lite.parallel.launch import StopRequest
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train import build
from megatron_lite.train.rules import problems
from megatron_lite.train.start import train_on

CASES = {
    2: [
        Case(tensor=2, zero=1, sequence_parallel=True, documents=True, micro_batches=2),
        Case(tensor=2, zero=3, llama=True, documents=True, pieces=5, recompute="full"),
        Case(data=2, zero=0, llama=True, documents=True, backend="fused_softmax"),
        Case(data=2, zero=2, documents=True, recompute="selective", micro_batches=2),
        Case(data=2, zero=3, pieces=5, dropout=0.1, attention_dropout=0.0),
        Case(context=2, zero=1, exchange="a2a", llama=True, documents=True),
        Case(context=2, zero=2, exchange="a2a", documents=True, pieces=5, micro_batches=2),
        Case(context=2, zero=1, llama=True, documents=True, recompute="full"),
        Case(context=2, zero=3, pieces=5, micro_batches=2),
        Case(pipe=2, layers=4, schedule="1F1B", micro_batches=4, zero=1, documents=True),
        Case(pipe=2, layers=4, schedule="ZBVZeroBubble", micro_batches=2, zero=2, llama=True, documents=True, pieces=5),
        # The masks of probabilities too: heads lie as in the serial run.
        Case(data=2, zero=1, documents=True, dropout=0.1),
    ],
    # Stages in the middle read samples for their boundaries, and for a curriculum need none.
    4: [
        Case(pipe=4, layers=4, schedule="GPipe", micro_batches=2, zero=1, llama=True, documents=True),
        Case(pipe=4, layers=4, schedule="1F1B", micro_batches=4, zero=0, pieces=5),
        Case(context=4, zero=2, documents=True),
        Case(context=2, pipe=2, layers=4, micro_batches=2, zero=1, llama=True, documents=True),
    ],
}


@pytest.fixture(scope="module")
def serial() -> dict[Case, Reference]:
    return run_serially([Case(), *(case for cases in CASES.values() for case in cases)])


@pytest.mark.parametrize("ranks", sorted(CASES))
def test_divided_samples_equal_serial(ranks, serial):
    assert_equals_serial(ranks, CASES[ranks], serial)


def test_dividing_samples_is_another_training(serial):
    firsts = [serial[case].curve[0][0] for case in (Case(), Case(documents=True))]
    assert abs(firsts[0] - firsts[1]) > 1e-4


def _train(folder: str, **data) -> None:
    config = config_of(
        Case(documents=True, steps=4),
        data=data,
        training={"eval_interval": 4, "eval_iters": 1},
        logging={"run_dir": folder, "tensorboard_dir": "none"},
    )
    train_on(ProcessMesh.create(MeshShape()), config, StopRequest(), "test")


def test_a_curriculum_is_in_the_metrics_and_not_in_validation(tmp_path):
    lengths = {"curriculum_seq_length_min": 4, "curriculum_seq_length_samples": 8, "curriculum_seq_length_step": 4}
    run_on_ranks(_train, 1, str(tmp_path), **lengths)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["curriculum_seq_length"] for row in rows if "loss" in row] == [4, 8, 16, 16]
    config, mesh = config_of(Case(pieces=4)), ProcessMesh.create(MeshShape())
    for split, is_divided in (("train", True), ("valid", False)):
        stream = build.open_stream(config, split, VOCABULARY)
        batch = build.open_loader(config, stream, mesh, VOCABULARY, split=split).step(0, 4)[0]
        assert (batch.begins is not None) == (batch.positions is not None) == is_divided


REFUSED = {
    "there is no eod": ({"eod_mask_loss": True}, {}, r"--eod-mask-loss .* give --tokenizer-type"),
    "no end": ({"curriculum_seq_length_min": 8}, {}, r"seq_length_min=8 .* give --curriculum-seq-length-samples"),
    "no beginning": ({"curriculum_seq_length_samples": 8}, {}, r"samples=8 needs .* give --curriculum-seq-length-min"),
    "nothing to grow": (
        {"curriculum_seq_length_min": 16, "curriculum_seq_length_samples": 9},
        {},
        r"seq_length_min=16 is not below seq_length=16",
    ),
    "lengths between multiples": (
        {"curriculum_seq_length_min": 12, "curriculum_seq_length_samples": 9},
        {},
        r"seq_length_min=12 is no multiple of curriculum_seq_length_step=8, .* choose 8 or 16",
    ),
    "no step": (
        {"curriculum_seq_length_min": 8, "curriculum_seq_length_samples": 9, "curriculum_seq_length_step": 0},
        {},
        r"curriculum_seq_length_step=0 is too small; give 1 or more",
    ),
    "a step back": (
        {"curriculum_seq_length_min": 8, "curriculum_seq_length_samples": 9, "curriculum_seq_length_step": -8},
        {},
        r"curriculum_seq_length_step=-8 is too small; give 1 or more",
    ),
    "no length": (
        {"curriculum_seq_length_min": 0, "curriculum_seq_length_samples": 9},
        {},
        r"curriculum_seq_length_min=0 is too small; give 1 or more",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    data, parallel, match = REFUSED[what]
    config = config_of(Case(), data=data, parallel=parallel)
    found = problems(config, config.parallel.model_parallel_size)
    with pytest.raises(ConfigError, match=match):
        raise ConfigError(found)


class _Endless(ByteTokenizer):
    eod = None


def test_a_tokenizer_without_an_end_of_document_masks_no_loss():
    config, mesh = config_of(Case(), data={"eod_mask_loss": True}), ProcessMesh.create(MeshShape())
    stream = build.open_stream(config_of(Case()), "train", VOCABULARY)
    config = sources.override(config, {"data": {"tokenizer_type": "ByteTokenizer"}})
    with pytest.raises(ConfigError, match=r"--eod-mask-loss .* ByteTokenizer has none"):
        build.open_loader(config, stream, mesh, VOCABULARY, _Endless())
    batch = build.open_loader(config, stream, mesh, VOCABULARY, ByteTokenizer()).step(0, 4)[0]
    assert batch.loss_mask.equal(batch.tokens != ByteTokenizer().eod)
