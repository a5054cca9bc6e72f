#!/bin/bash
# The slurm tests with everything they need: installs slurm (Debian, root), starts a cluster, runs them, stops it.
#
#   tests/slurm/run.sh [--or-skip] [pytest arguments]
#
# --or-skip: a machine that cannot have slurm is no failure; one line says why. Failed tests always are one.
# Every wait is bounded, and the whole by the time-out below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
cluster=tests/slurm/launch_cluster.sh
cannot=3 # launch_cluster.sh install: this machine cannot have slurm
or_skip=0
if [[ ${1:-} == --or-skip ]]; then or_skip=1 && shift; fi

status=0
reason=$("$cluster" install) || status=$?
if ((status == cannot && or_skip)); then
  echo "slurm tests: SKIPPED on this machine: $reason"
  exit 0
elif ((status)); then
  echo "tests/slurm/run.sh: $reason" >&2
  exit "$status"
fi
# shellcheck source=tests/setup.sh
source tests/setup.sh

base=$(mktemp -d -t slurm-tests.XXXXXX)
finish() {
  status=$?
  "$cluster" stop "$base"
  if ((status)); then
    echo "tests/slurm/run.sh: failed ($status); the last lines of every log in $base/log:" >&2
    tail -n 60 "$base"/log/* >&2 || true
  else
    rm -rf "$base"
  fi
  exit "$status"
}
trap finish EXIT
trap 'exit 143' TERM INT
"$cluster" start "$base"
export MEGATRON_FP4_SLURM=$base OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
timeout --kill-after=30 1500 python -m pytest tests/slurm "$@"
