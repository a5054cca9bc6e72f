#!/usr/bin/env bash
# A smoke (smoke.py) on the oldest and the newest torch that pyproject.toml allows, or on the versions given, each in an
# environment of its own, which is kept. A version that the index has for CUDA only is 4 GB of wheels.
# Usage: tests/versions/run.sh [VERSION ...]
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- 2.11.0 2.14.1
folder="${MEGATRON_FP4_VERSIONS:-$PWD/.versions}"
export PYTHONNOUSERSITE=1 OMP_NUM_THREADS=1 PYTHONPATH="$PWD"
for version in "$@"; do
  venv="$folder/$version"
  if [ ! -f "$venv/.installed" ]; then
    echo "installing torch $version and this package into $venv ..."
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet "torch==$version"
    sed "s/^torch==.*/torch==$version/; /^triton==/d" tests/constraints.txt >"$venv/constraints.txt"
    "$venv/bin/python" -m pip install --quiet --constraint "$venv/constraints.txt" --editable .
    touch "$venv/.installed"
  fi
  "$venv/bin/python" -m tests.versions.smoke
done
