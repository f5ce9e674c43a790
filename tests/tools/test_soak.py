"""Random kills of a training job, a handful; `tools/bench/soak.py --kills 200` is the same for as long as one likes."""

import json
import os
import subprocess
import sys

from tiny_run import TOOLS


def test_no_acknowledged_checkpoint_is_lost_to_a_kill(tmp_path):
    command = [sys.executable, str(TOOLS / "bench" / "soak.py"), "--kills", "4", "--cases", "0", "1"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "soak.json")],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "soak.json").read_text())
    assert told["total"]["kills"] == 4 and told["total"]["checks"] > 0 and not told["failures"]
    assert told["total"]["runs"] >= 2, "each case comes through, with the losses of an undisturbed run"
