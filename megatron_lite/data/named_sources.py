"""Sources that people train on, by a short name: presets over the grammar of --input."""

from __future__ import annotations

import dataclasses

NAMED = "source:"


@dataclasses.dataclass(frozen=True)
class NamedSource:
    """What it holds, the --input it stands for, and the field of its text."""

    what: str
    input: str
    text_key: str = "text"


BY_NAME = {
    "web": NamedSource("FineWeb, 10 billion tokens of it, cleaned", "hf:HuggingFaceFW/fineweb:sample-10BT:train"),
    "web-educational": NamedSource(
        "FineWeb-Edu, 10 billion tokens of it", "hf:HuggingFaceFW/fineweb-edu:sample-10BT:train"
    ),
    "web-c4": NamedSource("C4, English", "hf:allenai/c4:en:train"),
    "books": NamedSource("Project Gutenberg, English", "hf:manu/project_gutenberg:default:en"),
    "encyclopedia": NamedSource("Wikipedia, English, November 2023", "hf:wikimedia/wikipedia:20231101.en:train"),
    "code": NamedSource(
        "Python of GitHub, near duplicates removed", "hf:codeparrot/codeparrot-clean:default:train", "content"
    ),
    "papers": NamedSource("papers of arXiv, whole", "hf:ccdv/arxiv-summarization:document:train", "article"),
    "papers-abstracts": NamedSource("abstracts of arXiv", "hf:gfissore/arxiv-abstracts-2021:default:train", "abstract"),
}
