"""What a run of the refinery did, as report.json: each document is kept, dropped for a reason, or set aside."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lite.data.refine.passes import READ
from megatron_lite.data.refine.report_page import page
from megatron_lite.data.refine.stage import Stage
from megatron_lite.data.refine.tally import FAILED, StageTally
from megatron_lite.data.unit_file import open_unit
from megatron_lite.errors import DataError
from megatron_lite.publish import publish

JSON_NAME, PAGE_NAME = "report.json", "report.html"


@dataclasses.dataclass(frozen=True)
class StageReport:
    """One stage: its options and its counts. Seconds are processor time, of all workers together."""

    name: str
    options: dict[str, Any]
    tally: StageTally

    @property
    def dropped(self) -> int:
        return self.tally.dropped.total()


@dataclasses.dataclass(frozen=True)
class Report:
    """`job` is what decided the output, `stages` what each did, reading first, `inputs` what was read of sources."""

    job: dict[str, Any]
    stages: list[StageReport]
    inputs: list[dict[str, Any]]

    @property
    def documents(self) -> int:
        """Documents of the input."""
        return self.stages[0].tally.documents

    @property
    def kept(self) -> int:
        """Documents of the output."""
        return self.documents - self.dropped - self.quarantined

    @property
    def dropped(self) -> int:
        return sum(stage.dropped for stage in self.stages)

    @property
    def quarantined(self) -> int:
        return sum(stage.tally.quarantined for stage in self.stages)

    def summary(self) -> str:
        """The counts in a line."""
        share = self.kept / max(self.documents, 1)
        aside = f", {self.quarantined:,} set aside since a stage failed on them" if self.quarantined else ""
        return f"{self.documents:,} documents in, {self.kept:,} kept ({share:.1%}), {self.dropped:,} dropped{aside}"

    def failures(self) -> list[str]:
        """The stages that failed on every document they saw, a sentence each."""
        found = []
        for stage in self.stages:
            if stage.tally.quarantined and not stage.tally.kept and not stage.dropped:
                _, place, error, _ = stage.tally.samples[FAILED][0]
                saw = f"all of the {stage.tally.quarantined:,} documents it saw"
                found.append(f"{stage.name} set aside {saw}, as {place}: {error}")
        return found

    def plain(self) -> dict[str, Any]:
        """As JSON has it. All but what is under "cost" is the same for the same input and recipe."""
        stages, cost = [], []
        for stage in self.stages:
            tally = stage.tally.plain()
            seconds = tally.pop("seconds")
            cost.append({"name": stage.name, "seconds": round(seconds, 3)})
            tally["dropped"] = dict(sorted(tally["dropped"].items()))
            tally["dropped_characters"] = dict(sorted(tally["dropped_characters"].items()))
            tally["samples"] = dict(sorted(tally["samples"].items()))
            stages.append({"name": stage.name, "options": stage.options, **tally})
        counts = {name: getattr(self, name) for name in ("documents", "kept", "dropped", "quarantined")}
        return {**counts, "stages": stages, "cost": cost, "inputs": self.inputs, "job": self.job}

    def write(self, output: Path, work: Path) -> None:
        """Publish report.html, then report.json, which says that the job is done; made in the folder `work`."""
        publish(output / PAGE_NAME, page(self.plain()), work)
        publish(output / JSON_NAME, json.dumps(self.plain(), indent=1, ensure_ascii=False) + "\n", work)

    @classmethod
    def read(cls, output: Path) -> Report:
        """The report of a job that is done. Raises DataError."""
        path = output / JSON_NAME
        try:
            content = json.loads(path.read_bytes())
            stages = []
            for stage, cost in zip(content["stages"], content["cost"], strict=True):
                tally = StageTally()
                tally.add(stage | cost)
                stages.append(StageReport(stage["name"], stage["options"], tally))
            return cls(content["job"], stages, content["inputs"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no report of the refinery: {error}; --overwrite begins anew") from None


def gather(
    stages: Sequence[Stage], finished: Sequence[Sequence[Path]], job: dict[str, Any], inputs: list[dict[str, Any]]
) -> Report:
    """The report of a job out of the unit files of its passes."""
    tallies = {READ: StageTally(), **{str(number): StageTally() for number in range(len(stages))}}
    for units in finished:
        for unit in units:
            for name, tally in open_unit(unit).head["tallies"].items():
                tallies[name].add(tally)
    reports = [StageReport(READ, {}, tallies[READ])]
    for number, stage in enumerate(stages):
        reports.append(StageReport(stage.name, dataclasses.asdict(stage), tallies[str(number)]))
    return Report(job, reports, inputs)
