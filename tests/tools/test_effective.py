"""tools/bench/effective.py, for moments: a rank is killed, the run goes on, and what counts is counted once."""

import json
import os
import subprocess
import sys

from tiny_run import TOOLS


def test_a_fault_is_seen_from_the_kill_to_the_next_step(tmp_path):
    command = [sys.executable, str(TOOLS / "bench" / "effective.py"), "--minutes", "0.1", "--kill-every", "0.02"]
    done = subprocess.run(
        [*command, "--launcher", "torchrun", "--save-interval", "2", "--output", str(tmp_path / "found.json")],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    (fault,) = found["faults"]
    parts = ("until all are gone", "until the ranks are started", "until their first step")
    assert all(fault[part] > 0 for part in parts) and abs(sum(fault[part] for part in parts) - fault["in all"]) < 1e-6
    assert fault["until their first step"] > 0.5, "ranks do not start in no time"
    assert found["summary"] in done.stdout
    assert found["useful_steps"] > 0 and 0 < found["effective"] < found["effective_from_the_first_step"] < 1
