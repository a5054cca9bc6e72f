#!/usr/bin/env bash
# Set-up (if not done), then format, lint, types, the contract of the floors, and the tests.
# Usage: tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # many ranks on few cores thrash otherwise

ruff format --check --quiet .
ruff check --quiet .
mypy
lint-imports
exec python -m pytest --numprocesses auto --dist worksteal "$@" # a worker per core; neighbours share set-ups
