"""The script that makes the environment, with stand-ins for Python, pip and the GPU: nothing is installed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Writes down what pip is asked for; torch is missing, and the index offers $INDEX_HAS.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
    "-c import torch") exit 1 ;;
    *--report*) printf '{"version": "%s"}' "$INDEX_HAS" ;;
    *--dry-run*) exit "${CPU_INDEX_STATUS:-0}" ;;
    *--editable*) echo "$*" >>asked; exit "${INSTALL_STATUS:-0}" ;;
    *) echo "$*" >>asked ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout with a virtual environment whose Python is a stand-in."""
    for name in ("setup.py", "tests/constraints.txt", "tools/environment.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    programs = tmp_path / "programs"
    programs.mkdir()
    for path, text in (
        (tmp_path / ".venv/bin/python", FAKE_PYTHON),
        (programs / "nvidia-smi", '#!/bin/bash\nprintf "%s" "$GPUS"\n'),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return tmp_path


def ensure(checkout: Path, extra: str = "", **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """What `environment_ensure` says, and what it asked pip for."""
    asked = checkout / "asked"
    asked.unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", "-c", f"source tools/environment.sh; environment_ensure {extra} && echo PATH=$PATH"],
        cwd=checkout,
        env={"PATH": f"{checkout}/programs:/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
    )
    return done, asked.read_text().splitlines() if asked.exists() else []


def test_a_second_time_installs_nothing_and_a_changed_requirement_does(checkout):
    done, asked = ensure(checkout, INDEX_HAS="2.13.0+cpu")
    assert done.returncode == 0, done.stderr
    assert f"PATH={checkout.resolve()}/.venv/bin:" in done.stdout
    assert "--constraint tests/constraints.txt --editable ." in asked[-1]
    assert ensure(checkout)[1] == []
    with open(checkout / "tests/constraints.txt", "a") as file:
        file.write("numpy==2.0.0\n")
    assert len(ensure(checkout, INDEX_HAS="2.13.0+cpu")[1]) == len(asked)


def test_an_extra_is_installed_once_and_serves_those_who_need_none(checkout):
    ensure(checkout, INDEX_HAS="2.13.0+cpu")
    assert "--editable .[test]" in ensure(checkout, "test", INDEX_HAS="2.13.0+cpu")[1][-1]
    assert ensure(checkout, "test")[1] == []
    assert ensure(checkout)[1] == []


@pytest.mark.parametrize(
    ("environment", "said", "from_cpu_index"),
    [
        ({"INDEX_HAS": "2.13.0+cpu"}, "no GPU: installing the CPU build of torch==", False),
        ({"INDEX_HAS": "2.13.0"}, "no GPU: installing the CPU build of torch==2.13.0 from https", True),
        ({"INDEX_HAS": "2.13.0", "CPU_INDEX_STATUS": "1"}, "installing the standard build (several GB)", False),
        ({"INDEX_HAS": "2.13.0+cpu", "GPUS": "GPU 0: some\n"}, "NVIDIA GPU found: installing torch==", False),
    ],
)
def test_which_torch_is_installed_is_said(checkout, environment, said, from_cpu_index):
    done, asked = ensure(checkout, **environment)
    assert said in done.stderr
    (torch,) = [line for line in asked if "torch==" in line]
    assert ("--index-url" in torch) == from_cpu_index


def test_a_failed_installation_leaves_no_stamp(checkout):
    done, _ = ensure(checkout, INDEX_HAS="2.13.0+cpu", INSTALL_STATUS="1")
    assert done.returncode == 1
    assert "the installation failed" in done.stderr
    assert ensure(checkout, INDEX_HAS="2.13.0+cpu")[1]


def test_without_a_fitting_python_the_way_out_is_said(checkout):
    (checkout / ".venv/bin/python").unlink()
    for name in ("python3", "python3.12", "python3.11", "python"):
        program = checkout / "programs" / name
        program.write_text("#!/bin/bash\necho Python 3.9.1; exit 1\n")
        program.chmod(0o755)
    done, _ = ensure(checkout)
    assert done.returncode == 2
    assert "Python 3.11 or 3.12 is needed" in done.stderr
    assert "PYTHON=/path/to/python3.12" in done.stderr
