"""What refine.py runs with the Python of an environment that has datatrove: FineWeb's pipeline as datatrove has it.

    python tools/bench/refine_datatrove.py pipeline INPUT.jsonl FOLDER LID_MODEL WORKERS
    python tools/bench/refine_datatrove.py decisions INPUT.jsonl OUTPUT.jsonl LID_MODEL

`pipeline` prints the seconds of filtering and of deduplication as JSON and leaves the documents in FOLDER/output.
`decisions` asks each filter about each document as it stands, and writes the reasons, null for what is kept.
"""

from __future__ import annotations

import json
import sys
import time
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
from datatrove.utils.lid import FT176LID


def filters() -> list:
    """FineWeb's, in its order."""
    return [
        LanguageFilter("en", language_threshold=0.65),
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(filter_no_terminal_punct=False),
        FineWebQualityFilter(),
    ]


def pipeline(path: str, folder: str, workers: int) -> dict[str, float]:
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
        "filters": ([JsonlReader(source), FTFYFormatter(), *filters(), JsonlWriter(kept, compression=None)], workers),
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
        LocalPipelineExecutor(parts, tasks=tasks, workers=workers, logging_dir=f"{folder}/logs/{name}").run()
        seconds[name] = time.monotonic() - started
    return seconds


def decisions(path: str, output: str) -> None:
    """Write, for each document, what each filter alone says of it."""
    asked = filters()
    with open(path, encoding="utf-8") as lines, open(output, "w", encoding="utf-8") as found:
        for line in lines:
            text = json.loads(line)["text"]
            said = {}
            for step in asked:
                try:
                    answer = step.filter(Document(text=text, id=""))
                except ZeroDivisionError:
                    answer = (False, "empty")
                kept, reason = answer if isinstance(answer, tuple) else (answer, "dropped")
                said[type(step).__name__] = None if kept else reason
            found.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    FT176LID.MODEL_URL = sys.argv[4]
    if sys.argv[1] == "pipeline":
        times = pipeline(sys.argv[2], sys.argv[3], int(sys.argv[5]))
        print(json.dumps(times))
    else:
        decisions(sys.argv[2], sys.argv[3])
