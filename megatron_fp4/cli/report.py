"""`megatron-fp4 report RUN [RUN ...] --html out.html`: the curves of one run, or several against the first.

Runs are compared at equal consumed tokens, as far as both have come; the settings in which they differ stand first.
`--html` writes one page (render/report/): what the comparison shows in words, tables, and plots that answer hover, zoom
and log axis, and hide runs. It loads nothing and can be mailed. `--plot` writes the loss curves alone as a picture.

`--equal FIRST LAST` compares the losses and gradient norms of those steps bit for bit and fails if any differs: the
proof that a resumed run and an uninterrupted one are the same run. What would prove nothing is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_fp4.cli.arguments import CommandParser
from megatron_fp4.cli.render.comparison import comparison, stored_settings
from megatron_fp4.cli.render.report.document import write_report
from megatron_fp4.cli.render.report.picture import write_losses
from megatron_fp4.storage.local import local_path
from megatron_fp4.train.telemetry.gaps import different_numbers
from megatron_fp4.train.telemetry.series import RunSeries, read_runs

EXITS = {0: "done; with --equal, equal", 1: "--equal found a difference"}


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 1 if `--equal` finds a difference, 2 for runs that cannot be compared."""
    parser = CommandParser("report", __doc__, EXITS, "runs/a runs/b --html report.html")
    parser.add_argument("runs", nargs="+", type=local_path, help="run directories (train.run_dir)")
    parser.add_argument("--plot", type=local_path, help="write the loss curves to this .png, .svg or .pdf")
    parser.add_argument("--html", type=local_path, help="write a page with all plots, one self-contained file")
    parser.add_argument("--equal", nargs=2, type=int, metavar=("FIRST", "LAST"), help="of two runs, bit for bit")
    args = parser.parse_args(arguments)
    try:
        for path, endings in ((args.plot, (".png", ".svg", ".pdf")), (args.html, (".html", ".htm"))):
            _refuse_output(path, endings)
        runs = read_runs(args.runs, stored_settings)
        if args.equal:
            return _compare(runs, *args.equal)
        print(comparison(runs))
        if args.plot:
            write_losses(runs, args.plot)
            print(f"loss curves: {args.plot}")
        if args.html:
            write_report(runs, args.html)
            print(f"report: {args.html}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _refuse_output(path: Path | None, endings: Sequence[str]) -> None:
    if path and (path.suffix not in endings or path.is_dir()):
        raise ValueError(f"{path} is no file that can be written here; its ending must be one of {', '.join(endings)}")


def _compare(runs: Sequence[RunSeries], first: int, last: int) -> int:
    if len(runs) != 2:
        raise ValueError(f"--equal compares two runs, got {len(runs)}")
    different = different_numbers(runs[0], runs[1], first, last)
    if different:
        print(f"{len(different)} numbers differ; the first: {different[0]}", file=sys.stderr)
        return 1
    names = " and ".join(run.name for run in runs)
    print(f"steps {first} to {last}: loss and gradient norm of {names} are equal, bit for bit")
    return 0
