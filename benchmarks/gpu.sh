#!/usr/bin/env bash
# Everything that one GPU can show, once, in under eight minutes; a table with card and date comes out (benchmarks/gpu.py).
# Usage: benchmarks/gpu.sh [--out FOLDER] [--only SECTION]
#   MEGATRON_FP4_PYTHON  the interpreter, with torch (2.11 or newer) and triton (3.6 or newer); default: python3
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${MEGATRON_FP4_PYTHON:-python3}" -m benchmarks.gpu "$@"
