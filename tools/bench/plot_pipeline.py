#!/usr/bin/env python
"""Draws the measured timeline of each pipeline schedule out of pipeline.py's JSON.

    python tools/bench/plot_pipeline.py tools/bench/results/pipeline-cpu.json --output docs/pipeline.png

One panel a schedule, one row a rank, one box an action with the number of its micro-batch; what is empty is the bubble.
All panels have one scale of time: a stage of a schedule that has two of them on a rank takes half as long.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import patches, pyplot

# Told apart by readers who do not see red and green apart, and in grey: dark, middle, light.
_KINDS = {
    "F": ("forward", "#2f5d8a", "white"),
    "B": ("backward", "#d98032", "white"),
    "I": ("backward, gradients of inputs", "#efb366", "#222222"),
    "W": ("backward, gradients of weights", "#8db48e", "#222222"),
}
_SECOND = 0.72
"""How strong the colours of a rank's second stage are."""
_BUBBLE = "#eeeeee"
_SPAN = re.compile(r"(\d+)([FBIW])(\d+)@(-?[\d.]+)-(-?[\d.]+)")


def draw(report: dict[str, Any], path: Path) -> None:
    """The picture of the cases whose spans were kept, written to `path`."""
    cases = [case for case in report["cases"] if "spans" in case]
    most = max(case["stages_on_a_rank"] for case in cases)
    lengths = [_length(case, most) for case in cases]
    figure, axes = pyplot.subplots(len(cases), 1, figsize=(15, 1.9 * len(cases) + 1.1), sharex=True, squeeze=False)
    for axis, case, length in zip(axes[:, 0], cases, lengths, strict=True):
        _draw_case(axis, case, most, length)
        axis.set_xlim(-0.2, max(lengths) + 0.2)
    axes[-1, 0].set_xlabel("time, in forward passes through half of a rank's layers", fontsize=10)
    shown = [patches.Patch(color=colour, label=name) for name, colour, _ in _KINDS.values()]
    shown += [patches.Patch(color=_BUBBLE, label="bubble")]
    figure.legend(handles=shown, loc="upper center", ncols=len(shown), frameon=False, fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / figure.get_figheight()), h_pad=0.9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _spans(case: dict[str, Any], most: int) -> list[list[tuple[int, str, str, float, float]]]:
    """(stage, kind, micro-batch, start, stop) of each rank's actions."""
    scale = most / case["stages_on_a_rank"]
    return [
        [
            (int(stage), kind, number, scale * float(start), scale * float(stop))
            for stage, kind, number, start, stop in _SPAN.findall(row)
        ]
        for row in case["spans"]
    ]


def _length(case: dict[str, Any], most: int) -> float:
    return max(span[-1] for row in _spans(case, most) for span in row)


def _bubble(case: dict[str, Any], most: int) -> float:
    """The bubble of the step that is drawn."""
    rows = _spans(case, most)
    busy = sum(stop - start for row in rows for *_, start, stop in row)
    return 1 - busy / (len(rows) * _length(case, most))


def _draw_case(axis: Any, case: dict[str, Any], most: int, length: float) -> None:
    for rank, row in enumerate(_spans(case, most)):
        axis.add_patch(patches.Rectangle((0, rank + 0.06), length, 0.88, color=_BUBBLE, linewidth=0))
        for stage, kind, number, start, stop in row:
            _, colour, ink = _KINDS[kind]
            is_second = stage != min(span[0] for span in row)
            box = patches.Rectangle(
                (start, rank + 0.06), stop - start, 0.88, facecolor=colour, edgecolor="white", linewidth=0.7,
                alpha=_SECOND if is_second else 1.0,
            )  # fmt: skip
            axis.add_patch(box)
            axis.text((start + stop) / 2, rank + 0.52, number, color=ink, ha="center", va="center", fontsize=7.5)
    axis.set_ylim(case["ranks"], 0)
    axis.set_yticks([rank + 0.5 for rank in range(case["ranks"])], [f"rank {rank}" for rank in range(case["ranks"])])
    axis.tick_params(length=0, labelsize=9)
    for side in axis.spines.values():
        side.set_visible(False)
    held = ", ".join(map(str, case["in_flight"]))
    stages = "1 stage" if case["stages_on_a_rank"] == 1 else f"{case['stages_on_a_rank']} stages"
    axis.set_title(case["schedule"], loc="left", fontsize=12, fontweight="bold")
    axis.set_title(
        f"bubble {case['theory']:.1%} by theory, {_bubble(case, most):.1%} measured    "
        f"{stages} on a rank, at most {held} forward passes held",
        loc="right", fontsize=9.5, color="#444444",
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="JSON that pipeline.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="PNG or SVG file")
    options = parser.parse_args()
    try:
        draw(json.loads(options.report.read_text()), options.output)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{options.report} is no result of pipeline.py: {error!r}")
    print(options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
