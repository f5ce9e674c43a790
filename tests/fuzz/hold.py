"""`python hold.py TARGET FIRST COUNT FOLDER`: feed a target its inputs, with bounded memory, and say what went wrong.

Which input is being read is written to FOLDER/at before it is read, so that a crash or a hang has a number.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.targets import TARGETS

from megatron_lite import log

MEMORY = 2 << 30
"""Bytes an input may ask for beyond what the libraries have taken."""
SECONDS = 60
"""That one input may take."""
MOST_FAILURES = 5


def main(name: str, first: int, count: int, folder: Path) -> int:
    faulthandler.enable()
    log.once = lambda text: None
    log.warn = lambda text: None
    place = os.open(folder / "at", os.O_RDWR | os.O_CREAT)
    failures = read = 0
    waiting = iter(range(first, first + count))

    def seeds() -> Iterator[int]:
        for seed in waiting:
            os.pwrite(place, b"%12d" % seed, 0)
            if seed % 100 == first % 100:
                faulthandler.dump_traceback_later(100 * SECONDS, exit=True)
            yield seed

    while failures < MOST_FAILURES:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            inputs = TARGETS[name](Path(scratch), seeds())
            try:
                limited = False
                for taken_in in inputs:
                    read += taken_in
                    if not limited:
                        # Libraries are loaded now.
                        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
                        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))
                        limited = True
                print(f"{read} read, {count - read - failures} refused")
                return failures
            except BaseException as error:  # a Rust panic is no Exception
                if isinstance(error, KeyboardInterrupt):
                    raise
                failures += 1
                at = os.pread(place, 12, 0).decode().strip()
                print(f"--- {name}, input {at}:\n{''.join(traceback.format_exception(error, limit=-6))}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
