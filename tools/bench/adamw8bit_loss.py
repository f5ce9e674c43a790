#!/usr/bin/env python
"""What 8-bit optimizer state costs in loss: the quickstart's model trained by 32-bit and by 8-bit AdamW.

Same seed, data and order; the runs differ in --optimizer alone. Needs the quickstart's data (steps 1 to 3 of
examples/quickstart.sh).

    python tools/bench/adamw8bit_loss.py --steps 300 --output tools/bench/results/adamw8bit_loss.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPTIMIZERS = {
    "adamw": ["--optimizer", "adamw"],
    "adamw8bit": ["--optimizer", "adamw8bit"],
    "adamw8bit, nearest codes": ["--optimizer", "adamw8bit", "--adam8bit-nearest-codes"],
}
LAST = 20
"""Steps whose losses are averaged: one batch's is noise."""


def losses(steps: int, options: list[str]) -> tuple[list[float], float]:
    """The training loss of every step, and the last loss on held-out text."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "pretrain_gpt.py", "--config", "examples/quickstart.yaml", "--save", folder]
        command += ["--tensor-model-parallel-size", "1", "--train-iters", str(steps), "--eval-interval", str(steps)]
        command += ["--log-interval", "1", "--tensorboard-dir", "none", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-4000:])
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    heldout = [record["valid_loss"] for record in records if "valid_loss" in record]
    return [record["loss"] for record in records if "loss" in record], heldout[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, help="write JSON here")
    options = parser.parse_args()
    results = {}
    for name, flags in OPTIMIZERS.items():
        curve, heldout = losses(options.steps, flags)
        results[name] = {"last_losses": statistics.fmean(curve[-LAST:]), "heldout_loss": heldout, "losses": curve[::10]}
        of_32_bits = {
            measure: results[name][measure] / results["adamw"][measure] for measure in ("last_losses", "heldout_loss")
        }
        results[name]["over_32_bits"] = of_32_bits
        print(f"{name:26} {of_32_bits['last_losses']:.5f} x adamw's loss, held out {of_32_bits['heldout_loss']:.5f} x")
    if options.output:
        about = {"machine": platform.machine(), "torch": metadata.version("torch"), "steps": options.steps}
        about["averaged_over_last"] = LAST
        options.output.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
