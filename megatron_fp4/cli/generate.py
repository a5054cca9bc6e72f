"""`megatron-fp4 generate RUN --prompt "def "`: continue a text with the weights of a run.

One process, whatever layout wrote the checkpoint; the evaluation precision of the run (interop/generate.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_fp4.cli.compose import load_run_config
from megatron_fp4.interop.generate import TextGenerator


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 2 where run, checkpoint or tokenizer are not there."""
    parser = argparse.ArgumentParser(prog="megatron-fp4 generate", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory (train.run_dir)")
    parser.add_argument("--prompt", action="append", help="text to continue; may be given several times")
    parser.add_argument("--tokens", type=int, default=60, help="tokens to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=40)
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        generator = TextGenerator(load_run_config(args.run), args.step)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for prompt in args.prompt or ["import os\n", "def main(", '"""Return the']:
        print(f"--- {prompt!r}")
        print(prompt + generator.continuation(prompt, args.tokens, args.temperature, args.top_k, args.seed))
    return 0
