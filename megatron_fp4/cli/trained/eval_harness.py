"""`megatron-fp4 eval-harness RUN --tasks arc_easy,hellaswag --precision bf16 --precision same`: lm-eval judges a run.

The tasks of lm-eval 0.4 (pip install 'megatron-fp4[judge]'), asked of the trained model itself, in each precision: no
export is needed. In one process, or under torchrun on the run's tp * pp ranks; on more ranks, copies of the model share
the questions. `exported` computes with the weights of a 4-bit export. Where activations are
quantized, questions are asked one by one: the scale of a tensor covers all that is in it, so an answer would depend on
the questions beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from megatron_fp4.cli.arguments import CommandParser
from megatron_fp4.cli.trained.opening import add_choice, with_trained
from megatron_fp4.inference.generate import TextGenerator
from megatron_fp4.inference.lead import Led
from megatron_fp4.inference.model import RowModel
from megatron_fp4.inference.precisions import table_of
from megatron_fp4.storage.local import local_path, local_text
from megatron_fp4.train.open import TrainedModel

Results = dict[str, dict[str, Any]]
"""Precision -> task -> what lm-eval found."""

EXITS = {0: "done", 1: "failed"}


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 2 where run, tasks, precision or lm-eval are not there."""
    args = parse(arguments)
    if find_spec("lm_eval") is None:
        print("error: eval-harness needs lm-eval: pip install 'megatron-fp4[judge]'", file=sys.stderr)
        return 2
    return with_trained(args, lambda trained: judge(trained, args), documents_apart=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments of the command."""
    parser = CommandParser("eval-harness", __doc__, EXITS, "runs/mine --tasks arc_easy,hellaswag --precision same")
    add_choice(parser)
    parser.add_argument("--tasks", required=True, help="names, separated by commas")
    parser.add_argument("--include-path", type=local_text, help="a folder with task files of your own")
    parser.add_argument("--precision", action="append", help="bf16, same, exported or a recipe (several times)")
    parser.add_argument("--num-fewshot", type=int, help="examples before each question (default: the task's)")
    parser.add_argument("--limit", type=float, help="questions of each task; below 1: this part of them")
    parser.add_argument("--gen-kwargs", help="generation settings, such as max_gen_toks=64")
    parser.add_argument(
        "--bos", action="store_true", help="begin texts with the tokenizer's bos, as no shard of ours does"
    )
    parser.add_argument("--batch", type=int, default=16, help="rows at once, where no activation is quantized")
    parser.add_argument("--no-cache", action="store_true", help="compute the whole text anew for every token")
    parser.add_argument("--output", type=local_path, help="a .json for the results, by precision and task")
    return parser.parse_args(arguments)


def judge(trained: TrainedModel, args: argparse.Namespace) -> None:
    """Print the table, and write the results. Collective over the ranks of the model. Raises ValueError on rank 0."""
    tables = {name: table_of(trained, name) for name in args.precision or ["bf16", "same"]}
    model = RowModel(trained, batch=args.batch, cache=not args.no_cache)
    generator = TextGenerator(trained, model)
    functions: dict[str, Callable[..., Any]] = {
        "compute_in": lambda name: model.compute_in(tables[name]),
        "score": model.score,
        "complete": generator.complete,
    }
    led = Led(functions, trained.mesh.world)
    if not trained.mesh.is_main:
        led.follow()
        return
    try:
        results: Results = {}
        for precision in tables:
            led.call("compute_in", precision)
            results[precision] = _ask(led, trained, generator, args)
        print(_table(results))
        if args.output:
            args.output.write_text(json.dumps(results, indent=1, default=str) + "\n")
    finally:
        led.release()


def _ask(led: Led, trained: TrainedModel, generator: TextGenerator, args: argparse.Namespace) -> dict[str, Any]:
    """What lm-eval finds, task by task. Raises ValueError for a task that it does not have."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from megatron_fp4.inference.harness import HarnessModel

    tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    manager = TaskManager(include_path=args.include_path, include_defaults=False) if args.include_path else None
    if manager is None or not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=args.include_path)
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise ValueError(f"lm-eval has no task {', '.join(unknown)}; name those of --include-path by their `task:`")
    answer = simple_evaluate(
        model=HarnessModel(led, generator.tokenizer, trained.checked.config.data.seq_length, bos=args.bos),
        tasks=tasks,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        gen_kwargs=args.gen_kwargs,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=1000,
    )
    results: dict[str, Any] = answer["results"]
    return results


def _table(results: Results) -> str:
    """A line per task and metric, a column per precision; a standard error stands behind its value."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for precision, tasks in results.items():
        for task, metrics in tasks.items():
            for key, value in metrics.items():
                metric, _, _ = key.partition(",")
                if isinstance(value, int | float) and "," in key and not metric.endswith("_stderr"):
                    error = metrics.get(key.replace(metric, f"{metric}_stderr", 1))
                    spread = f" ±{error:.4f}" if isinstance(error, float) else ""
                    rows.setdefault((task, metric), {})[precision] = f"{value:.4f}{spread}"
    width = max((len(task) + len(metric) for task, metric in rows), default=0) + 4
    lines = [" " * width + "".join(f"{precision:>20}" for precision in results)]
    lines += [
        f"{task}  {metric}".ljust(width) + "".join(f"{cells.get(precision, '-'):>20}" for precision in results)
        for (task, metric), cells in rows.items()
    ]
    return "\n".join(lines)
