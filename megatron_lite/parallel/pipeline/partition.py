"""Which layers each pipeline stage holds, and which rank holds each stage. No torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from megatron_lite.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of the model: stage `index` of `count`, and the numbers of its layers.

    The first stage holds the embedding, the last one the final norm and the output head.
    """

    index: int
    count: int
    layers: range

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1


def whole_model(num_layers: int) -> tuple[Stage, ...]:
    """One stage with everything."""
    return (Stage(0, 1, range(num_layers)),)


def balanced_counts(num_layers: int, stages: int, *, embedding: float, head: float) -> list[int]:
    """Layers of each stage, at least one, so that the most expensive stage is as cheap as it can be.

    `embedding` and `head` are what they cost in layers. Among partitions with equally expensive worst stages
    it is the one whose costs are closest to each other. Raises ConfigError for more stages than layers.
    """
    if stages > num_layers:
        raise ConfigError(f"{stages} pipeline stages cannot each hold one of {num_layers} layers")

    def cost(stage: int, layers: int) -> float:
        return layers + (embedding if stage == 0 else 0.0) + (head if stage == stages - 1 else 0.0)

    # best[n]: (worst cost, sum of squares, counts) of the stages so far over the first n layers.
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(stages):
        left = stages - stage - 1
        found: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for held, (worst, squares, counts) in best.items():
            for layers in range(1, num_layers - held - left + 1):
                spent = cost(stage, layers)
                candidate = (max(worst, spent), squares + spent * spent, (*counts, layers))
                if held + layers not in found or candidate < found[held + layers]:
                    found[held + layers] = candidate
        best = found
    return list(best[num_layers][2])


def stages_of_counts(counts: Sequence[int]) -> tuple[Stage, ...]:
    """Stages that hold so many layers each, in order."""
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return tuple(
        Stage(i, len(counts), range(end - count, end)) for i, (count, end) in enumerate(zip(counts, ends, strict=True))
    )


def parse_pipeline_layout(text: str, num_layers: int) -> list[int]:
    """The layers of each stage in Megatron's notation, such as `Et*3|(tt|)*2,tL`.

    E is the embedding, t a layer, L the loss; | separates stages, a comma means nothing, and *n repeats the letter or
    the parentheses before it. Raises ConfigError for what cannot be read or does not hold the whole model once.
    """
    flat = _expand(text)
    stages = flat.split("|")
    problem = None
    if unknown := sorted(set(flat) - set("EtL|")):
        problem = f"has {', '.join(map(repr, unknown))}; it is made of E, t, L, |, commas, (...) and *n"
    elif flat.replace("|", "") != "E" + "t" * flat.count("t") + "L" or "E" not in stages[0] or "L" not in stages[-1]:
        problem = "does not begin with E in the first stage and end with L in the last"
    elif flat.count("t") != num_layers:
        problem = f"has {flat.count('t')} layers (t), and num_layers={num_layers}"
    if problem:
        raise ConfigError(f"pipeline_model_parallel_layout={text} {problem}.")
    return [stage.count("t") for stage in stages]


def _expand(text: str) -> str:
    """`text` without commas, blanks and repetitions; brackets that do not match stay."""
    text = re.sub(r"[,\s]", "", text)
    while (shorter := re.sub(r"\(([^()]*)\)(?:\*(\d+))?", lambda m: m[1] * int(m[2] or 1), text)) != text:
        text = shorter
    return re.sub(r"([EtL|])\*(\d+)", lambda m: m[1] * int(m[2]), text)


def looped(pipe: int, stages: int) -> tuple[int, ...]:
    """The pipe rank of each stage, in turn: 0, 1, 0, 1."""
    return tuple(stage % pipe for stage in range(stages))


def folded(pipe: int, stages: int) -> tuple[int, ...]:
    """The pipe rank of each stage, to and fro: 0, 1, 1, 0. The first and the last stage share a rank."""
    there = tuple(range(pipe))
    return tuple((there, there[::-1])[stage // pipe % 2][stage % pipe] for stage in range(stages))
