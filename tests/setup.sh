# shellcheck shell=bash
# Sourced by launch/quickstart.sh and tests/run.sh: make .venv if it is not there (or older than pyproject.toml or the
# constraints), and put it on PATH. Set MEGATRON_FP4_VENV to use another folder; PYTHON for the interpreter (3.11 or newer).
# A checkout whose path has a space gets its environment under ~/.cache: torch 2.13 calls the C++ compiler with its own
# install path unquoted, so its compiler cannot work from such a path.
venv="${MEGATRON_FP4_VENV:-$PWD/.venv}"
case "$venv" in
  *[[:space:]]*) venv="${XDG_CACHE_HOME:-$HOME/.cache}/megatron_fp4/venv-$(printf %s "$PWD" | cksum | cut -d' ' -f1)" ;;
esac
stamp="$venv/.installed-${extras:=test}"
constraints=tests/constraints.txt # the exact set that CI tests
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ "$constraints" -nt "$stamp" ]; then
  python="${PYTHON:-python3}"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed, $("$python" --version) found; set PYTHON=/path/to/python3.11" >&2; exit 2; }
  torch=$(grep '^torch==' "$constraints")
  echo "installing into $venv (a few minutes): $torch, then this package and what its extra '$extras' names in pyproject.toml ..."
  mkdir -p "$(dirname "$venv")"
  [ -d "$venv" ] || "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --upgrade pip
  # --no-compile: of twenty thousand files a tenth is ever imported, and compiled then
  "$venv/bin/python" -m pip install --quiet --no-compile "$torch" # first and exact, so that nothing below pulls another build
  "$venv/bin/python" -m pip install --quiet --no-compile --constraint "$constraints" --editable ".[$extras]"
  if [ "$extras" = test ]; then # an older transformers beside it, for tests/interop/export/test_older_transformers.py
    "$venv/bin/python" -m pip install --quiet --no-compile --no-deps --upgrade --target "$venv/transformers-4.57" \
      "transformers==4.57.*" "huggingface-hub>=0.34,<1" "tokenizers==0.22.*" ||
      echo "warning: transformers 4.57 could not be installed; the test that reads exports with it is skipped" >&2
  fi
  touch "$stamp"
fi
export PATH="$venv/bin:$PATH" PYTHONNOUSERSITE=1 MEGATRON_FP4_PYTHON="$venv/bin/python"
