"""What boundaries within samples become in a micro-batch."""

import numpy as np
import pytest
import torch

from megatron_lite.config.data import DataConfig
from megatron_lite.data.length_curriculum import LengthCurriculum
from megatron_lite.data.loader import BatchLoader, BlankStream
from megatron_lite.data.micro_batch import Assembly
from megatron_lite.data.sample import Sample
from megatron_lite.data.stream import MockStream

EOD = 9
SAMPLES = [
    Sample(np.array([1, 2, EOD, 3, EOD, EOD, 4, 5, 6]), np.array([0, 3, 5, 6])),
    # Documents that end in no token of their own; the last begins with what is a target alone.
    Sample(np.array([1, 2, 3, 4, 5, 6, 7, 8, 1]), np.array([0, 1, 8]), np.arange(9) % 2 == 0),
]
PIECES_OF_FOUR = LengthCurriculum(first=4, full=8, samples=100)


def assembled(consumed_samples=0, **options):
    return Assembly(**options)(SAMPLES, first_sample=40, index=3, consumed_samples=consumed_samples)


def test_samples_without_boundaries():
    batch = assembled()
    assert (batch.first_sample, batch.index, batch.begins, batch.positions) == (40, 3, None, None)
    assert batch.tokens.tolist() == [[1, 2, 9, 3, 9, 9, 4, 5], [1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch.labels.tolist() == [[2, 9, 3, 9, 9, 4, 5, 6], [2, 3, 4, 5, 6, 7, 8, 1]]
    assert batch.loss_mask.tolist() == [[True] * 8, [False, True] * 4]


def test_attention_and_positions_begin_with_documents():
    begins = [[1, 0, 0, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    positions = [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]
    attention, both = (
        assembled(reset_attention_mask=True),
        assembled(reset_attention_mask=True, reset_position_ids=True),
    )
    assert attention.begins.int().tolist() == both.begins.int().tolist() == begins
    assert attention.positions is None and both.positions.tolist() == positions
    assert both.begins.dtype == torch.bool and both.positions.dtype == torch.int64
    alone = assembled(reset_position_ids=True)
    assert alone.begins is None and alone.positions.tolist() == positions


def test_what_follows_the_end_of_a_document_is_no_target():
    batch = assembled(eod=EOD)
    assert batch.loss_mask.tolist() == [[True, True, False, True, False, False, True, True], [False, True] * 4]


def test_a_curriculum_divides_samples_beside_their_documents():
    batch = assembled(curriculum=PIECES_OF_FOUR)
    assert batch.begins.int().tolist() == [[1, 0, 0, 0, 1, 0, 0, 0]] * 2
    assert batch.positions.tolist() == [[0, 1, 2, 3] * 2] * 2
    assert batch.loss_mask.tolist() == assembled().loss_mask.tolist()
    both = assembled(curriculum=PIECES_OF_FOUR, reset_attention_mask=True)
    assert both.begins.int().tolist() == [[1, 0, 0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 1, 0, 0, 0]]
    assert both.positions.tolist() == [[0, 1, 2, 3] * 2] * 2


def test_samples_are_whole_behind_the_curriculum():
    batch = assembled(consumed_samples=100, curriculum=PIECES_OF_FOUR)
    assert batch.begins is None and batch.positions is None


def test_a_loader_asks_the_curriculum_once_a_step():
    """Every micro-batch of a step has the same length, whatever the layout, and the middle of a pipeline the same."""
    curriculum = LengthCurriculum(first=2, full=16, samples=16, step=2)
    options = {"micro_batch_size": 2, "vocab_size": 50, "assembly": Assembly(curriculum=curriculum)}
    for size in (1, 2):
        for stream in (MockStream(16, 50, "pieces"), BlankStream(16)):
            loaders = [BatchLoader(stream, data_rank=rank, data_size=size, **options) for rank in range(size)]
            for consumed, length in ((0, 2), (8, 8), (16, 16)):
                for batch in (found for each in loaders for found in each.step(consumed, 8)):
                    begins = torch.arange(16) % length == 0
                    assert batch.begins is None if length == 16 else (batch.begins == begins).all()


@pytest.mark.parametrize(
    ("schedule", "lengths"),
    [
        ("linear", {0: 64, 8: 64, 9: 72, 500: 544, 990: 1008, 999: 1016, 1000: 1024, 9999: 1024}),
        ("root", {0: 64, 1: 88, 250: 544, 500: 736, 999: 1016, 1000: 1024}),
        ("step", {0: 64, 249: 64, 250: 128, 500: 256, 750: 512, 999: 512, 1000: 1024}),
    ],
)
def test_lengths_by_schedule(schedule, lengths):
    data = DataConfig(
        seq_length=1024,
        curriculum_seq_length_min=64,
        curriculum_seq_length_samples=1000,
        curriculum_seq_length_schedule=schedule,
    )
    curriculum = LengthCurriculum.of(data)
    assert {consumed: curriculum.length(consumed) for consumed in lengths} == lengths
    grown = [curriculum.length(consumed) for consumed in range(1001)]
    assert grown == sorted(grown) and all(length % 8 == 0 for length in grown)
    assert LengthCurriculum.of(DataConfig()) is None


@pytest.mark.parametrize("degree", [1, 2, 3, 7])
def test_roots_are_those_of_integers(degree):
    curriculum = LengthCurriculum(8, 8 + 1000, samples=1000**degree, schedule="root", step=1, root=degree)
    for base in (1, 2, 499, 999):
        assert curriculum.length(base**degree) == 8 + base
        assert curriculum.length(base**degree - 1) == 8 + base - 1
