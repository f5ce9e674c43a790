"""The next token out of logits: greedy, or drawn after penalty, temperature, top-k and top-p, in that order."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import torch

from megatron_lite.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen. The defaults draw from the model's own distribution.

    Raises ConfigError with every value that is out of its range.
    """

    temperature: float = 1.0
    """Divides the logits; 0 is greedy, the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens are drawn (Fan et al. 2018); 0 is all."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach probability p are drawn (Holtzman et al. 2020)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that came before (CTRL, Keskar et al. 2019)."""
    seed: int = 0
    """What is drawn follows from this, the prompt and the number of the sample alone."""

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.temperature < math.inf:
            problems.append(f"temperature={self.temperature} is out of range; give 0 (greedy) or a number above it.")
        if self.top_k < 0:
            problems.append(f"top_k={self.top_k} is out of range; give 0 (all tokens) or a whole number above it.")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p} is out of range; give a number above 0 up to 1 (all tokens).")
        if not 0 < self.repetition_penalty < math.inf:
            problems.append(
                f"repetition_penalty={self.repetition_penalty} is out of range; give 1 (none) or a number above 0."
            )
        if problems:
            raise ConfigError(problems)


def penalize(logits_BV: torch.Tensor, seen_BV: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits with the tokens that are `seen` (bool) made less likely by a `penalty` above 1."""
    if penalty == 1.0:
        return logits_BV
    return torch.where(seen_BV, torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


def keep_top_k(logits_BV: torch.Tensor, k: int) -> torch.Tensor:
    """Logits with all but the k largest of each row at -inf; equals of the k-th stay. k = 0 keeps all."""
    if k == 0 or k >= logits_BV.shape[-1]:
        return logits_BV
    kth_B1 = logits_BV.topk(k).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < kth_B1, -math.inf)


def keep_top_p(logits_BV: torch.Tensor, p: float) -> torch.Tensor:
    """Logits with -inf at all tokens but the fewest most likely ones whose probabilities reach p."""
    if p == 1.0:
        return logits_BV
    sorted_BV, order_BV = logits_BV.sort(descending=True)
    probabilities_BV = sorted_BV.softmax(-1)
    mass_before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
    beyond_BV = mass_before_BV >= p
    beyond_BV[:, 0] = False
    return logits_BV.masked_fill(torch.zeros_like(beyond_BV).scatter(-1, order_BV, beyond_BV), -math.inf)


def row_generator(seed: int, prompt: Sequence[int], sample: int) -> torch.Generator:
    """The random numbers of sample number `sample` of a prompt, whatever it is batched with."""
    digest = hashlib.sha256(f"{seed} {sample} {' '.join(map(str, prompt))}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def choose(
    logits_BV: torch.Tensor, seen_BV: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """The next token of each row, int64 [B].

    `logits_BV` is fp32 over the true vocabulary, so that padding cannot be drawn; `seen_BV` (bool) marks
    tokens of the row so far. Each row takes one number from its own generator, none when greedy.
    """
    logits_BV = penalize(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = keep_top_p(keep_top_k(logits_BV / sampling.temperature, sampling.top_k), sampling.top_p)
    uniform_B1 = torch.stack([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    # Inverting the distribution function in float64: the first token whose sum exceeds the number, so
    # never one of probability 0, which adds nothing to the sum.
    sums_BV = logits_BV.double().softmax(-1).cumsum(-1)
    threshold_B1 = uniform_B1.to(sums_BV.device) * sums_BV[:, -1:]
    return torch.searchsorted(sums_BV, threshold_B1, right=True).squeeze(-1)
