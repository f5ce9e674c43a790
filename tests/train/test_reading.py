"""What a step is fed: its checksum, and what happens where no token of it counts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_on_ranks
from tiny_run import tiny_config, write_token_set

from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.data.indexed import IndexedReader, IndexedWriter
from megatron_lite.data.loss_mask import mask_prefix
from megatron_lite.data.micro_batch import Assembly
from megatron_lite.data.sample import Sample
from megatron_lite.errors import DataError
from megatron_lite.parallel.launch import StopRequest
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train.reading import checksum
from megatron_lite.train.start import train_on


def _sum(samples: list[Sample], **assembly) -> int:
    assemble = Assembly(**assembly)
    batches = [assemble([sample], first_sample=5 + i, index=i, consumed_samples=0) for i, sample in enumerate(samples)]
    return checksum(batches, ProcessMesh.create(MeshShape()))


def test_the_checksum_tells_what_counts_and_where_documents_begin():
    tokens = np.arange(17)
    whole = Sample(tokens, np.array([0]))
    plain = _sum([whole, whole])
    # What is trivial is what is not there.
    everything = dataclasses.replace(whole, counts=np.ones(17, bool))
    assert plain == _sum([everything, whole], reset_attention_mask=True, reset_position_ids=True)
    masked = dataclasses.replace(whole, counts=tokens % 3 > 0)
    divided = dataclasses.replace(whole, starts=np.array([0, 4]))
    elsewhere = dataclasses.replace(whole, starts=np.array([0, 5]))
    sums = [
        plain,
        _sum([whole, dataclasses.replace(whole, tokens=tokens + 1)]),
        _sum([whole, masked]),
        *(
            _sum([whole, sample], reset_attention_mask=attention, reset_position_ids=positions)
            for sample in (divided, elsewhere)
            for attention, positions in ((True, True), (True, False), (False, True))
        ),
    ]
    assert len(set(sums)) == len(sums)
    assert plain == _sum([whole, divided]), "boundaries that mean nothing"


def _train(config: RunConfig) -> str:
    mesh = ProcessMesh.create(MeshShape.of_world(torch.distributed.get_world_size()))
    with pytest.raises(DataError) as caught:
        train_on(mesh, config, StopRequest(), "test")
    return f"{caught.value.on_all_ranks} {caught.value}"


@pytest.mark.parametrize("split", ["train", "valid"])
def test_samples_without_a_target_end_a_run_by_their_numbers(split, tmp_path):
    sets = {name: write_token_set(tmp_path / name) for name in ("train", "valid")}
    lengths = IndexedReader(sets[split]).lengths.tolist()
    with IndexedWriter(mask_prefix(sets[split]), dtype=np.uint8) as writer:
        for length in lengths:
            writer.add_document([0] * length)
    config = tiny_config(train_data_path=(str(sets["train"]),), valid_data_path=(str(sets["valid"]),))
    changes: sources.Overrides = {
        "training": {
            "train_iters": 2, "global_batch_size": 2, "micro_batch_size": 1, "eval_interval": 1, "eval_iters": 1,
            "skip_samples": ("0:3",),
        },
        "logging": {"run_dir": str(tmp_path / "run"), "tensorboard_dir": "none"},
    }  # fmt: skip
    mine, theirs = run_on_ranks(_train, 2, sources.override(config, changes))
    assert mine == theirs and mine.startswith("True ")
    found = "step 1, samples 3 to 4" if split == "train" else "validation, samples 0 to 1"
    assert f"{found}: none of their tokens counts as a target" in mine
    assert ("(--skip-samples 3:5)" in mine) == (split == "train")
    told = json.loads(Path(tmp_path, "run", "exit.json").read_text())
    assert told["code"] == 2
