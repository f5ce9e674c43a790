"""Settings all tests share."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption(
        "--seed", type=int, default=None, help="what random samples are drawn from; default: each test's own"
    )
    parser.addoption("--fuzz", type=int, default=5000, help="damaged inputs a reader of files is given")
