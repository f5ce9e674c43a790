#!/usr/bin/env python
"""What it costs to feed a training: opening token sets, the first batch, a sample, and what is read ahead.

    open          seconds to open a set of 10^7 documents, every field of its index checked
    first_batch   seconds and memory from a blend of 64 sets, 10^9 samples and 10^7 documents to its first batch,
                  in a process that has imported what it needs
    sample        microseconds of stream[k] at 2,048 tokens with the beginnings of documents, compiled code on and off
    loader        milliseconds a step waits for its samples and takes in all, by the cost of a sample and --num-workers

Token files are sparse: as large as they say, full of zeros, and nothing on disk but their index.

    OMP_NUM_THREADS=1 python tools/bench/feed.py --output feed-cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_lite.config.data import DataConfig
from megatron_lite.config.mixture import MixtureConfig
from megatron_lite.data.feed import build_stream
from megatron_lite.data.fim import FimStream, Sentinels
from megatron_lite.data.indexed import MAGIC, IndexedReader
from megatron_lite.data.sample import Sample
from megatron_lite.data.stream import SampleStream
from megatron_lite.kernels import host

DOCUMENTS, SETS, SAMPLES, SEQ, VOCABULARY = 10**7, 64, 10**9, 2048, 50304
BATCH, MICRO = 64, 8


def write_sparse(prefix: Path, documents: int, tokens: int) -> None:
    """A set of uint16 zeros in documents of random lengths."""
    shares = np.random.default_rng(documents).random(documents)
    ends = np.floor(np.cumsum(shares) / shares.sum() * tokens).astype("<i8")
    lengths = np.diff(ends, prepend=0)
    header = (1).to_bytes(8, "little") + bytes([8]) + np.array([documents, documents + 1], "<u8").tobytes()
    with open(f"{prefix}.idx", "wb") as file:
        file.write(MAGIC + header)
        file.write(lengths.astype("<i4").tobytes() + ((ends - lengths) * 2).tobytes())
        file.write(np.arange(documents + 1, dtype="<i8").tobytes())
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * int(ends[-1]))


def blended(folder: Path) -> SampleStream:
    """The stream of the sets in a folder, with weights, looked through as training does."""
    weights = np.random.default_rng(0).dirichlet(np.ones(SETS))
    paths = tuple(word for i in range(SETS) for word in (f"{weights[i] + 1e-4:.6f}", str(folder / f"set{i}")))
    stream = build_stream(DataConfig(data_path=paths, seq_length=SEQ), seed=1, split="train", vocab_size=VOCABULARY)
    stream.check_vocabulary(VOCABULARY)
    return stream


def of_one(prefix: Path, **options: str) -> SampleStream:
    data = DataConfig(data_path=(str(prefix),), split="1", seq_length=SEQ, **options)
    return build_stream(data, seed=1, split="train", vocab_size=VOCABULARY)


def _memory() -> dict[str, float]:
    """MB of this process: its own, and of mapped files."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(status[name].split()[0]) / 1e3 for name in ("RssAnon", "RssFile")}


def first_batch(folder: Path) -> dict[str, float]:
    from megatron_lite.data.loader import BatchLoader

    before, began = _memory(), time.perf_counter()
    stream = blended(folder)
    opened = time.perf_counter()
    BatchLoader(stream, data_rank=0, data_size=1, micro_batch_size=MICRO, vocab_size=VOCABULARY).step(0, BATCH)
    seconds, after = time.perf_counter() - began, _memory()
    return {
        "seconds": seconds,
        "seconds_open": opened - began,
        "memory_mb": after["RssAnon"] - before["RssAnon"],
        "mapped_mb": after["RssFile"] - before["RssFile"],
        "samples": stream.samples_per_epoch,
    }


def microseconds(call: Callable[[int], object], turns: int = 9, calls: int = 1000) -> float:
    """The median over turns of what one call takes."""
    times = []
    for turn in range(turns):
        began = time.perf_counter()
        for i in range(calls):
            call(turn * calls + i)
        times.append((time.perf_counter() - began) / calls * 1e6)
    return statistics.median(times)


