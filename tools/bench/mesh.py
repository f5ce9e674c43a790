#!/usr/bin/env python
"""Seconds that the mesh of many ranks takes: all coordinates, all groups, and one rank's share of making them.

Live groups are made on torch's fake backend, which does the bookkeeping of real ones without anybody to talk to.

    python tools/bench/mesh.py --output results.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_lite.monitor.versions import versions
from megatron_lite.parallel.mesh_shape import REPLICAS, MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh

GROUPS = (("tensor",), ("pipe",), ("context",), ("data",), REPLICAS, ("pipe", "tensor"))


def seconds(action: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for axis, size in {"pipe": 16, "data": 32, "context": 4, "tensor": 8}.items():
        parser.add_argument(f"--{axis}", type=int, default=size, help="ranks along this axis")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    shape = MeshShape(options.pipe, options.data, options.context, tensor=options.tensor)
    ranks = shape.world_size
    dist.init_process_group("fake", rank=ranks // 2, world_size=ranks, store=FakeStore())
    mesh = ProcessMesh(shape, ranks // 2)
    found = {
        "coordinates of all ranks": seconds(lambda: [shape.coordinates(rank) for rank in range(ranks)]),
        "groups of all ranks": seconds(lambda: [list(shape.groups(*axes)) for axes in GROUPS]),
        "groups of one rank": seconds(lambda: [shape.group_of(ranks // 2, *axes) for axes in GROUPS]),
        "live groups on one rank": seconds(
            lambda: [mesh.make_group(shape.groups(*axes), "+".join(axes)) for axes in GROUPS]
        ),
    }
    print(f"{shape}: {ranks:,} ranks")
    for name, value in found.items():
        print(f"{name:26}{value:10.4f} s")
    if options.output:
        record = {
            "benchmark": "mesh",
            "device": f"CPU {platform.machine().replace('_', '-')}, {os.cpu_count()} cores",
            "layout": str(shape),
            "ranks": ranks,
            "seconds": {name: round(value, 5) for name, value in found.items()},
            "versions": versions(),
        }
        options.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
