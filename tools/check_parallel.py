#!/usr/bin/env python
"""Whether a parallel layout computes what one process does: a few steps of both on this machine, layer by layer.

python tools/check_parallel.py --config examples/quickstart.yaml --layout tp=2,pp=2,schedule=1F1B --num-layers 4
"""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_lite import log
from megatron_lite.config import cli, sources
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError, MegatronLiteError
from megatron_lite.parallel.door import among_ranks, exit_code_of
from megatron_lite.parallel.launch import Launch, end_process
from megatron_lite.parallel.launcher import start_command, takes_gpus
from megatron_lite.parallel.layout_line import parse_layout
from megatron_lite.train.rules import problems

if TYPE_CHECKING:
    from megatron_lite.parallel.process_mesh import ProcessMesh
    from megatron_lite.train.compare import Difference

_SHOWN = 8
"""Tensors of the first layer that differs, at most."""


@dataclasses.dataclass(frozen=True)
class CheckOptions(cli.SourceOptions):
    """What is compared and how closely."""

    layout: str | None = None
    """The layout to check, on one line: tp=2,pp=2,cp=2,dp=2,zero=2,schedule=1F1B,sp=1,cp-comm=a2a (axes left out are
    1). As many processes are started."""
    steps: int = 3
    """Steps of training; outputs and gradients are those of the first, weights those after the last."""
    tolerance: float | None = None
    """Norm of a difference over the norm of what it is a difference from, at most; default: by precision, 1e-5 in
    fp32."""
    device: Literal["cpu", "cuda"] | None = None
    """Where the processes run; default: on GPUs where there is one for each."""
    into: str | None = None
    """Given to the processes that this tool starts: where they write what they computed."""

    def problems(self) -> list[str]:
        """What cannot be, one sentence each."""
        found = []
        if self.layout is None and self.into is None:
            found.append("--layout is needed; write it as tp=2,pp=2,zero=1.")
        if self.steps < 1:
            found.append(f"--steps {self.steps} is too small; give 1 or more.")
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            found.append(f"--tolerance {self.tolerance:g} is out of range; give a number from 0 to below 1.")
        return found


def check(config: RunConfig, options: CheckOptions) -> None:
    """Train serially and in the layout, in processes of their own, and judge. Raises MegatronLiteError."""
    from megatron_lite.train.trace import comparable, serial_of

    layout = parse_layout(options.layout)
    ranks = layout.shape.world_size
    config, told = comparable(layout.put_on(config), options.steps)
    if found := problems(config, ranks):
        raise ConfigError(found)
    for line in told:
        log.note(line)
    on_gpus = takes_gpus(options.device, ranks)
    with tempfile.TemporaryDirectory(prefix="check-parallel-") as name:
        serial, ours = Path(name, "serial"), Path(name, "layout")
        run(serial_of(config, layout.shape.data), 1, options.steps, serial, on_gpus=on_gpus)
        run(config, ranks, options.steps, ours, on_gpus=on_gpus)
        judge(serial, ours, options.steps, config.precision.dtype, options.tolerance)


def run(config: RunConfig, ranks: int, steps: int, folder: Path, *, on_gpus: bool) -> None:
    """Start so many processes that train `config` and write into `folder` what they compute."""
    folder.mkdir()
    settings = folder / "config.yaml"
    settings.write_text(sources.dump(config), encoding="utf-8")
    command = start_command(ranks, on_gpus=on_gpus)
    command += [__file__, "--config", str(settings), "--steps", str(steps), "--into", str(folder)]
    log.note(f"training {steps} steps {'serially' if ranks == 1 else f'on {ranks} processes'}")
    if code := subprocess.run(command).returncode:
        kind = ConfigError if code == ConfigError.exit_code else MegatronLiteError
        raise kind(f"training {'serially' if ranks == 1 else 'in the layout'} ended with the error above")


def be_rank(me: Launch, config: RunConfig, options: CheckOptions) -> None:
    """Train as one of the processes that `run` starts."""
    from megatron_lite.train import build

    parallel, timeout = config.parallel, config.parallel.distributed_timeout_minutes
    with among_ranks(me, timeout) as store:
        mesh = build.start_ranks(
            me,
            tensor=parallel.tensor_model_parallel_size,
            pipe=parallel.pipeline_model_parallel_size,
            context=parallel.context_parallel_size,
            timeout_minutes=timeout,
            store=store,
        )
        train_into(Path(options.into), config, options.steps, mesh)
        build.close_ranks()


