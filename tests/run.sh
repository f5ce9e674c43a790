#!/usr/bin/env bash
# Runs every check from a fresh clone: style, import walls, tests. Arguments go to pytest.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source tools/environment.sh
environment_ensure test || exit

status=0
ruff check . || status=1
lint-imports || status=1
python -m pytest --durations=15 "$@" || status=$?
exit "$status"
