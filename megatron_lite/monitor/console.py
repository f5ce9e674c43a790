"""The console: a line every few steps in a log, a bar on a terminal."""

from __future__ import annotations

import math
from typing import TextIO

from megatron_lite import log
from megatron_lite.monitor.history import Record


class ConsoleSink:
    """What rank 0 says of the steps: plain lines through the log, and on a terminal a tqdm bar.

    Lines give the mean loss and the speed over the `log_interval` steps since the last one. While
    a bar is shown, log lines are printed above it.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        log_interval: int = 1,
        resume_step: int = 0,
        world_size: int = 1,
        stream: TextIO | None = None,
    ):
        self._total = total_steps
        self._interval = max(1, log_interval)
        self._window: list[Record] = []
        self._world_size = world_size
        self._bar = None
        stream = stream or log.console()
        if stream.isatty():
            self._bar = _open_bar(total_steps, resume_step, stream)
        if self._bar is not None:
            log.configure(0, world_size, _AboveBar(self._bar, stream))

    def write(self, record: Record) -> None:
        if "valid_loss" in record:
            log.note(evaluation_line(record))
        if "loss" not in record:
            return
        self._window.append(record)
        step = record["step"]
        if self._bar is not None:
            self._bar.set_postfix_str(_short(record), refresh=False)
            self._bar.update(step - self._bar.n)
        if step % self._interval == 0 or step == self._total:
            if self._bar is None:
                log.note(step_line(self._window, self._total))
            self._window.clear()

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            log.configure(0, self._world_size)


class _AboveBar:
    """A text stream that takes the bar off, writes, and draws the bar again."""

    def __init__(self, bar, stream: TextIO):
        self._bar, self._stream = bar, stream

    def write(self, text: str) -> None:
        self._bar.clear()
        self._stream.write(text)
        self._bar.refresh()

    def flush(self) -> None:
        self._stream.flush()


def _open_bar(total: int, resume_step: int, stream: TextIO):
    try:
        from tqdm import tqdm
    except ImportError:
        log.once("tqdm is not installed: plain lines instead of a bar (pip install tqdm)")
        return None
    return tqdm(total=total, initial=resume_step, file=stream, unit="step", dynamic_ncols=True, smoothing=0.1)


def step_line(window: list[Record], total_steps: int) -> str:
    """One line for the steps of `window`: mean loss, the last step's rate and norm, speed, time left."""
    last = window[-1]
    seconds = sum(record.get("iteration_time", 0.0) for record in window)
    tokens = sum(record.get("tokens_per_second", 0.0) * record.get("iteration_time", 0.0) for record in window)
    parts = [f"step {last['step']}/{total_steps}", f"loss {sum(record['loss'] for record in window) / len(window):.4f}"]
    if "lr" in last:
        parts.append(f"lr {last['lr']:.3g}")
    if "grad_norm" in last:
        parts.append(f"grad norm {last['grad_norm']:.3g}")
    if last.get("loss_scale", 1) != 1:
        parts.append(f"loss scale {last['loss_scale']:g}")
    if last.get("skipped_steps"):
        parts.append(f"skipped {last['skipped_steps']}")
    if seconds:
        parts.append(f"{count(tokens / seconds)} tokens/s")
        if "model_tflops" in last:
            parts.append(_compute(window))
        parts.append(f"{seconds / len(window):.3g} s/step")
        parts.append(f"{duration((total_steps - last['step']) * seconds / len(window))} left")
    return " | ".join(parts)


def _mean(window: list[Record], name: str) -> float:
    """The mean of a rate over the time of the steps of `window` that have it."""
    timed = [(record[name], record["iteration_time"]) for record in window if name in record]
    return sum(rate * seconds for rate, seconds in timed) / sum(seconds for _, seconds in timed)


def _compute(window: list[Record]) -> str:
    """Model FLOPs a second of one rank, and their share of the device's peak where that is known."""
    number = count(_mean(window, "model_tflops") * 1e12)
    share = f" ({_mean(window, 'mfu'):.1%} MFU)" if "mfu" in window[-1] else ""
    return f"{number[:-1]} {number[-1]}FLOP/s{share}" if number[-1].isalpha() else f"{number} FLOP/s{share}"


def evaluation_line(record: Record) -> str:
    """One line for a validation."""
    perplexity = record["valid_perplexity"]
    shown = f"{perplexity:.2f}" if perplexity < 1e7 else f"{perplexity:.3g}"
    return f"step {record['step']} | validation loss {record['valid_loss']:.4f} | perplexity {shown}"


def _short(record: Record) -> str:
    parts = [f"loss={record['loss']:.4f}"]
    if "lr" in record:
        parts.append(f"lr={record['lr']:.2e}")
    if "tokens_per_second" in record:
        parts.append(f"{count(record['tokens_per_second'])} tokens/s")
    return ", ".join(parts)


def count(number: float) -> str:
    """`number` with three digits and a letter: 12.3k, 4.56M."""
    for letter, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * factor:
            return f"{number / factor:.3g}{letter}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """`seconds` in the two largest units: 3h12m, 4m05s, 12s."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    if minutes:
        return f"{minutes}m{whole % 60:02d}s"
    return f"{whole}s"
