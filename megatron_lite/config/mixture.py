"""What samples are made of, and from which token sets in what proportion."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Blending, packing, fill-in-the-middle and the curriculum of difficulty.

    Temperature, UniMax, segments, caps and the curriculum are of training alone; validation and testing keep the
    weights of their data path.
    """

    data_args_path: str | None = None
    """File with the words of data_path, which it stands for."""
    per_split_data_args_path: str | None = None
    """JSON file with lists under "train", "valid" and "test", which stand for train_data_path and so on."""
    blend_by: Literal["samples", "tokens"] = "samples"
    """What weights are shares of. They differ where samples of sets hold unlike numbers of tokens: packed ones. Tokens
    that a loss mask leaves out are among them."""
    data_blend_temperature: float | None = None
    """Weights of prefixes given without: tokens^(1/T). 1 is in proportion, higher is more even."""
    data_blend_unimax: float | None = None
    """Weights of prefixes given without: alike, but none is gone through more often than this in the run (UniMax)."""
    data_path_segments: tuple[str, ...] = ()
    """Weights that change, one text a change: "80% 0.2 0.8" from four fifths of the run on (or from a sample number),
    in the order of data_path. "90%/20 0 1" is reached linearly from the one before, in 20 steps."""
    data_max_epochs: float | None = None
    """How often a set may be gone through, where PREFIX:N does not say; default: once, if when_exhausted ends it."""
    when_exhausted: Literal["repeat", "stop", "redistribute"] = "repeat"
    """Behind the last epoch of a set: go through it again, end the run, or give its share to the others."""
    data_packing: Literal["none", "best_fit"] = "none"
    """What a sample is: seq_length tokens of documents that run into one another, or whole documents that fill it up
    best; then only longer ones are cut. Meant for --reset-attention-mask."""
    fim_rate: float | None = None
    """Share of documents that become prefix, suffix, middle, to learn to fill in (fill-in-the-middle)."""
    fim_spm_rate: float = 0.5
    """Share of those in the order suffix, prefix, middle."""
    fim_prefix_token: str = "<fim_prefix>"
    """Special token of the tokenizer before the prefix."""
    fim_middle_token: str = "<fim_middle>"
    """Special token before the middle."""
    fim_suffix_token: str = "<fim_suffix>"
    """Special token before the suffix."""
    curriculum_difficulty: Literal["linear", "root", "step"] | None = None
    """How the sets that a pattern of data_path names, easiest first ("data/web_bucket*"), open: as an even share of
    their samples, its square root, or one whole set after another."""
    curriculum_difficulty_samples: int | None = None
    """Samples after which all of them are open."""
