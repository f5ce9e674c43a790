"""Ranks find out which of them holds other bits than all should, and none is found where all is well."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_on_ranks
from train.layouts import Case, config_of

from megatron_lite.checkpoint import store
from megatron_lite.errors import ReplicasDiffer
from megatron_lite.parallel.launch import StopRequest
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train import start
from megatron_lite.train.engine_interface import Engine
from megatron_lite.train.replicas import checksum

STEPS, BAD_STEP, BAD_RANK = 4, 3, 1


@given(st.integers(1, 2000), st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int64]), st.data())
def test_every_bit_and_its_place_count(length, dtype, data):
    generator = torch.Generator().manual_seed(length)
    raw = torch.randint(0, 256, (length * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    before = checksum(raw.view(dtype))
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum(raw.view(dtype)) != before
    values = torch.arange(length, dtype=torch.int64)
    assert length == 1 or checksum(values) != checksum(values.flip(0))


def test_a_checksum_has_many_chunks_and_no_need_for_order_in_memory():
    large = torch.randn(1 << 10, 3 << 10)
    again = large.t().contiguous().t()
    assert checksum(large) == checksum(again)
    again[-1, -1] = -again[-1, -1]
    assert checksum(large) != checksum(again)


def _flip_a_low_bit(tensor: torch.Tensor) -> None:
    last = tensor.detach().view(-1)[-1:]
    last.view({2: torch.int16, 4: torch.int32}[last.element_size()]).bitwise_xor_(1)


def _train(jobs: list[tuple[Case, str, str | None]]) -> list[str | None]:
    """What each run ends with, a bit of what is named being flipped on BAD_RANK in the middle of BAD_STEP."""
    ends, compare = [], Engine.compare_replicas
    for case, folder, flipped in jobs:

        def spoiled(self, step, flipped=flipped):
            if step == BAD_STEP and dist.get_rank() == BAD_RANK and flipped is not None:
                _flip_a_low_bit({held.name: held.tensor for held in self.held()}[flipped])
            compare(self, step)

        Engine.compare_replicas = spoiled
        config = config_of(
            case,
            training={"eval_interval": 0, "train_iters": 4, "check_weights_interval": 1},
            checkpoint={"save": folder, "save_interval": 1},
            logging={"tensorboard_dir": "none"},
        )
        shape = MeshShape(case.pipe, case.data, case.context, tensor=case.tensor)
        try:
            start.train_on(ProcessMesh.create(shape, timeout=timedelta(minutes=2)), config, StopRequest(), "")
            ends.append(None)
        except ReplicasDiffer as error:
            assert error.on_all_ranks
            ends.append(str(error))
    return ends


BAD_STEP, BAD_RANK = 3, 1
MATRIX, NORM = "weight layers.0.mlp.up.weight", "weight layers.1.mlp_norm.weight"
EMBEDDING = "weight embedding.word.weight"
BOTH, ALONE = "ranks 0 and 1 differ in", "rank 1 differs from all others in"
# What holds other bits, and what is said of it. Of two ranks either may be wrong; one that differs from both its data
# and its tensor neighbour is the one.
SPOILED = {
    2: [
        (Case(data=2), MATRIX, f"{BOTH} {MATRIX}."),
        (Case(data=2), "exp_avg of final_norm.bias", f"{BOTH} exp_avg of final_norm.bias."),
        (Case(data=2, zero=1), MATRIX, f"{BOTH} {MATRIX}."),
        (Case(data=2, zero=1, dtype="bf16"), MATRIX, f"{BOTH} {MATRIX}."),
        (Case(data=2, zero=2), MATRIX, f"{BOTH} {MATRIX}."),
        (Case(tensor=2, zero=1), NORM, f"{BOTH} {NORM}."),
        (Case(tensor=2, zero=3), NORM, f"{BOTH} {NORM}."),
        (Case(pipe=2, zero=1, micro_batches=2), EMBEDDING, f"{BOTH} the tied embedding."),
    ],
    4: [
        (Case(data=4, zero=2), MATRIX, f"{ALONE} {MATRIX}."),
        (Case(data=2, tensor=2, zero=1), NORM, f"{ALONE} {NORM}."),
        (Case(context=2, tensor=2), NORM, f"{ALONE} {NORM}."),
        (Case(pipe=2, data=2, micro_batches=2, zero=1), MATRIX, f"{BOTH} {MATRIX}."),
    ],
}
SOUND = {
    2: [
        Case(data=2, zero=3, llama=True),
        Case(tensor=2, sequence_parallel=True, zero=1),
        Case(pipe=2, micro_batches=2),
    ],
    4: [
        Case(data=4, zero=0, optimizer="adamw8bit"),
        Case(data=4, zero=1),
        Case(tensor=4, zero=1, llama=True),  # pairs of ranks have the same keys and values
        Case(pipe=2, data=2, zero=1, micro_batches=2, dtype="bf16"),
        Case(pipe=2, tensor=2, zero=3, micro_batches=2, llama=True),
    ],
}


@pytest.mark.parametrize("ranks", sorted(SPOILED))
def test_a_bit_that_flips_on_one_rank_is_found(ranks, tmp_path):
    jobs = [(case, str(tmp_path / f"spoiled {n}"), flipped) for n, (case, flipped, _) in enumerate(SPOILED[ranks])]
    jobs += [(case, str(tmp_path / f"sound {n}"), None) for n, case in enumerate(SOUND[ranks])]
    ends, *others = run_on_ranks(_train, ranks, jobs, timeout=300)
    assert all(told == ends for told in others)
    for (case, folder, flipped), end in zip(jobs, ends, strict=True):
        if flipped is None:
            assert end is None, case
            continue
        expected = next(text for other, name, text in SPOILED[ranks] if (other, name) == (case, flipped))
        assert end.startswith("step 3: ") and expected in end, f"{case}: {end}"
        told = json.loads((Path(folder) / "exit.json").read_text())
        assert (told["cause"], told["code"], told["step"]) == ("replicas_differ", 3, 2)
        assert max(store.steps(Path(folder))) == 2, "what was found to be wrong is not saved"