def train_into(folder: Path, config: RunConfig, steps: int, mesh: ProcessMesh) -> None:
    """Train on the ranks of `mesh` and write what they computed."""
    from megatron_lite.data.vocabulary import resolve_vocabulary
    from megatron_lite.train import build
    from megatron_lite.train.trace import save_trace, trace

    build.prepare_kernels(config, mesh)
    tokenizer, vocab_size = build.together(mesh, lambda: resolve_vocabulary(config))
    save_trace(trace(config, mesh, vocab_size, tokenizer, steps=steps), folder, mesh, config)


def judge(serial: Path, ours: Path, steps: int, dtype: str, tolerance: float | None = None) -> None:
    """Print the tables of what two folders hold. Raises MegatronLiteError where they do not agree."""
    from megatron_lite.train.compare import TOLERANCES, ZERO, StoredTrace, differences, first_apart

    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    reference, traced = StoredTrace(serial, steps), StoredTrace(ours, steps)
    found = differences(traced, reference, ZERO[dtype])
    first = first_apart(found, tolerance)
    lines, worst = _curve_table(reference.curve, traced.curve)
    print("\n".join([*lines, "", *_layer_table(found, first, steps)]), flush=True)
    if first is not None:
        apart = [d for d in found if (d.kind, d.layer) == (first.kind, first.layer) and d.relative > tolerance]
        apart.sort(key=lambda difference: -difference.relative)
        named = "".join(f"\n  {d.name}: max {d.largest:.1e}, relative {d.relative:.1e}" for d in apart[:_SHOWN])
        raise MegatronLiteError(
            f"the layout does not compute what one process does; what differs first, by more than {tolerance:g}, is "
            f"the {first.kind} of {first.layer}:{named}"
        )
    if worst > tolerance:
        raise MegatronLiteError(
            f"losses or gradient norms differ by {worst:.1e}, more than {tolerance:g}, where all layers agree: what "
            "sums them over ranks is wrong"
        )
    print(f"\nthe layout computes what one process does, within {tolerance:g}")


def _curve_table(serial: Sequence[tuple[float, float]], ours: Sequence[tuple[float, float]]) -> tuple[list[str], float]:
    """A line a step, and the largest relative difference."""
    rows, worst = [["step", "loss", "serial", "relative", "gradient norm", "serial", "relative"]], 0.0
    for step, points in enumerate(zip(ours, serial, strict=True), 1):
        row = [str(step)]
        for here, there in zip(*points, strict=True):
            is_number = math.isfinite(here) and math.isfinite(there) and there != 0
            relative = 0.0 if here == there else abs(here - there) / abs(there) if is_number else math.inf
            worst = max(worst, relative)
            row += [f"{here:.7g}", f"{there:.7g}", f"{relative:.1e}"]
        rows.append(row)
    return _aligned(rows), worst


def _layer_table(found: Sequence[Difference], first: Difference | None, steps: int) -> list[str]:
    """A line a layer: the largest difference of any element, and the largest of a tensor relative to its norm."""
    from megatron_lite.train.compare import KINDS

    cells: dict[str, dict[str, tuple[float, float]]] = {}
    for difference in found:
        row = cells.setdefault(difference.layer, {})
        largest, relative = row.get(difference.kind, (0.0, 0.0))
        row[difference.kind] = max(largest, difference.largest), max(relative, difference.relative)
    rows = [["layer", "output: max", "relative", "gradient: max", "relative", f"weight after {steps}: max", "relative"]]
    for layer, row in cells.items():
        rows.append([layer, *(f"{n:.1e}" if kind in row else "" for kind in KINDS for n in row.get(kind, (0, 0)))])
        if first is not None and first.layer == layer:
            rows[-1].append(f"<- its {first.kind} is the first to differ")
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of the first row's number to the right, but for the first; what is beyond them follows."""
    columns = len(rows[0])
    widths = [max(len(row[i]) for row in rows) for i in range(columns)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, columns)), *row[columns:]]
        lines.append("  ".join(cells).rstrip())
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool: 0 where the layout agrees, 1 where it does not, 2 for what cannot be asked."""

    def act(me: Launch) -> None:
        config, options = cli.load(
            sys.argv[1:] if argv is None else argv,
            CheckOptions,
            prog="check_parallel.py",
            description="Whether a parallel layout computes what one process does; all flags of pretrain_gpt.py work.",
            shown=me.rank == 0,
        )
        if found := options.problems():
            raise ConfigError(found)
        if options.into is not None:
            be_rank(me, config, options)
        elif me.world_size > 1:
            raise ConfigError("start this tool as one process; it starts those of --layout by itself")
        else:
            check(config, options)

    return exit_code_of(act)


if __name__ == "__main__":
    end_process(main())
