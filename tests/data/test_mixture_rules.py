"""What cannot be asked of blends and samples is said before anything is opened."""

import re

import numpy as np
import pytest

from megatron_lite.config.data import DataConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.training import TrainingConfig
from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.data.mixture_rules import mixture_problems


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    for name in ("a", "b", "c_bucket0", "c_bucket1"):
        with IndexedWriter(folder / name, 100) as writer:
            writer.add_document(np.arange(50))
    return folder


def said(folder, *path, training=None, **fields):
    data = DataConfig(data_path=tuple(word.format(folder) for word in path), **fields)
    return list(mixture_problems(RunConfig(data=data, training=training or TrainingConfig(train_iters=5))))


def test_sound_configurations_have_no_problem(folder):
    blend = ("1", "{}/a", "2", "{}/b")
    assert said(folder, *blend) == said(folder, "{}/a", "{}/b", data_blend_temperature=2.0) == []
    assert said(folder, *blend, data_path_segments=("80% 1 0", "120000/3 0 1")) == []
    assert said(folder, "{}/a:2", "{}/b", when_exhausted="redistribute", data_max_epochs=3.0) == []
    assert said(folder, "{}/c_bucket*", curriculum_difficulty="step", curriculum_difficulty_samples=9) == []
    assert said(folder, "{}/a", fim_rate=0.5, tokenizer_type="ByteTokenizer", data_packing="best_fit") == []
    assert said(folder, mock_data=True) == []


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("{}/a", {"data_max_epochs": 2.0}, "data_max_epochs=2 limits how often .* choose --when-exhausted stop"),
        ("{}/a:2 {}/b", {}, "a may be gone through 2 times and when_exhausted=repeat has no limit"),
        ("1 {}/a 1 {}/b", {"data_blend_temperature": 2.0}, "data_blend_temperature=2 is a rule for weights and the"),
        ("{}/a {}/b", {"data_blend_temperature": 2.0, "data_blend_unimax": 1.0}, "are two rules for the same weights"),
        ("1 {}/a 1 {}/b", {"data_path_segments": ("80% 1",)}, "has 1 weights, 1 of them above 0"),
        ("1 {}/a 1 {}/b", {"data_path_segments": ("later 1 1",)}, "cannot be read"),
        ("{}/a", {"data_packing": "best_fit", "sample_stride": 5}, "sample_stride=5 is of samples that overlap"),
        ("{}/a", {"fim_rate": 1.5, "tokenizer_type": "ByteTokenizer"}, "fim_rate=1.5 is out of range"),
        ("{}/a", {"fim_rate": 0.5}, "no tokenizer says which ids they have; give --tokenizer-type"),
        (
            "{}/a {}/b",
            {"curriculum_difficulty": "step", "curriculum_difficulty_samples": 9},
            "opens the sets that a pattern of the data path names",
        ),
        ("{}/c_bucket*", {"curriculum_difficulty": "step"}, "give --curriculum-difficulty-samples"),
        ("{}/a", {"curriculum_difficulty_samples": 5}, "has no curriculum_difficulty beside it"),
        ("", {"mock_data": True, "data_blend_unimax": 2.0}, "is about token sets and the configuration names none"),
        ("", {"mock_data": True, "data_packing": "best_fit"}, "data_packing=best_fit is about token sets"),
        ("", {"mock_data": True, "when_exhausted": "stop"}, "when_exhausted=stop is about token sets"),
        ("{}/a", {"fim_spm_rate": 0.3}, "fim_spm_rate=0.3 is a share of what fim_rate permutes; give --fim-rate"),
    ],
)
def test_a_problem_is_said_once_with_its_numbers(folder, path, fields, message):
    (problem,) = said(folder, *path.split(), **fields)
    assert re.search(message, problem)


def test_shares_of_a_run_in_epochs_are_refused(folder):
    training = TrainingConfig(train_epochs=2.0)
    fields = {"data_blend_unimax": 2.0, "data_path_segments": ("80% 1 1",)}
    found = said(folder, "{}/a", "{}/b", training=training, **fields)
    assert [problem.split()[0] for problem in found] == ["data_blend_unimax", "data_path_segments"]
    assert said(folder, "{}/a", "{}/b", training=training, data_path_segments=("8 1 1",)) == []
