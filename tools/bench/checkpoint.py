#!/usr/bin/env python
"""Saving and loading: seconds that training waits, seconds until saved, bytes, and seconds to restore.

Ours, waited for and beside training, against `save_checkpoint` and `load_checkpoint` of DeepSpeed and
`torch.distributed.checkpoint` (`save`, `async_save`, `load`), of the same fp32 masters and AdamW moments, sharded over
`--ranks` by `--zero-stage`, in turns; of several ranks the slowest counts.

A save of ours has computed checksums and waited for the disk (fsync); the others have done neither, and a power cut
would lose what they call saved. Both are told of theirs: `saved`, when their call is over, and `durable`, after an
fsync of what they wrote. A load of ours has found the newest checkpoint and checked every byte.

    OMP_NUM_THREADS=1 python tools/bench/checkpoint.py --parameters 30000000 --folder FOLDER --output results.json
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rank_cases.ranks import on_ranks, write  # noqa: E402
from torch import distributed as dist  # noqa: E402
from torch.distributed import checkpoint as theirs  # noqa: E402

from megatron_lite.checkpoint import find, load, save  # noqa: E402
from megatron_lite.checkpoint.background import Background  # noqa: E402
from megatron_lite.checkpoint.host_copies import HostCopies  # noqa: E402
from megatron_lite.checkpoint.piece import Piece  # noqa: E402
from megatron_lite.config import sources  # noqa: E402
from megatron_lite.config.run import RunConfig  # noqa: E402
from megatron_lite.parallel.mesh_shape import MeshShape  # noqa: E402
from megatron_lite.parallel.process_mesh import ProcessMesh  # noqa: E402
from megatron_lite.train import build  # noqa: E402
from megatron_lite.train.step import train_step  # noqa: E402

Timing = dict[str, float]


class Ours:
    """The engine's pieces, written by this framework, waited for or beside training."""

    def __init__(self, engine: Any, mesh: ProcessMesh, beside: bool):
        self.name = "ours, beside training" if beside else "ours"
        self._engine, self._mesh = engine, mesh
        self._copies = HostCopies(engine.pieces()) if beside else None
        self.tensors = functools.partial(_by_name, engine)

    def save(self, folder: Path) -> Timing:
        began = time.perf_counter()

        def write(pieces: list[Piece]) -> Path:
            return save.save(folder, 1, pieces, {}, self._mesh, layout=str(self._mesh.shape), config={}, versions={})

        if self._copies is None:
            write(self._engine.pieces())
            seconds = time.perf_counter() - began
            return {"waits": seconds, "saved": seconds, "durable": seconds}
        copying = self._copies.begin(self._engine.pieces)
        work = Background("save", lambda: write(copying.finish()))
        started = time.perf_counter()
        # The forward and backward pass that training does meanwhile; what is not copied by then is waited for.
        time.sleep(self.pass_seconds)
        asked = time.perf_counter()
        copying.allow_change()
        waited = time.perf_counter() - asked
        work.wait(3600)
        work.result()
        seconds = work.ended - began
        return {"waits": started - began + waited, "saved": seconds, "durable": seconds}

    #: Seconds of a forward and backward pass.
    pass_seconds = 0.0

    def load(self, folder: Path) -> None:
        found = find.search(folder, self._mesh, values=False)
        load.load(found.folder, self._engine.pieces(), self._mesh, manifest=found.manifest)


class DeepSpeed:
    """DeepSpeed's own checkpoint of the engine that holds the state."""

    name = "DeepSpeed"

    def __init__(self, engine: Any):
        self._engine = engine.forward
        # Theirs puts new tensors in the place of the optimizer's, which ours does not allow.
        type(self._engine.optimizer.optimizer).load_state_dict = torch.optim.Optimizer.load_state_dict
        self.tensors = functools.partial(_by_name, engine)

    def save(self, folder: Path) -> Timing:
        began = time.perf_counter()
        self._engine.save_checkpoint(str(folder), tag="step")
        seconds = time.perf_counter() - began
        return {"waits": seconds, "saved": seconds}

    def load(self, folder: Path) -> None:
        self._engine.load_checkpoint(str(folder), tag="step")


