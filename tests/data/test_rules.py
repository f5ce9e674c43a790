"""What a configuration may not ask of the data."""

import os

import numpy as np
import pytest

from megatron_lite.config.data import DataConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.training import TrainingConfig
from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.data.rules import problems


@pytest.fixture
def prefix(tmp_path):
    with IndexedWriter(tmp_path / "set", 100) as writer:
        writer.add_document(np.arange(50))
    return str(tmp_path / "set")


def said(training=None, **fields):
    return problems(RunConfig(data=DataConfig(**fields), training=training or TrainingConfig()))


def test_a_sound_configuration_has_no_problem(prefix):
    assert said(mock_data=True) == said(mock_data=True, tokenizer_type="ByteTokenizer") == []
    assert said(data_path=(prefix,), sample_stride=512) == []
    assert said(data_path=("0.5", prefix, "0.5", prefix)) == []
    assert said(train_data_path=(prefix,), valid_data_path=(prefix,)) == []
    assert said(TrainingConfig(eval_interval=0), train_data_path=(prefix,)) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "nothing to train on; give --data-path"),
        ({"valid_data_path": ("{}",)}, "nothing to train on"),
        ({"data_path": ("{}",), "mock_data": True}, "mock_data generates tokens and data_path names"),
        ({"data_path": ("{}",), "train_data_path": ("{}",)}, "train_data_path is a set of its own"),
        ({"train_data_path": ("{}",)}, "eval_interval=1000 and train_data_path has no valid_data_path"),
        ({"data_path": ("{}", "0.5")}, "mixes weights and prefixes"),
        ({"data_path": ("{}x",)}, "x.bin and "),
        ({"data_path": ("{}",), "split": "1,2,x"}, 'split="1,2,x"'),
        (
            {"mock_data": True, "tokenizer_type": "HuggingFaceTokenizer"},
            "tokenizer_type=HuggingFaceTokenizer is read from a file; give it by --tokenizer-model.",
        ),
        (
            {"mock_data": True, "tokenizer_type": "TiktokenTokenizer", "tokenizer_model": "/none"},
            "tokenizer_model=/none is not there; TiktokenTokenizer reads it.",
        ),
        ({"data_path": ("{}",), "sample_stride": 1025}, "sample_stride=1025 is above seq_length=1024"),
    ],
)
def test_a_problem_is_said_once_with_its_numbers(prefix, fields, message):
    fields = {
        name: tuple(entry.format(prefix) for entry in value) if isinstance(value, tuple) else value
        for name, value in fields.items()
    }
    (problem,) = said(**fields)
    assert message in problem


def test_all_problems_are_said_together():
    found = said(TrainingConfig(skip_samples=("9:3",)), data_path=("nowhere",), split="", sample_stride=9999)
    assert len(found) == 4
    assert any("skip_samples=9:3" in problem for problem in found)


def test_the_missing_half_of_a_pair_is_named(prefix):
    assert said(data_path=(prefix,)) == []
    os.remove(f"{prefix}.bin")
    (problem,) = said(data_path=(prefix,))
    assert problem.startswith(f"data path: cannot find {prefix}.bin; ")
