"""Learn what a quality score is from examples of good text and of raw text.

    python tools/train_scorer.py --good source:encyclopedia --raw "crawl/*.jsonl.zst" --output scorer.npy

The stage score of tools/refine_data.py uses it: function megatron_lite.data.refine.importance:Importance with the
argument weights: scorer.npy; a text that is more like the good ones scores above 0.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_lite.config.command_line import read
from megatron_lite.data.refine.importance import learn
from megatron_lite.data.text_blocks import parse_limit
from megatron_lite.data.text_input import find_sources
from megatron_lite.errors import DataError, MegatronLiteError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainScorerOptions:
    """Learn a quality score from examples. Dashes and underscores in flags are alike."""

    good: tuple[str, ...]
    """Examples of good text, in the grammar of --input: files, folders, patterns, addresses, data sets."""
    raw: tuple[str, ...]
    """Examples of what good text is to be told from: what will be filtered, before filtering."""
    output: str
    """File to write, NAME.npy (1 MiB)."""
    text_key: str = "text"
    """Key, or dotted path of keys, of a document's text."""
    limit: str = "64MiB"
    """Read this much at most of each kind: documents, or bytes of unpacked input."""

    def problems(self) -> list[str]:
        """What cannot be, one sentence each."""
        return [] if self.output.endswith(".npy") else [f"--output {self.output} must end in .npy."]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    try:
        options = read(
            TrainScorerOptions,
            sys.argv[1:] if argv is None else argv,
            prog="train_scorer.py",
            description="Learn a quality score from examples. Dashes and underscores in flags are alike.",
        )
        limit = parse_limit(options.limit)
        try:
            learn(find_sources(options.good), find_sources(options.raw), options.text_key, limit, Path(options.output))
        except OSError as error:
            raise DataError(f"--output {options.output} cannot be written: {error.strerror}") from None
    except MegatronLiteError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{options.output}: for a stage score with function megatron_lite.data.refine.importance:Importance")
    return 0


if __name__ == "__main__":
    sys.exit(main())
