#!/usr/bin/env bash
# Lint and the whole test suite, with the environment made first if it is not there: ./run_tests.sh [PYTEST ARGUMENTS]
# Environment variable: PYTHON, the Python (3.10 to 3.13) that makes .venv. Exit code: that of what failed first.
# Up to four tests at a time, one per core; -n 0 among the arguments: one after the other.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")"
trap 'echo "run_tests.sh: the command above failed; nothing after it was run" >&2' ERR

export OMP_NUM_THREADS=1 # on busy cores two threads of torch can be slower than one
export HF_HUB_OFFLINE=1  # no test may need a network
export MPLBACKEND=Agg    # plots go to files

"${PYTHON:-python3}" setup_environment.py --extras data eval filters web dev
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
