"""What refine.py runs with the Python of an environment that has datatrove: FineWeb's pipeline as datatrove has it.

    python tools/bench/refine_datatrove.py pipeline INPUT.jsonl FOLDER LID_MODEL WORKERS
    python tools/bench/refine_datatrove.py decisions INPUT.jsonl OUTPUT.jsonl LID_MODEL

`pipeline` prints the seconds of filtering and of deduplication as JSON and leaves the documents in FOLDER/output.
`decisions` asks each filter about each document as it stands, and writes the reasons, null for what is kept.

    python tools/bench/refine_datatrove.py golden tests/data/refine/datatrove_decisions.jsonl

writes what the tests compare our rules with: English prose of Python's manual, spoilt in many ways, and the decisions.
"""

from __future__ import annotations

import json
import pydoc_data.topics
import random
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LanguageFilter,
)
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers.jsonl import JsonlWriter


def filters(model: str) -> list:
    """FineWeb's, in its order; `model` is fastText's, which datatrove would fetch from the internet."""
    language = LanguageFilter("en", language_threshold=0.65)
    language.model.MODEL_URL = model
    return [
        language,
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(filter_no_terminal_punct=False),
        FineWebQualityFilter(),
    ]


def pipeline(path: str, folder: str, model: str, workers: int) -> dict[str, float]:
    """Run all of it over `workers` parts of the input; seconds by step."""
    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    source, kept, signatures = f"{folder}/parts", f"{folder}/kept", f"{folder}/signatures"
    buckets, removed = f"{folder}/buckets", f"{folder}/removed"
    Path(source).mkdir(parents=True)
    files = [open(f"{source}/{part}.jsonl", "wb") for part in range(workers)]  # noqa: SIM115
    for number, line in enumerate(Path(path).read_bytes().splitlines(keepends=True)):
        files[number % workers].write(line)
    for file in files:
        file.close()
    steps = {
        "filters": (
            [JsonlReader(source), FTFYFormatter(), *filters(model), JsonlWriter(kept, compression=None)],
            workers,
        ),
        "signatures": ([JsonlReader(kept), MinhashDedupSignature(signatures, config=config)], workers),
        "buckets": ([MinhashDedupBuckets(signatures, buckets, config=config)], config.num_buckets),
        "clusters": ([MinhashDedupCluster(buckets, removed, config=config)], 1),
        "output": (
            [
                JsonlReader(kept),
                MinhashDedupFilter(removed),
                PIIFormatter(),
                JsonlWriter(f"{folder}/output", compression="gzip"),
            ],
            workers,
        ),
    }
    seconds = {}
    for name, (parts, tasks) in steps.items():
        started = time.monotonic()
        # By fork, the processor time of workers is counted as that of children.
        logs = f"{folder}/logs/{name}"
        LocalPipelineExecutor(parts, tasks=tasks, workers=workers, logging_dir=logs, start_method="fork").run()
        seconds[name] = time.monotonic() - started
    return seconds


def decisions(texts: Iterable[str], asked: list) -> Iterator[dict[str, str | None]]:
    """For each text, what each filter alone says of it."""
    for text in texts:
        said = {}
        for step in asked:
            try:
                answer = step.filter(Document(text=text, id=""))
            except ZeroDivisionError:
                answer = (False, "empty")
            kept, reason = answer if isinstance(answer, tuple) else (answer, "dropped")
            said[type(step).__name__] = None if kept else reason
        yield said


SPOILT = (
    lambda text: text,
    lambda text: text.replace("{", "(").replace("}", ")"),
    lambda text: text[:220],
    lambda text: re.sub(r"(?m)^", "- ", text),
    lambda text: re.sub(r"(?m)[.,;:]?$", "...", text),
    lambda text: re.sub(r"[.!?]", "", text),
    lambda text: re.sub(r"\b(the|be|to|of|and|that|have|with)\b", "xx", text),
    lambda text: re.sub(r" ", " # ", text),
    lambda text: re.sub(r"\w+", lambda word: word[0][:2], text),
    lambda text: re.sub(r"(\w+) (\w+) ", r"\1\2", text),
    lambda text: text + "\n\n" + text[: len(text) // 3],
    lambda text: "\n".join(line for line in text.splitlines() for _ in range(1 + (len(line) % 3 == 0))),
    lambda text: " ".join(text.split()),
    lambda text: "\n".join(text.split()),
    lambda text: re.sub(r"\. ", ". We sell shoes here. ", text),
    lambda text: text + "\nLorem ipsum dolor sit amet.",
    lambda text: re.sub(r"(?m)^(?=\w)", "17 42 99 1001 5 ", text),
    lambda text: re.sub(r"(?m)$", " Use of cookies and javascript.", text),
)


def golden(output: str) -> None:
    """Texts of the manual spoilt in each way, with the decisions of the filters that need no model."""
    draw = random.Random(1)
    pieces = []
    for topic in sorted(pydoc_data.topics.topics):
        paragraphs = pydoc_data.topics.topics[topic].split("\n\n")
        for start in range(0, len(paragraphs), 6):
            piece = "\n\n".join(re.sub(r"\n +", " ", part.strip()) for part in paragraphs[start : start + 6])
            piece = re.sub(r'[`*"|<>=+_()\[\]]|::', "", piece)
            if 500 < len(piece) < 1600:
                pieces.append(piece)
    draw.shuffle(pieces)
    texts = [spoil(piece) for number, spoil in enumerate(SPOILT) for piece in pieces[number * 8 : number * 8 + 8]]
    with open(output, "w", encoding="utf-8") as found:
        for text, said in zip(texts, decisions(texts, filters("")[1:]), strict=True):
            found.write(json.dumps({"text": text, "decisions": said}) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "golden":
        golden(sys.argv[2])
        sys.exit()
    if sys.argv[1] == "pipeline":
        times = pipeline(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
        print(json.dumps(times))
    else:
        with open(sys.argv[2], encoding="utf-8") as lines, open(sys.argv[3], "w", encoding="utf-8") as answers:
            for said in decisions((json.loads(line)["text"] for line in lines), filters(sys.argv[4])):
                answers.write(json.dumps(said) + "\n")