def sample(folder: Path) -> dict[str, float]:
    made = {"windows": of_one(folder / "large"), "blend of 64": blended(folder)}
    made["best-fit packing"] = of_one(folder / "large", data_packing="best_fit")
    ids = Sentinels(prefix=VOCABULARY - 3, middle=VOCABULARY - 2, suffix=VOCABULARY - 1, bos=None, eod=1)
    for name in ("windows", "best-fit packing"):
        made[f"{name}, fill-in-the-middle"] = FimStream(made[name], MixtureConfig(fim_rate=0.5), ids, 1, "train")
    return {name: microseconds(stream.__getitem__) for name, stream in made.items()}


class Costly:
    """A stream that works, as Python does, for that many microseconds more a sample."""

    def __init__(self, stream: SampleStream, cost: float):
        self._stream, self._cost = stream, cost

    def __getitem__(self, number: int) -> Sample:
        end = time.thread_time() + self._cost * 1e-6
        while time.thread_time() < end:
            pass
        return self._stream[number]


def loader(folder: Path, steps: int) -> list[dict[str, float]]:
    """Steps of some thousand small operations, as a rank gives a GPU."""
    import torch

    from megatron_lite.data.loader import BatchLoader

    torch.set_num_threads(1)
    stream, rows = of_one(folder / "large"), []
    small = torch.zeros(64, 64)
    for cost in (0, 100, 400):
        for num_workers in (0, 1, 2):
            batches = BatchLoader(
                Costly(stream, cost),
                data_rank=0,
                data_size=1,
                micro_batch_size=MICRO,
                vocab_size=VOCABULARY,
                num_workers=num_workers,
            )
            waits, times = [], []
            for step in range(steps + 5):
                began = time.perf_counter()
                batches.step(step * BATCH, BATCH)
                waits.append(time.perf_counter() - began)
                for _ in range(10_000):
                    small = torch.add(small, small)
                times.append(time.perf_counter() - began)
            batches.close()
            row = {"cost_us": cost, "num_workers": num_workers}
            row |= {"wait_ms": statistics.median(waits[5:]) * 1e3, "step_ms": statistics.median(times[5:]) * 1e3}
            rows.append(row | {"fastest_step_ms": min(times[5:]) * 1e3})
    return rows


def opening(folder: Path) -> dict[str, float]:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        IndexedReader(folder / "large")
        times.append(time.perf_counter() - began)
    return {"documents": DOCUMENTS, "seconds": statistics.median(times), "first_seconds": times[0]}


def apart(folder: Path, section: str, *options: str) -> dict[str, float]:
    """A section in a process of its own."""
    command = [sys.executable, __file__, "--folder", str(folder), "--as", section, *options]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where sets are made, or were; default: a temporary one")
    parser.add_argument("--steps", type=int, default=40, help="steps of each loader")
    parser.add_argument("--output", type=Path, help="file for the results as JSON; default: standard output")
    parser.add_argument("--as", dest="section", choices=("first_batch", "sample"), help=argparse.SUPPRESS)
    parser.add_argument("--no-compiled", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.no_compiled:
        host.module = lambda: None
    if options.section:
        print(json.dumps({"first_batch": first_batch, "sample": sample}[options.section](options.folder)))
        return
    host.module()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "large.idx").exists():
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(SETS):
                write_sparse(folder / f"set{i}", DOCUMENTS // SETS, SAMPLES * SEQ // SETS)
            write_sparse(folder / "large", DOCUMENTS, 100 * DOCUMENTS)
        first = [apart(folder, "first_batch") for _ in range(5)]
        results = {
            "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "open": opening(folder),
            "first_batch": {key: statistics.median(run[key] for run in first) for key in first[0]},
            "sample_us": apart(folder, "sample"),
            "sample_us_in_python": apart(folder, "sample", "--no-compiled"),
            "loader": loader(folder, options.steps),
        }
    text = json.dumps(results, indent=1) + "\n"
    options.output.write_text(text) if options.output else print(text)


if __name__ == "__main__":
    main()
