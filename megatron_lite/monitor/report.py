"""`loss.png`: the curves of a run as one picture."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from pathlib import Path

from megatron_lite.errors import UserError
from megatron_lite.monitor.history import read_history
from megatron_lite.publish import published

INK, FAINT = "#1f2933", "#9aa5b1"
TRAIN, VALID, RATE, REFERENCES = "#2563a8", "#d9480f", "#2b8a3e", ("#7048a8", "#0c8599", "#868e96")


def plot_loss(
    metrics: str | os.PathLike,
    picture: str | os.PathLike,
    references: Mapping[str, float] | None = None,
    title: str | None = None,
) -> Path:
    """Draw the losses and the learning rate of a `metrics.jsonl` into a PNG and return its path.

    `references` are levels in nats a token drawn as dashed lines, by label. Raises UserError when
    the file has no loss or matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("a picture of the loss needs matplotlib; pip install matplotlib") from None
    from matplotlib.figure import Figure

    records = [record for record in read_history(metrics) if "step" in record]
    losses = _series(records, "loss")
    if not losses[0]:
        raise UserError(f"{metrics} has no finite loss to draw; train at least one step")
    valid, rate = _series(records, "valid_loss"), _series(records, "lr")
    with matplotlib.rc_context({"font.size": 9, "axes.edgecolor": FAINT, "text.color": INK, "axes.labelcolor": INK}):
        figure = Figure(figsize=(8, 5.6), dpi=150, layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        _draw_losses(top, losses, valid, references or {})
        bottom.plot(*rate, color=RATE, linewidth=1.4)
        bottom.set_ylabel("learning rate")
        bottom.set_xlabel("step")
        bottom.set_ylim(bottom=0)
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
        bottom.xaxis.get_major_locator().set_params(integer=True)
        for panel in (top, bottom):
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(color="#e4e7eb", linewidth=0.6)
            panel.tick_params(color=FAINT, labelcolor=INK)
            panel.margins(x=0.01)
        top.set_title(title or Path(metrics).resolve().parent.name, loc="left", fontweight="bold")
        with published(picture) as written:
            figure.savefig(written, format="png")
    return Path(picture)


def _series(records: list[dict], name: str) -> tuple[list[int], list[float]]:
    points = [(record["step"], record[name]) for record in records if math.isfinite(record.get(name, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: list[float], window: int) -> list[float]:
    """Mean over the `window` values around each; narrower, and still centred, towards both ends.

    Centred, because a trailing mean draws a falling curve too high.
    """
    sums = [0.0, *itertools.accumulate(values)]
    smoothed = []
    for i in range(len(values)):
        reach = min(window // 2, i, len(values) - 1 - i)
        smoothed.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return smoothed


def _draw_losses(panel, losses, valid, references: Mapping[str, float]) -> None:
    steps, values = losses
    if len(values) >= 20:
        panel.plot(steps, values, color=TRAIN, linewidth=0.6, alpha=0.35)
        panel.plot(steps, smooth(values, max(5, len(values) // 40)), color=TRAIN, linewidth=1.8, label="training")
    else:
        panel.plot(steps, values, color=TRAIN, linewidth=1.8, marker=".", label="training")
    if valid[0]:
        panel.plot(*valid, color=VALID, linewidth=1.0, marker="o", markersize=4, label="validation")
        panel.annotate(
            f"{valid[1][-1]:.3f}",
            (valid[0][-1], valid[1][-1]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="right",
            color=VALID,
            fontweight="bold",
        )
    for i, (label, level) in enumerate(references.items()):
        color = REFERENCES[i % len(REFERENCES)]
        panel.axhline(level, color=color, linewidth=1.1, linestyle=(0, (5, 3)), label=f"{label} {level:.3f}")
    panel.set_ylabel("loss (nats per token)")
    panel.legend(frameon=False, loc="upper right")
