"""Runs killed at many of their moments, and then another job in the same folder: never a mix of the two.

A script: copies are made of its process, which has no threads.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import shutil
import signal
import sys
from pathlib import Path

import test_job  # beside this one

from megatron_lite.data.refine.job import RefineJob, refine
from megatron_lite.errors import DataError

OTHER_RECIPE = "stages: [length: {min_words: 5}, exact_duplicates]"
CHANGES = ("mkdir", "replace", "rmdir", "unlink")
"""Calls that change a folder: before each the process may be killed."""
STRIDE = 7
"""Of the moments of a run, every seventh is one at which it is killed."""


def jobs_of(folder: Path, output: Path) -> dict[str, RefineJob]:
    """A job, one of another recipe that keeps nothing of what it drops, and one of another input."""
    one = test_job.job_of(folder / "a.jsonl", output, unit_bytes=9000)
    other = test_job.job_of(folder / "a.jsonl", output, OTHER_RECIPE, unit_bytes=9000, save_dropped=False)
    return {"one": one, "recipe": other, "input": dataclasses.replace(one, inputs=(str(folder / "b.jsonl"),))}


def killed_at(moment: int, job: RefineJob) -> bool:
    """Run a job in a copy of this process that is killed before the change of that number; whether it was."""
    pid = os.fork()
    if pid == 0:
        numbers = itertools.count(1)

        def change(done, *arguments, **options):
            if next(numbers) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return done(*arguments, **options)

        for name in CHANGES:
            setattr(os, name, functools.partial(change, getattr(os, name)))
        refine(job)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def contents(output: Path) -> dict[str, str]:
    found = test_job.contents(output)
    assert not (output / ".work").exists()
    return found


def try_all(folder: Path) -> None:
    """Kill a job at each of some moments, and see what others, and it, make of what is left."""
    expected = {}
    for name in ("one", "recipe", "input"):
        refine(jobs_of(folder, folder / name)[name])
        expected[name] = contents(folder / name)
    output, ends = folder / "out", []
    jobs = jobs_of(folder, output)
    for moment, other in zip(itertools.count(1, STRIDE), itertools.cycle(("recipe", "input", "input", "recipe"))):
        overwrites = moment % 2 == 0
        shutil.rmtree(output, ignore_errors=True)
        if overwrites:
            shutil.copytree(folder / other, output)
        if not killed_at(moment, dataclasses.replace(jobs["one"], overwrite=overwrites)):
            break
        for name, anew in ((other, False), ("one", False), (other, True)):
            try:
                refine(dataclasses.replace(jobs[name], overwrite=anew))
            except DataError as error:
                assert "is of another job" in str(error) and not anew, error
                ends.append("refused")
            else:
                assert contents(output) == expected[name], (moment, other, name)
                ends.append("done")
    assert ends.count("done") > 20 and ends.count("refused") > 8, ends


if __name__ == "__main__":
    os.fsync = lambda file: None  # a killed process needs no disk
    try_all(Path(sys.argv[1]))
