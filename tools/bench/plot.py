#!/usr/bin/env python
"""Draws what share of a plain copy's speed each kernel reaches, ours and the peers', out of kernels.py's JSON.

    python tools/bench/plot.py tools/bench/results/kernels-cpu-1-thread.json --output docs/kernels-cpu.png

One row an operation, one panel a dtype. An operation that is bound by memory alone lies at 100%; beyond that lies what
reads less of its data from memory than the bytes it is counted for.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

# Distinct for readers who do not see red and green apart, and in grey.
_MARKS = {
    "ours": ("#0b6e4f", "o"),
    "torch": ("#d1495b", "s"),
    "torch compiled": ("#edae49", "D"),
    "liger": ("#3d5a98", "^"),
    "quack": ("#8e6c8a", "v"),
    "deepspeed": ("#00798c", "<"),
    "bitsandbytes": ("#a44a3f", ">"),
    "apex": ("#6b705c", "P"),
}
_OTHER = ("#555555", "x")


def panels(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The results of each dtype, in order; of several sizes of an operation the largest."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for result in results:
        operations = found.setdefault(result["size"].split()[-1], {})
        before = operations.get(result["operation"])
        if before is None or result["megabytes"] >= before["megabytes"]:
            operations[result["operation"]] = result
    return {dtype: list(operations.values()) for dtype, operations in found.items()}


def draw(about: dict[str, Any], results: list[dict[str, Any]], path: Path) -> None:
    """The picture of runs of kernels.py on one machine, written to `path`."""
    by_dtype = panels(results)
    rows = max(map(len, by_dtype.values()))
    figure, axes = pyplot.subplots(
        1, len(by_dtype), figsize=(5.6 * len(by_dtype), 1.6 + 0.3 * rows), sharey=False, squeeze=False
    )
    handles: dict[str, Any] = {}
    for axis, (dtype, results) in zip(axes[0], by_dtype.items(), strict=True):
        names = [result["operation"].replace("_", " ") for result in results]
        for row, result in enumerate(results):
            shares = {who: 100 * share for who, share in result["share_of_copy"].items() if who != "copy"}
            axis.plot([min(shares.values()), max(shares.values())], [row, row], color="#cccccc", zorder=1)
            for who, share in sorted(shares.items(), key=lambda item: item[0] == "ours"):
                colour, mark = _MARKS.get(who, _OTHER)
                size = 64 if who == "ours" else 36
                handles[who] = axis.scatter(share, row, s=size, color=colour, marker=mark, zorder=2)
        axis.axvline(100, color="black", linewidth=0.8, linestyle="--")
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_xlim(left=0)
        axis.set_title(dtype)
        axis.set_xlabel("speed, % of a copy of as many bytes")
        axis.grid(axis="x", color="#eeeeee")
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.suptitle(
        f"{about['device']}, {about['kernels']}, {about['threads']} thread(s), torch {about['torch']}", fontsize=10
    )
    order = sorted(handles, key=lambda who: (who != "ours", who))
    figure.legend([handles[who] for who in order], order, loc="lower center", ncols=len(order), frameon=False)
    figure.tight_layout(rect=(0, 0.3 / figure.get_figheight(), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+", help="JSON that kernels.py wrote, of one machine")
    parser.add_argument("--output", type=Path, required=True, help="PNG or SVG file")
    options = parser.parse_args()
    try:
        reports = [json.loads(report.read_text()) for report in options.reports]
        results = [result for report in reports for result in report["results"]]
        draw(reports[0]["about"], results, options.output)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{', '.join(map(str, options.reports))}: no result of kernels.py: {error!r}")
    print(options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
