#!/bin/bash
# The slurm tests with everything they need: installs slurm (Debian, root), starts a cluster, runs, stops it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
tests/slurm/launch_cluster.sh install
python=python3
if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; fi
MEGATRON_FP4_SLURM=1 "$python" -m pytest tests/slurm "$@"
