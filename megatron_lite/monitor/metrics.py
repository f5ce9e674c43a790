"""The numbers of a step: recorded where they arise, read once.

`METRICS` is the one list of names; `metrics.jsonl`, TensorBoard and Weights & Biases use them as they are.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

How = Literal["last", "mean", "sum", "max"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """What one name stands for, in which unit."""

    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    "step": Metric("steps", "steps done, the first is 1"),
    "loss": Metric("nats a token", "training loss, mean over the target tokens of the global batch"),
    "lr": Metric("", "learning rate this step was taken with"),
    "grad_norm": Metric("", "L2 norm of the whole gradient before clipping"),
    "loss_scale": Metric("", "factor of the fp16 loss; 1 in other precisions"),
    "num_zeros_in_grad": Metric("elements", "gradient elements that are exactly zero"),
    "skipped_steps": Metric("steps", "steps left out so far because an fp16 gradient overflowed"),
    "global_batch_size": Metric("sequences", "sequences of this step over all ranks"),
    "curriculum_seq_length": Metric("tokens", "length of sequences that a curriculum divides samples into"),
    "consumed_samples": Metric("sequences", "sequences trained on since the run began"),
    "consumed_tokens": Metric("tokens", "target tokens trained on since the run began"),
    "samples_crc32": Metric(
        "",
        "checksum of the samples of this step: their numbers, tokens, what of them does not count, and where attention "
        "or positions begin anew in them; the same on every layout",
    ),
    "iteration_time": Metric("s", "wall time of the step"),
    "data_wait_share": Metric("", "share of it that passed until every rank had its samples, as rank 0 saw it"),
    "tokens_per_second": Metric("tokens/s", "tokens of the step over all ranks per second"),
    "model_tflops": Metric("TFLOP/s", "model FLOPs per second of one rank; recompute and padding not counted"),
    "mfu": Metric("", "model_tflops over the dense peak of the device; absent where the peak is not known"),
    "memory_allocated": Metric(
        "bytes", "memory of live tensors on rank 0's device; on a CPU of the whole process, without mapped files"
    ),
    "memory_reserved": Metric(
        "bytes", "memory held by torch's allocator on rank 0's device; on a CPU the highest memory_allocated"
    ),
    "slowest_rank": Metric(
        "",
        "the rank that computed longest, over the last 10 steps or more, beside the ranks that do "
        "the same work; absent in other steps and on one rank",
    ),
    "slowest_rank_time": Metric(
        "s", "time of its forward and backward passes a step, without what it waited for others"
    ),
    "slowest_rank_ratio": Metric("", "that time over the median of those ranks"),
    "valid_loss": Metric("nats a token", "loss on the validation split, dropout off"),
    "valid_perplexity": Metric("", "exp(valid_loss)"),
}


class Metrics:
    """Values of the step under way, by name.

    A tensor is kept as it is on its device, so `record` never waits for a GPU; `collect` reads
    all of them in one transfer. A name that is not in `METRICS` is a ValueError.
    """

    def __init__(self) -> None:
        self._values: dict[str, tuple[How, list[float | torch.Tensor]]] = {}

    def record(self, name: str, value: float | torch.Tensor, how: How = "last") -> None:
        """Note a number or a one-element tensor; `how` says what several values of a name become."""
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}; add its unit and meaning to METRICS")
        if hasattr(value, "detach"):
            # A copy, because callers add to their tensors in place.
            value = value.detach().clone().reshape(())
        known, values = self._values.setdefault(name, (how, []))
        if known != how:
            raise ValueError(f"metric {name!r} was recorded as {known!r} before and now as {how!r}")
        if how == "last":
            values.clear()
        values.append(value)

    def collect(self) -> dict[str, float | int]:
        """All values as Python numbers, in the order of `METRICS`; the record is empty afterwards."""
        numbers = _read({name: values for name, (_, values) in self._values.items()})
        collected = {name: _reduce(self._values[name][0], numbers[name]) for name in METRICS if name in numbers}
        self._values.clear()
        return collected


def _read(values: dict[str, list[float | torch.Tensor]]) -> dict[str, list[float | int]]:
    """`values` with every tensor read; tensors of one device come over together."""
    numbers: dict[str, list[float | int]] = {name: list(found) for name, found in values.items()}
    by_device: dict[object, list[tuple[str, int, torch.Tensor]]] = {}
    for name, found in values.items():
        for i, value in enumerate(found):
            if hasattr(value, "device"):
                by_device.setdefault(value.device, []).append((name, i, value))
    if by_device:
        import torch

        for group in by_device.values():
            # float64 holds every fp32 value and every count below 2^53 exactly.
            read = torch.stack([tensor.to(torch.float64) for _, _, tensor in group]).tolist()
            for (name, i, tensor), number in zip(group, read, strict=True):
                numbers[name][i] = number if tensor.is_floating_point() else int(number)
    return numbers


def _reduce(how: How, numbers: list[float | int]) -> float | int:
    if how == "sum":
        return sum(numbers)
    if how == "mean":
        return math.fsum(numbers) / len(numbers) if all(map(math.isfinite, numbers)) else sum(numbers) / len(numbers)
    if how == "max":
        # A comparison would drop a NaN.
        return next((number for number in numbers if math.isnan(number)), max(numbers))
    return numbers[-1]


def throughput(
    *, tokens: int, seconds: float, world_size: int, flops_per_token: float, peak_flops: float | None
) -> dict[str, float]:
    """The speed metrics of one step.

    `tokens` are those of the global batch, `seconds` the step's wall time, `flops_per_token` the
    model FLOPs of one token, forward and backward, `peak_flops` the dense peak of one device in
    FLOP/s (None: not known, and no `mfu` is given).
    """
    rate = tokens / seconds
    flops = rate * flops_per_token / world_size
    speeds = {"iteration_time": seconds, "tokens_per_second": rate, "model_tflops": flops / 1e12}
    if peak_flops is not None:
        speeds["mfu"] = flops / peak_flops
    return speeds
