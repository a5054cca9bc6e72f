"""`megatron-fp4 study STUDY`: does a claim hold? Arms x seeds of an experiment, paired by seed, with intervals.

STUDY is a YAML file, or the name of one in configs/study (docs/studies.md). The same command goes on where a study was
stopped, and does only what is missing. Settings after STUDY go to every run, behind the study's own base.
--gradients asks a sharper question in seconds: how far each arm's gradient and loss are from the first arm's on equal
weights (--weights RUN takes trained ones) and batches; claims on those are judged by it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_fp4.cli.arguments import CommandParser, above_zero, returns_code
from megatron_fp4.cli.study.gradients import gradients_of, known_gradients, with_weights
from megatron_fp4.cli.study.read import find_study, read_study
from megatron_fp4.cli.study.runs import StudyRun, check_arms, compose_arms, results_of, run_all, runs_of
from megatron_fp4.storage.local import local_path, local_text
from megatron_fp4.studies.design import Study
from megatron_fp4.studies.measures import ArmResult, GradientError
from megatron_fp4.studies.outcome import StudyOutcome, conclude
from megatron_fp4.train.faults.signals import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REQUEUE

EXITS = {
    0: "complete, whatever the claims came to",
    EXIT_REQUEUE: "stopped on request; the same command goes on",
    EXIT_INTERRUPTED: "stopped by Ctrl-C; the same command goes on",
    EXIT_FAILED: "a run failed; the others were made",
}


@returns_code
def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = CommandParser("study", __doc__, EXITS, "recipe_small --jobs 2")
    parser.add_argument("study", type=local_text, help="a YAML file, or the name of one in configs/study")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run, as seq_length")
    parser.add_argument("--out", type=local_path, default=None, help="folder of runs and results (studies/NAME)")
    parser.add_argument("--jobs", type=above_zero, default=1, help="runs at a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="instead of the study's")
    parser.add_argument(
        "--config-dir", action="append", type=local_path, default=[], help="a folder laid out like configs/"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--list", action="store_true", help="print a command for each missing run, and end")
    only.add_argument("--show", action="store_true", help="conclude from the results that there are, and end")
    only.add_argument(
        "--gradients", action="store_true", help="compare the arms' gradients on one batch a seed; trains nothing"
    )
    parser.add_argument("--draws", type=above_zero, default=4, help="of noise on each batch, with --gradients")
    parser.add_argument("--weights", metavar="RUN", default=None, help="of a run or checkpoint, with --gradients")
    parser.add_argument("--arms", nargs="+", default=None, help="make the runs of these alone; the page has all")
    args = parser.parse(arguments)
    try:
        study = read_study(find_study(args.study))
        study = replace(study, base=[*study.base, *args.overrides], seeds=args.seeds or study.seeds)
        trees = compose_arms(study, args.config_dir)
        if unknown := set(args.arms or ()) - set(study.arms):
            raise ValueError(f"--arms {', '.join(sorted(unknown))}; {study.name} has {', '.join(study.arms)}")
        runs = runs_of(study, trees)
        if not args.show:
            check_arms(trees)
        root = args.out or Path("studies") / study.name
        at = trees if args.weights is None else with_weights(trees, args.weights)
        if args.gradients:
            return _print_gradients(Asked(study, root, runs, gradients_of(root, study, at, args.draws)))
        asked = Asked(study, root, runs, known_gradients(root, study, at, args.draws))
        chosen = [run for run in runs if run.arm in (args.arms or study.arms)]
        return _study(asked, chosen, args.jobs, only_list=args.list, only_show=args.show)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


@dataclass(frozen=True)
class Asked:
    """A study, where it lies, all of its runs, and what was measured of its gradients."""

    study: Study
    root: Path
    runs: Sequence[StudyRun]
    gradients: Sequence[GradientError]

    @property
    def results(self) -> list[ArmResult]:
        """The results that there are by now."""
        return results_of(self.root, self.runs)


def _study(asked: Asked, runs: Sequence[StudyRun], jobs: int, *, only_list: bool, only_show: bool) -> int:
    """Make `runs`, those of the arms that were asked for."""
    study, root = asked.study, asked.root
    done = {result.key for result in asked.results}
    missing = [run for run in runs if run.key not in done]
    if only_list:
        for run in missing:
            print(run.shell(root))
        return 0
    codes: set[int | None] = set()
    if not only_show:
        print(f"study {study.name}: {len(runs)} runs, {len(runs) - len(missing)} of them done, in {root}", flush=True)
        for number, (run, code) in enumerate(run_all(root, missing, jobs), 1):
            codes.add(code)
            print(f"  {number} of {len(missing)}: {run.name} {_told(run, code, root)}", flush=True)
    outcome = _conclude(asked)
    if only_show or codes <= {0}:
        return 0 if outcome is not None else 2
    stopped = codes & {EXIT_INTERRUPTED, EXIT_REQUEUE}
    return max(code for code in stopped if code is not None) if stopped else EXIT_FAILED


def _told(run: StudyRun, code: int | None, root: Path) -> str:
    if code is None:
        return "not started"
    if code in (EXIT_REQUEUE, EXIT_INTERRUPTED):
        return "stopped; the same command goes on"
    return "done" if code == 0 else f"FAILED with exit code {code}: {run.log(root)}"


def _print_gradients(asked: Asked) -> int:
    from megatron_fp4.cli.study.show import gradients_page  # here: it draws

    print(gradients_page(conclude(asked.study, asked.results, asked.gradients)))
    return 0


def _conclude(asked: Asked) -> StudyOutcome | None:
    """Print and write what the results say; None where there are none."""
    from megatron_fp4.cli.study.show import as_markdown, write_outcome  # here: it draws

    study, root = asked.study, asked.root
    results = asked.results
    if not results:
        print(f"no run of {study.name} is complete in {root}", file=sys.stderr)
        return None
    outcome = conclude(study, results, asked.gradients)
    write_outcome(outcome, results, root)
    print("\n" + as_markdown(outcome))
    print(f"page: {root / 'study.html'}")
    return outcome