class Distributed:
    """torch.distributed.checkpoint of the same tensors."""

    def __init__(self, tensors: dict[str, torch.Tensor], beside: bool):
        self.name = "torch.distributed.checkpoint" + (".async_save" if beside else "")
        self._tensors, self._beside = tensors, beside
        self.tensors = lambda: tensors

    def save(self, folder: Path) -> Timing:
        began = time.perf_counter()
        if not self._beside:
            theirs.save(self._tensors, checkpoint_id=str(folder))
            seconds = time.perf_counter() - began
            return {"waits": seconds, "saved": seconds}
        pending = theirs.async_save(self._tensors, checkpoint_id=str(folder))
        waits = time.perf_counter() - began
        pending.result()
        return {"waits": waits, "saved": time.perf_counter() - began}

    def load(self, folder: Path) -> None:
        theirs.load(self._tensors, checkpoint_id=str(folder))


def trained_engine(parameters: int, mesh: ProcessMesh, zero_stage: int) -> tuple[Any, float]:
    """An engine in bf16 after a step, of about so many parameters, and the seconds of that step's passes."""
    layers, hidden = 8, max(64, int((parameters / (12 * 8)) ** 0.5) // 64 * 64)
    config = sources.override(
        RunConfig(),
        {
            "model": {
                "num_layers": layers, "hidden_size": hidden, "num_attention_heads": hidden // 64, "vocab_size": 1024,
                "max_position_embeddings": 128, "hidden_dropout": 0.0, "attention_dropout": 0.0,
            },
            "parallel": {"zero_stage": zero_stage},
            "precision": {"bf16": True},
            "data": {"mock_data": True, "seq_length": 128},
            "training": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": mesh.world_size},
        },
    )  # fmt: skip
    engine = build.build_engine(config, build.build_model_to_train(config, mesh, 1024), mesh)
    stream = build.open_stream(config, "train", 1024)
    batches = build.open_loader(config, stream, mesh, 1024).step(0, mesh.world_size)
    marks: list[float] = []
    for step in (1, 2):
        began = time.perf_counter()
        train_step(
            engine, mesh, batches, target_tokens=128 * mesh.world_size, step=step, seed=None, learning_rate=1e-4,
            before_change=lambda: marks.append(time.perf_counter()),
        )  # fmt: skip
    return engine, marks[-1] - began


def _by_name(engine: Any) -> dict[str, torch.Tensor]:
    return _named(engine.pieces())


def _named(pieces: list[Piece]) -> dict[str, torch.Tensor]:
    return {f"{piece.name}{piece.rectangle}": piece.tensor for piece in pieces}


def sync(folder: Path, mesh: ProcessMesh) -> None:
    """Write this rank's share of the files in a folder through to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files[mesh.global_rank :: mesh.world_size]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def measure(contender: Any, folder: Path, mesh: ProcessMesh) -> Timing:
    """One save into an empty folder and one load from it, with the files still in the page cache."""
    dist.barrier()
    timing = contender.save(folder)
    dist.barrier()
    if "durable" not in timing:
        began = time.perf_counter()
        sync(folder, mesh)
        timing["durable"] = timing["saved"] + time.perf_counter() - began
    timing["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    before = {name: tensor.clone() for name, tensor in contender.tensors().items()}
    for tensor in contender.tensors().values():
        tensor.fill_(float("nan"))
    dist.barrier()
    began = time.perf_counter()
    contender.load(folder)
    timing["load"] = time.perf_counter() - began
    wrong = [name for name, tensor in contender.tensors().items() if not tensor.equal(before[name])]
    if wrong:
        raise SystemExit(f"{contender.name} did not give back {wrong[:3]}")
    dist.barrier()
    if mesh.global_rank == 0:
        shutil.rmtree(folder)
    return timing


def measure_all(rank: int, ranks: int, zero_stage: int, parameters: int, turns: int, folder: str) -> dict[str, Any]:
    """This rank's times of each contender and turn, the bytes of its state, and the seconds of its passes."""
    mesh = ProcessMesh.create(MeshShape.of_world(ranks))
    engine, pass_seconds = trained_engine(parameters, mesh, zero_stage)
    pieces = engine.pieces()
    Ours.pass_seconds = pass_seconds
    contenders = [
        Ours(engine, mesh, beside=False),
        Ours(engine, mesh, beside=True),
        DeepSpeed(trained_engine(parameters, mesh, zero_stage)[0]),
        Distributed(_named(pieces), beside=False),
        Distributed(_named(pieces), beside=True),
    ]
    found: dict[str, list[Timing]] = {contender.name: [] for contender in contenders}
    for turn in range(turns):
        for number, contender in enumerate(contenders):
            found[contender.name].append(measure(contender, Path(folder, f"{turn}-{number}"), mesh))
    return {"turns": found, "state_bytes": sum(piece.nbytes for piece in pieces), "pass_seconds": pass_seconds}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=30_000_000)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--zero-stage", type=int, choices=(1, 2, 3), default=1)
    parser.add_argument("--turns", type=int, default=5, help="saves and loads of each, taken in turns")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's for temporary files")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size = (options.ranks, options.zero_stage, options.parameters, options.turns)
        told = on_ranks(options.ranks, measure_all, *size, folder)
    state_bytes = sum(each["state_bytes"] for each in told)
    pass_seconds = max(each["pass_seconds"] for each in told)
    found = {
        name: [
            {key: max(each["turns"][name][turn][key] for each in told) for key in told[0]["turns"][name][turn]}
            for turn in range(options.turns)
        ]
        for name in told[0]["turns"]
    }
    # The best turn: whatever else runs on the machine can only add to a time.
    best = {name: {key: min(turn[key] for turn in turns) for key in turns[0]} for name, turns in found.items()}
    print(f"{state_bytes / 1e6:.0f} MB of state, a pass of {pass_seconds:.2f} s, the best of {options.turns} turns")
    heads = f"{'training waits':>16}{'call over':>14}{'on the disk':>14}{'MB/s':>8}{'load':>9}{'bytes/state':>13}"
    print(f"{'':40}{heads}")
    for name, timing in best.items():
        rate = state_bytes / 1e6 / timing["durable"]
        print(
            f"{name:40}{timing['waits']:14.4f} s{timing['saved']:12.3f} s{timing['durable']:12.3f} s{rate:8.0f}"
            f"{timing['load']:7.3f} s{timing['bytes'] / state_bytes:13.3f}"
        )
    beside, waited, deepspeed, distributed = (
        best[name] for name in ("ours, beside training", "ours", "DeepSpeed", "torch.distributed.checkpoint")
    )

    def fastest(key: str) -> float:
        return min(timing[key] for name, timing in best.items() if not name.startswith("ours"))

    ratios = {
        "training waits, beside training, of DeepSpeed's save": beside["waits"] / deepspeed["waits"],
        "throughput of ours, durable, of DeepSpeed's save without fsync": deepspeed["saved"] / waited["durable"],
        "throughput of ours, durable, of DeepSpeed's save and fsync": deepspeed["durable"] / waited["durable"],
        "throughput of ours, durable, of the fastest other without fsync": fastest("saved") / waited["durable"],
        "throughput of ours, durable, of the fastest other and fsync": fastest("durable") / waited["durable"],
        "loading, of DeepSpeed's": deepspeed["load"] / waited["load"],
        "loading, of torch.distributed.checkpoint's": distributed["load"] / waited["load"],
    }
    print("\n".join(f"{name:70}{ratio:8.3f}" for name, ratio in ratios.items()))
    if options.output:
        record = {
            "benchmark": "checkpoint",
            "ranks": options.ranks,
            "zero_stage": options.zero_stage,
            "state_bytes": state_bytes,
            "pass_seconds": pass_seconds,
            "turns": found,
            "best": best,
            "ratios": ratios,
        }
        write(options.output, record)


if __name__ == "__main__":
    main(sys.argv[1:])
