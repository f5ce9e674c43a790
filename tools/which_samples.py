#!/usr/bin/env python
"""Which documents fed a step of training: out of the run's checkpoints and arithmetic, not of logs.

python tools/which_samples.py --load runs/gpt --step 1200 --show-text
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_lite import log
from megatron_lite.config import sources
from megatron_lite.config.command_line import read
from megatron_lite.data.feed import build_stream
from megatron_lite.data.stream import SampleStream
from megatron_lite.data.tokenizer_files import tokenizer_of_training
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.errors import EXIT_DONE, ConfigError, DataError, MegatronLiteError
from megatron_lite.train.batch_plan import BatchPlan, samples_of_run
from megatron_lite.train.ledger import Landmark, Ledger, StepSamples

_SHOWN_CHARACTERS = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class WhichSamplesOptions:
    """Steps of a run whose samples are asked for."""

    load: str
    """Folder of the run's checkpoints (its --save folder), or of one of them."""
    step: tuple[int, ...]
    """Steps, from 1, as metrics.jsonl numbers them."""
    data_path: tuple[str, ...] = ()
    """Where the token sets are now, if they were moved: as many entries as the run had, in the same order."""
    show_text: bool = False
    """How each sample begins, by the run's tokenizer."""
    json: bool = False
    """One JSON object a sample instead of the table."""

    def problems(self) -> list[str]:
        """What cannot be, one sentence each."""
        return [] if self.step else ["--step names no step; give one or more, counted from 1."]


@dataclasses.dataclass
class _Data:
    """The data of a landmark: they may change at a resume."""

    landmark: Landmark
    skip_samples: tuple[str, ...]
    stream: SampleStream

    @classmethod
    def of(cls, samples: StepSamples, moved_to: tuple[str, ...]) -> _Data:
        landmark, config = samples.landmark, samples.landmark.config
        if moved_to:
            name = "train_data_path" if config.data.train_data_path else "data_path"
            if len(moved_to) != (count := len(getattr(config.data, name))):
                raise ConfigError(f"--data-path gives {len(moved_to)} entries where the run had {name} of {count}")
            config = sources.override(config, {"data": {name: moved_to}})
        stream = build_stream(
            config.data,
            seed=config.training.seed,
            split="train",
            vocab_size=config.model.vocab_size,
            tokenizer=cls._tokenizer_of(landmark) if config.data.fim_rate else None,
            skip_samples=samples.skip_samples,
            total_samples=samples_of_run(config.training, 1, config.data.seq_length),
        )
        trained_on = landmark.fingerprints.get("train_data")
        if trained_on not in (None, stream.fingerprint):
            raise DataError(
                f"the data that {landmark.folder} names are not those of training any more (fingerprint "
                f"{stream.fingerprint[:12]}, not {trained_on[:12]}); give those of training by --data-path"
            )
        return cls(landmark, samples.skip_samples, stream)

    def are_of(self, samples: StepSamples) -> bool:
        """Whether the samples of a step are among these."""
        return (self.landmark.folder, self.skip_samples) == (samples.landmark.folder, samples.skip_samples)

    def condition(self, samples: StepSamples) -> str:
        """What has to be for a step that is still to come. Raises ConfigError where the data end before it."""
        stop, end = samples.consumed_samples + samples.count, self.stream.ends_after
        if end is not None and stop > end:
            raise ConfigError(
                f"step {samples.step} will not be: it would take samples up to number {stop - 1:,}, and the data end "
                f"after {end:,}, as --when-exhausted and --data-max-epochs say; ask for an earlier one"
            )
        training, length = self.landmark.config.training, self.landmark.config.data.seq_length
        plan = BatchPlan.of(training, 1, length, self.stream.samples_per_epoch)
        if training.train_iters is not None:
            is_within, told = samples.step <= training.train_iters, f"{training.train_iters:,} steps"
        else:
            is_within, told = stop <= plan.total_samples, f"{plan.total_samples:,} samples"
        return "" if is_within else f" if the run is made longer than its {told}"

    def beginning(self, sample: int) -> str:
        """The first characters of a sample."""
        return self._tokenizer.decode(self.stream[sample].tokens[:_SHOWN_CHARACTERS].tolist())[:_SHOWN_CHARACTERS]

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        if self.landmark.config.data.tokenizer_type is None:
            raise ConfigError("--show-text needs a tokenizer and the run names none; leave it out")
        return self._tokenizer_of(self.landmark)

    @staticmethod
    def _tokenizer_of(landmark: Landmark) -> Tokenizer:
        return tokenizer_of_training(landmark.folder, landmark.config.data, landmark.fingerprints.get("tokenizer"))


def _rows(options: WhichSamplesOptions) -> Iterator[dict]:
    ledger = Ledger(Path(options.load))
    data = None
    for step in options.step:
        samples = ledger.of_step(step)
        if data is None or not data.are_of(samples):
            data = _Data.of(samples, options.data_path)
        if step > ledger.newest_step:
            log.note(
                f"step {step} is behind the newest checkpoint, of step {ledger.newest_step}: these are the samples it "
                f"has, or will have{data.condition(samples)}, by that checkpoint's configuration"
            )
        for number in range(samples.count):
            yield _row(samples, number, data, options.show_text)


def _row(samples: StepSamples, number: int, data: _Data, show_text: bool) -> dict:
    sample = samples.consumed_samples + number
    origin = data.stream.origin(sample)
    row = {
        "step": samples.step,
        "in_batch": number,
        "sample": sample,
        "epoch": origin.epoch,
        "data": origin.prefix,
        "documents": [dataclasses.asdict(extent) for extent in origin.extents],
    }
    if show_text:
        row["text"] = data.beginning(sample)
    return row


def _documents(extents: list[dict]) -> str:
    """ "12[345:1024] 13[0:77]": tokens of documents, the last token of a sample being a target alone."""
    shown = [f"{e['document']}[{e['first']}:{e['first'] + e['tokens']}]" for e in extents]
    return " ".join(shown if len(shown) <= 4 else [*shown[:2], f"... {len(shown) - 3} more ...", shown[-1]])


def _table(rows: Iterator[dict]) -> Iterator[str]:
    for step, of_step in itertools.groupby(rows, key=lambda row: row["step"]):
        rows_here = list(of_step)
        first, last = rows_here[0]["sample"], rows_here[-1]["sample"]
        yield f"step {step}: {len(rows_here):,} samples, numbers {first:,} to {last:,}"
        for row in rows_here:
            where = "generated data" if row["data"] is None else f"{row['data']}  {_documents(row['documents'])}"
            text = f"  {row['text']!r}" if "text" in row else ""
            yield f"  {row['in_batch']:>5}  sample {row['sample']:,}  epoch {row['epoch']}  {where}{text}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    try:
        options = read(
            WhichSamplesOptions,
            sys.argv[1:] if argv is None else argv,
            prog="which_samples.py",
            description="Which documents and which of their tokens fed a step. DOCUMENT[A:B] is its tokens A to B - 1.",
        )
        rows = _rows(options)
        with log.reader_may_leave():
            for line in map(json.dumps, rows) if options.json else _table(rows):
                print(line, flush=True)
    except MegatronLiteError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
