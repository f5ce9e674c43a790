#!/usr/bin/env bash
# Runs every check from a fresh clone: style, import walls, tests. Arguments go to pytest.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source tools/environment.sh
environment_ensure test || exit

# Elsewhere tests that need more than Python are skipped, and say what they miss.
if [ "${CI:-}" = true ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    timeout 300 bash tests/cluster/install.sh || echo "tests of clusters will be skipped: their packages could not be installed" >&2
fi

status=0
ruff check . || status=1
lint-imports || status=1
python -m pytest --durations=15 "$@" || status=$?
exit "$status"
