#!/usr/bin/env bash
# The tests of megatron_fp4/kernels: interpreted on the CPU for the bits, then compiled for GPUs for the instructions.
# Installs Triton (250 MB, once) beside the environment of tests/setup.sh, where no other test sees it.
# Usage: tests/kernels/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=tests/setup.sh
source tests/setup.sh
version=3.8.0
folder="$(dirname "$(dirname "$MEGATRON_FP4_PYTHON")")/triton-$version"
if [ ! -d "$folder" ]; then
  echo "installing triton $version into $folder ..."
  "$MEGATRON_FP4_PYTHON" -m pip install --quiet --no-deps --target "$folder.part" "triton==$version"
  mv "$folder.part" "$folder"
fi
export PYTHONPATH="$PWD:$folder${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
compiled=$(mktemp)
trap 'rm -f "$compiled"' EXIT
TRITON_INTERPRET=0 python -m pytest tests/kernels "$@" >"$compiled" 2>&1 & # at once: each uses one core
status=0
TRITON_INTERPRET=1 python -m pytest tests/kernels -W "ignore::RuntimeWarning" "$@" || status=$? # 1 / 0 is meant there
wait $! || status=$?
cat "$compiled"
exit "$status"
