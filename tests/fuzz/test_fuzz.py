"""Files of others, damaged: an error that users see, or valid data; never a crash, a hang or runaway memory.

`--fuzz N` gives each reader N inputs instead of 5,000, `--seed S` others than by default.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.mutations import as_json, mutated_bytes, mutated_json, mutated_text
from fuzz.targets import TARGETS

HOLD = Path(__file__).with_name("hold.py")


@pytest.mark.parametrize("target", TARGETS)
def test_a_damaged_file_is_refused_or_read(target, tmp_path, pytestconfig):
    count, first = pytestconfig.getoption("--fuzz"), 10**6 * (pytestconfig.getoption("--seed") or 0)
    command = [sys.executable, str(HOLD), target, str(first), str(count), str(tmp_path)]
    environment = {**os.environ, "RUST_BACKTRACE": "0"}
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=environment, timeout=60 + count
    )
    at = (tmp_path / "at").read_text().strip()
    ended = f"exit code {done.returncode} at input {at} of {target}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, ended
    read, refused = map(int, re.search(r"(\d+) read, (\d+) refused", done.stdout).groups())
    assert read + refused == count
    # Damage that nobody can miss, and damage that leaves a file sound, both happen.
    assert refused > count // 20 and read > 0


def test_damage_follows_from_its_seed_and_is_damage():
    content = {"a": [1, 2, {"b": "text"}], "c": {"d": None}}
    for mutate, whole in (
        (mutated_bytes, bytes(range(64))),
        (mutated_text, b"a: 1\nb: 2\nc: 3\n"),
        (mutated_json, content),
    ):
        first, again = ([mutate(whole, random.Random(seed)) for seed in range(200)] for _ in range(2))
        assert first == again
        assert sum(changed != whole for changed in first) > 180
        assert len({str(changed) for changed in first}) > 100
    assert content == {"a": [1, 2, {"b": "text"}], "c": {"d": None}}, "the original is left alone"
    assert len({as_json(content, random.Random(seed)) for seed in range(200)}) > 3
