#!/usr/bin/env python
"""Score a trained model: loss, perplexity, bits per byte and next-token accuracy.

python tools/evaluate.py --load runs/gpt --data-path data/heldout_text_document --stride 256
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from megatron_lite import log
from megatron_lite.config.command_line import read
from megatron_lite.config.opening import OpeningConfig
from megatron_lite.errors import ConfigError
from megatron_lite.parallel.door import among_ranks, exit_code_of
from megatron_lite.parallel.launch import Launch, end_process
from megatron_lite.publish import insist_on_place, publish

_SECONDS_BETWEEN_LINES = 10.0


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """What is scored and how."""

    data_path: tuple[str, ...] = ()
    """Prefixes of token sets; without these and --text: those the model was trained with."""
    split: tuple[Literal["train", "valid", "test", "all"], ...] = ()
    """Parts of each set, by the run's own --split; default: all of a --data-path, valid of the run's own data."""
    text: tuple[str, ...] = ()
    """Plain text files, each scored as one document."""
    stride: int | None = None
    """Tokens between the starts of windows; fewer than --seq-length give more context. Default: no overlap."""
    seq_length: int | None = None
    """Tokens of a window; default: that of training."""
    micro_batch_size: int = 8
    """Windows of one pass."""
    json: str | None = None
    """File to write all numbers to, as one JSON object; - is standard output, without the table."""

    @property
    def json_path(self) -> Path | None:
        """The file of all numbers, if one is wanted."""
        return None if self.json in (None, "-") else Path(self.json)

    def problems(self) -> list[str]:
        """What cannot be, one sentence each."""
        found = [
            f"{name}={getattr(self, name)} is too small; give 1 or more."
            for name in ("stride", "seq_length", "micro_batch_size")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if self.json_path is not None:
            try:
                insist_on_place(self.json_path)
            except OSError as error:
                found.append(f"--json {self.json} cannot be written: {error.strerror}.")
        return found


@dataclasses.dataclass(frozen=True)
class _CommandLine:
    opening: OpeningConfig
    evaluate: EvaluateOptions = dataclasses.field(default_factory=EvaluateOptions)


class _Progress:
    """Batches done: a bar on a terminal, else a line every some seconds."""

    def __init__(self, name: str, shown: bool):
        self._name, self._shown, self._bar = name, shown, None
        self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if not self._shown:
            return
        if sys.stderr.isatty():
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=total, desc=self._name, unit="batch", leave=False, dynamic_ncols=True)
            self._bar.update(done - self._bar.n)
            if done == total:
                self._bar.close()
        elif time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            log.note(f"{self._name}: {done:,} of {total:,} batches")


def _numbers(name: str, score) -> dict[str, object]:
    return {
        "name": name,
        "tokens": score.tokens,
        "loss": score.loss,
        "perplexity": score.perplexity if score.perplexity < float("inf") else None,
        "bits_per_byte": score.bits_per_byte,
        "accuracy": score.accuracy,
        "text_bytes": score.text_bytes,
    }


def _table(rows: Sequence[dict]) -> str:
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'':{width}}  {'tokens':>13}  {'loss':>8}  {'perplexity':>11}  {'bits/byte':>9}  {'accuracy':>8}"]
    for row in rows:
        perplexity = "inf" if row["perplexity"] is None else f"{row['perplexity']:,.3f}"
        bits = "-" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        lines.append(
            f"{row['name']:{width}}  {row['tokens']:>13,}  {row['loss']:>8.4f}  {perplexity:>11}  {bits:>9}  "
            f"{row['accuracy']:>8.2%}"
        )
    return "\n".join(lines)


def _evaluate(me: Launch, store, command: _CommandLine) -> None:
    from megatron_lite.eval.loss import score
    from megatron_lite.eval.selection import select_passages
    from megatron_lite.train.build import close_ranks, together
    from megatron_lite.train.open import open_model

    opening, options = command.opening, command.evaluate
    opened = open_model(
        opening.load,
        me,
        store,
        ckpt_step=opening.ckpt_step,
        tensor_size=opening.tensor_model_parallel_size,
        pipe_size=opening.pipeline_model_parallel_size,
        timeout_minutes=opening.distributed_timeout_minutes,
        dtype=opening.dtype,
        overrides=opening.overrides,
    )
    mesh, seq_length = opened.mesh, options.seq_length or opened.config.data.seq_length
    if seq_length > opened.model.max_positions:
        raise ConfigError(
            f"seq_length={seq_length} is longer than the {opened.model.max_positions} positions the model was trained "
            f"for; give at most that"
        )
    passages = together(
        mesh,
        lambda: select_passages(
            opened.config.data,
            data_path=options.data_path,
            splits=options.split,
            text=options.text,
            vocab_size=opened.model.vocabulary.vocab_size,
            tokenizer=opened.tokenizer,
        ),
    )
    scores = [
        score(
            opened.model,
            mesh,
            passage,
            seq_length=seq_length,
            stride=options.stride,
            batch_size=options.micro_batch_size,
            reset_attention_mask=opened.config.data.reset_attention_mask,
            reset_position_ids=opened.config.data.reset_position_ids,
            on_batch=_Progress(passage.name, mesh.global_rank == 0),
        )
        for passage in passages
    ]
    rows = [_numbers(passage.name, result) for passage, result in zip(passages, scores, strict=True)]
    total = sum(scores[1:], scores[0])
    if mesh.global_rank == 0:
        result = {
            "load": opening.load,
            "step": opened.step,
            "seq_length": seq_length,
            "stride": options.stride or seq_length,
            "passages": rows,
            "total": _numbers("total", total),
        }
        if options.json == "-":
            print(json.dumps(result))
        else:
            print(_table(rows if len(rows) == 1 else [*rows, result["total"]]))
        if options.json_path is not None:
            try:
                publish(options.json_path, json.dumps(result) + "\n")
            except OSError as error:
                raise ConfigError(f"--json {options.json} cannot be written: {error.strerror}.") from None
    close_ranks()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code of this rank."""

    def evaluate(me: Launch) -> None:
        command = read(
            _CommandLine,
            sys.argv[1:] if argv is None else argv,
            prog="evaluate.py",
            description="Score a trained model: loss, perplexity, bits per byte and next-token accuracy.",
            shown=me.rank == 0,
        )
        if problems := command.opening.problems() + command.evaluate.problems():
            raise ConfigError(problems)
        with among_ranks(me, command.opening.distributed_timeout_minutes) as store:
            _evaluate(me, store, command)

    return exit_code_of(evaluate)


if __name__ == "__main__":
    end_process(main())
