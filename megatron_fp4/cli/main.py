"""`megatron-fp4 COMMAND ARGUMENTS`: finds the command and calls its `main(arguments) -> exit code`."""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from megatron_fp4.comm.bootstrap import exit_process

COMMANDS = {
    "pretrain": ("megatron_fp4.cli.pretrain", "train a model (under torchrun or srun for several ranks)"),
    "data": ("data_tools.cli", "text to shards, and what is in them (tokenize, inspect, verify, blend, ledger, ...)"),
    "status": ("megatron_fp4.cli.operate.status", "how a run stands: alive, step, loss, ETA, last save, last event"),
    "report": ("megatron_fp4.cli.report", "loss curves and held-out losses of runs; bit-for-bit comparison"),
    "study": ("megatron_fp4.cli.study.command", "does a claim hold: arms x seeds, paired by seed, with intervals"),
    "explain": ("megatron_fp4.cli.explain", "every setting: meaning, unit, default, bounds, may a resume change it"),
    "plan": ("megatron_fp4.cli.planning.plan", "parameters, memory, time and traffic of a run, without a GPU"),
    "rehearse": (
        "megatron_fp4.cli.planning.rehearse",
        "one real step of any rank of any layout, on tensors without memory",
    ),
    "verify-parallel": ("megatron_fp4.cli.verify_parallel", "prove that a layout computes the numbers of one process"),
    "preflight": ("megatron_fp4.cli.preflight", "try on these machines what a run will need, before it starts"),
    "selftest": (
        "megatron_fp4.cli.selftest",
        "whether each backend computes what it should on every GPU of this machine",
    ),
    "crosscheck": ("megatron_fp4.cli.crosscheck", "Transformer Engine or our kernels against the emulation, by code"),
    "env": ("megatron_fp4.cli.env", "versions and hardware, to paste into a bug report"),
    "checkpoint": ("megatron_fp4.cli.checkpoint", "inspect, verify, average, extract, export and rewind checkpoints"),
    "verify-resume": ("megatron_fp4.cli.verify_resume", "prove that a killed run goes on as if nothing had happened"),
    "health": (
        "megatron_fp4.cli.trained.health",
        "whether quantization makes weight gradients exactly zero, where, and the rule that helps",
    ),
    "replay": (
        "megatron_fp4.cli.trained.replay",
        "run again from a checkpoint to a step whose loss spiked, also in BF16",
    ),
    "evaluate": ("megatron_fp4.cli.trained.evaluate", "held-out loss of a trained model, in one precision or another"),
    "eval-harness": (
        "megatron_fp4.cli.trained.eval_harness",
        "the tasks of lm-eval, asked of a trained model in any precision",
    ),
    "generate": ("megatron_fp4.cli.trained.generate", "continue a text with a trained checkpoint"),
}


def usage() -> str:
    lines = ["usage: megatron-fp4 COMMAND [arguments]", ""]
    lines += [f"  {name:<16} {text}" for name, (_, text) in COMMANDS.items()]
    lines += ["", "exit codes:", "  0 done, 2 refused, others: megatron-fp4 COMMAND --help", "", "example:"]
    lines += ["  megatron-fp4 pretrain experiment=quickstart parallel.tp=1"]
    return "\n".join(lines)


def run(arguments: Sequence[str]) -> int:
    """Dispatch; returns the exit code (2 for an unknown command)."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, rest = arguments[0], list(arguments[1:])
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"error: unknown command {name!r}{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    return int(importlib.import_module(COMMANDS[name][0]).main(rest))


def main() -> None:
    """Console entry."""
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()  # here a reader that has left is noticed
    except SystemExit as end:  # argparse has said why
        code = end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except BaseException:
        traceback.print_exc()
        code = 1
    exit_process(code)


if __name__ == "__main__":
    main()
