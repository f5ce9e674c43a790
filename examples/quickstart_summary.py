"""What a quickstart run came to: the loss curve as a picture, and its numbers beside the unigram entropy."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from megatron_lite.data.indexed import IndexedReader
from megatron_lite.data.provenance import read_provenance
from megatron_lite.monitor.report import plot_loss

LAST_STEPS = 10


def main() -> None:
    """Draw loss.png and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, with metrics.jsonl, heldout.json")
    parser.add_argument("--data", required=True, help="prefix of the token set it was trained on")
    options = parser.parse_args()

    records = [json.loads(line) for line in (options.run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    steps = max(record["step"] for record in records)
    valid_losses = [record["valid_loss"] for record in records if "valid_loss" in record]
    held_out = json.loads((options.run / "heldout.json").read_text())["total"]
    entropy = read_provenance(options.data, IndexedReader(options.data).num_tokens).unigram_entropy
    last = statistics.fmean(losses[-LAST_STEPS:])
    plot_loss(
        options.run / "metrics.jsonl",
        options.run / "loss.png",
        references={"unigram entropy": entropy},
        title="quickstart",
    )
    where = {
        "loss.png": "the curves",
        "metrics.jsonl": "one JSON object a step",
        "tensorboard/": f"tensorboard --logdir {options.run}",
        f"step-{steps:08d}/": "the checkpoint",
        "samples.txt": f'more: python tools/generate_text.py --load {options.run} --prompt "..."',
    }
    print(f"first loss       {losses[0]:.3f} nats a token")
    print(f"last loss        {last:.3f} (mean of the last {len(losses[-LAST_STEPS:])} of {steps} steps)")
    print(f"unigram entropy  {entropy:.3f}: the loss of knowing how frequent each token is, and nothing else")
    print(f"validation loss  {valid_losses[-1]:.3f}" if valid_losses else "validation loss  was not measured")
    print(
        f"held-out text    loss {held_out['loss']:.3f}, perplexity {held_out['perplexity']:.1f}, "
        f"{held_out['bits_per_byte']:.3f} bits per byte, next token right {held_out['accuracy']:.1%}"
    )
    print("where things are")
    for name, what in where.items():
        print(f"  {options.run / name!s:<36} {what}")


if __name__ == "__main__":
    main()
