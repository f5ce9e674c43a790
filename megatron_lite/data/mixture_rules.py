"""What a configuration may ask of blends, packing, fill-in-the-middle and the curriculum of difficulty."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

from megatron_lite.config.data import DataConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.data.data_path import Entry, parse_data_path
from megatron_lite.data.mixture import parse_segments
from megatron_lite.errors import ConfigError

_OF_THE_RUN = 100_000
"""Stands for the length of a run, to read segments that are given as shares of it."""


def mixture_problems(config: RunConfig) -> Iterator[str]:
    """One sentence for each thing that cannot be; a data path that cannot be read is told elsewhere."""
    data = config.data
    yield from _sample_problems(data)
    if data.when_exhausted == "repeat" and data.data_max_epochs is not None:
        yield (
            f"data_max_epochs={data.data_max_epochs:g} limits how often a set is gone through and "
            "when_exhausted=repeat does not; choose --when-exhausted stop or redistribute, or leave the limit out."
        )
    if data.curriculum_difficulty_samples is not None and data.curriculum_difficulty is None:
        yield (
            f"curriculum_difficulty_samples={data.curriculum_difficulty_samples} has no curriculum_difficulty beside "
            "it; choose linear, root or step."
        )
    if data.curriculum_difficulty is not None and data.curriculum_difficulty_samples is None:
        yield (
            f"curriculum_difficulty={data.curriculum_difficulty} needs the samples after which all sets are open; give "
            "--curriculum-difficulty-samples."
        )
    words = data.train_data_path or data.data_path
    if data.mock_data or not words:
        yield from _without_sets(data)
        return
    try:
        entries = parse_data_path(words)
    except ConfigError:
        return
    yield from _weight_problems(data, entries)
    if config.training.train_epochs is not None:
        yield from _length_problems(data)


def _sample_problems(data: DataConfig) -> Iterator[str]:
    if data.data_packing == "best_fit" and data.sample_stride is not None:
        yield (
            f"sample_stride={data.sample_stride} is of samples that overlap and data_packing=best_fit has none; give "
            "one of the two."
        )
    for name in ("fim_rate", "fim_spm_rate"):
        rate = getattr(data, name)
        # A rate that is no number is told of elsewhere.
        if rate is not None and (rate < 0 or rate > 1):
            yield f"{name}={rate} is out of range; give a share from 0 to 1."
    if data.fim_rate is None and data.fim_spm_rate != DataConfig().fim_spm_rate:
        yield f"fim_spm_rate={data.fim_spm_rate} is a share of what fim_rate permutes; give --fim-rate too."
    if data.fim_rate and data.tokenizer_type is None:
        yield (
            f"fim_rate={data.fim_rate} puts special tokens into documents and no tokenizer says which ids they have; "
            "give --tokenizer-type and its file."
        )


def _without_sets(data: DataConfig) -> Iterator[str]:
    asked = ("data_blend_temperature", "data_blend_unimax", "data_max_epochs", "curriculum_difficulty")
    given = [name for name in asked if getattr(data, name) is not None]
    given += [name for name in ("data_path_segments",) if data.data_path_segments]
    defaults = DataConfig()
    for name in ("data_packing", "when_exhausted"):
        if data.mock_data and getattr(data, name) != getattr(defaults, name):
            given.append(name)
    for name in given:
        yield f"{name}={getattr(data, name)} is about token sets and the configuration names none; give --data-path."


def _weight_problems(data: DataConfig, entries: Sequence[Entry]) -> Iterator[str]:
    rules = {"data_blend_temperature": data.data_blend_temperature, "data_blend_unimax": data.data_blend_unimax}
    asked = [f"{name}={value:g}" for name, value in rules.items() if value is not None]
    if len(asked) == 2:
        yield f"{asked[0]} and {asked[1]} are two rules for the same weights; give one."
    elif asked and entries[0].weight is not None:
        yield f"{asked[0]} is a rule for weights and the data path gives its own; leave one of the two out."
    if data.when_exhausted == "repeat":
        capped = next((entry for entry in entries if entry.max_epochs is not None), None)
        if capped is not None:
            yield (
                f"the data path says that {capped.text} may be gone through {float(capped.max_epochs):g} times and "
                "when_exhausted=repeat has no limit; choose --when-exhausted stop or redistribute."
            )
    if data.curriculum_difficulty is not None and all(len(entry.prefixes) == 1 for entry in entries):
        yield (
            f"curriculum_difficulty={data.curriculum_difficulty} opens the sets that a pattern of the data path names, "
            'and there is none of several; write for example "data/web_bucket*", made by tools/dataset.py divide.'
        )
    for text in data.data_path_segments:
        # Each by itself: their order may depend on the length of the run.
        try:
            parse_segments([text], [Fraction(1)] * len(entries), _OF_THE_RUN)
        except ConfigError as error:
            yield from error.problems


def _length_problems(data: DataConfig) -> Iterator[str]:
    needs = [name for name in ("data_blend_unimax",) if getattr(data, name) is not None]
    needs += ["data_path_segments"] if any("%" in text for text in data.data_path_segments) else []
    for name in needs:
        yield (
            f"{name} is about shares of the run, whose length by train_epochs is not known before the data are opened; "
            "give --train-iters, --train-samples or --train-tokens."
        )
