"""What --data-path names: token sets, their weights, and how often each may be gone through."""

from __future__ import annotations

import dataclasses
import glob
import os
import re
from collections.abc import Sequence
from fractions import Fraction

from megatron_lite.data.loss_mask import is_mask
from megatron_lite.errors import ConfigError

# Of more digits of an exponent a fraction would fill the memory.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?")
_CAPPED = re.compile(r"(.+):(\d+\.?\d*|\.\d+)")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One token set, or the sets that a pattern names: parts of one, in the order of their numbers."""

    prefixes: tuple[str, ...]
    weight: Fraction | None = None
    max_epochs: Fraction | None = None
    """How often it may be gone through."""
    text: str = ""
    """As it was written, without weight and cap."""


def parse_data_path(entries: Sequence[str]) -> list[Entry]:
    """The sets of `PREFIX`, `PREFIX PREFIX ...` (no weights) or `WEIGHT PREFIX WEIGHT PREFIX ...`.

    `PREFIX:4` may be gone through four times; "data/web_bucket*" stands for all sets of such names. Raises
    ConfigError for another mixture of numbers and prefixes, weights and caps not above 0, and a pattern
    that no set has.
    """
    is_number = [_NUMBER.fullmatch(entry) is not None for entry in entries]
    if not any(is_number):
        return [_entry(text, None) for text in entries]
    if is_number != [True, False] * (len(entries) // 2):
        raise ConfigError(
            f'data path "{" ".join(entries)}" mixes weights and prefixes; write prefixes alone, or a weight before '
            "every prefix: 0.7 data/web 0.3 data/code."
        )
    parsed = []
    for weight, text in zip(entries[::2], entries[1::2], strict=True):
        if Fraction(weight) <= 0:
            raise ConfigError(f"data path gives {text} the weight {weight}; weights are above 0, leave the prefix out.")
        parsed.append(_entry(text, Fraction(weight)))
    return parsed


def prefixes_of(entries: Sequence[str]) -> list[str]:
    """All token sets that a data path names; raises what `parse_data_path` raises."""
    return [prefix for entry in parse_data_path(entries) for prefix in entry.prefixes]


def _entry(text: str, weight: Fraction | None) -> Entry:
    cap = None
    if capped := _CAPPED.fullmatch(text):
        text, cap = capped[1], Fraction(capped[2])
        if not cap:
            raise ConfigError(f"data path lets {text} be gone through 0 times; leave the prefix out.")
    if not glob.has_magic(text) or os.path.exists(f"{text}.idx"):
        return Entry((text,), weight, cap, text)
    found = [path.removesuffix(".idx") for path in glob.glob(f"{text}.idx") if not is_mask(path.removesuffix(".idx"))]
    if not found:
        raise ConfigError(f"data path: no token set has a name like {text}; there is no file {text}.idx.")
    return Entry(tuple(sorted(found, key=_by_number)), weight, cap, text)


def _by_number(prefix: str) -> list[tuple[str, int]]:
    """Sorts _bucket2 before _bucket10."""
    return [(other, int(digits or 0)) for other, digits in re.findall(r"(\D*)(\d*)", prefix)]
