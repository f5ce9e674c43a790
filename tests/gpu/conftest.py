"""Tests that need a GPU: skipped without one, or run with tiny sizes on the CPU by --on-cpu, to test the tests."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--on-cpu", action="store_true", help="run tests/gpu on the CPU, where they can run at all")


@pytest.fixture(scope="session")
def device(request) -> str:
    if torch.cuda.is_available():
        return "cuda"
    # Unknown unless this folder was named on pytest's command line.
    if not request.config.getoption("--on-cpu", default=False):
        pytest.skip("no CUDA device")
    return "cpu"
