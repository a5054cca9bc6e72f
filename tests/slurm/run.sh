#!/bin/bash
# The slurm tests with everything they need: installs slurm (Debian, root), starts a cluster, runs, stops it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
tests/slurm/launch_cluster.sh install
# shellcheck source=tests/setup.sh
source tests/setup.sh
MEGATRON_FP4_SLURM=1 python -m pytest tests/slurm "$@"
