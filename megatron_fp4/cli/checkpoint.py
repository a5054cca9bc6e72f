"""`megatron-fp4 checkpoint ACTION`: look at checkpoints, make others.

    megatron-fp4 checkpoint list RUN                       which there are, with tokens and score
    megatron-fp4 checkpoint inspect RUN                    tensors with logical shapes, step, tokens, settings
    megatron-fp4 checkpoint verify RUN                     sizes and hashes of all files; exit code 1 if one differs
    megatron-fp4 checkpoint average A B C --to DIRECTORY   the mean of their weights, summed in FP64
    megatron-fp4 checkpoint average RUN --window 900 1000 --to DIRECTORY      of all checkpoints in these steps
    megatron-fp4 checkpoint average RUN --window 900 1000 --weights minus_sqrt --to DIRECTORY
                                                           as if the rate had decayed by 1 - sqrt(x) over them
    megatron-fp4 checkpoint extract A --to DIRECTORY       only the weights, in one file
    megatron-fp4 checkpoint export A --to DIRECTORY        for `transformers` or, as 4-bit codes, for those who serve
    megatron-fp4 checkpoint rewind RUN STEP                back to that checkpoint by hand; later ones are set aside
    megatron-fp4 checkpoint import FOLDER --to DIRECTORY   of `transformers` or Megatron-LM: its weights, for
                                                           train.init_from

A checkpoint is named by its own directory, by the directory of all checkpoints, or by the run's (then the newest is
taken), or by a URL: of a mirror in an object store (then the newest is taken) or of one checkpoint there, which is
brought to a temporary folder (TMPDIR). There is no conversion between layouts: every layout reads every checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_fp4.checkpoint import CorruptCheckpoint, edit, offline
from megatron_fp4.checkpoint.directory import complete_steps, read_state, step_name
from megatron_fp4.cli.arguments import CommandParser, help_page
from megatron_fp4.cli.interop.export import add_export_arguments, export
from megatron_fp4.cli.interop.import_weights import add_import_arguments, import_folder
from megatron_fp4.cli.mirrored import describe_mirror, on_disk, place
from megatron_fp4.interop.export.folder import check_place
from megatron_fp4.storage.local import local_path, local_text
from megatron_fp4.storage.lock import RunLocked
from megatron_fp4.storage.remote.url import is_url
from megatron_fp4.train.resume.rewind import Rewound, rewind

EXITS = {0: "done", 1: "verify found damage"}


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 1 if `verify` finds damage, 2 for what cannot be done."""
    args = _parse(arguments)
    try:
        if args.action == "rewind":
            print(describe_rewind(rewind(args.run, args.step)))
            return 0
        if args.action == "list":
            print("\n".join(_listed(one) for one in args.checkpoints))
            return 0
        if args.action == "verify":
            return max([_verify(one) for one in args.checkpoints])
        with on_disk(args.checkpoints, only_small=args.action == "inspect") as places:
            return _act(args, places)
    except (ValueError, OSError, RunLocked) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _act(args: argparse.Namespace, places: Sequence[Path]) -> int:
    """What is done with checkpoints on the disk; returns the exit code."""
    paths: list[Path] = []
    try:
        if args.action == "import":
            import_folder(places[0], args)
            return 0
        if args.action == "average" and args.window:
            paths = _in_window(places, *args.window)
        else:
            paths = [_newest(path) for path in places]
        if args.action == "inspect":
            for path in paths:
                print(describe(path, names=args.names))
            return 0
        if args.action in ("average", "extract"):
            edit.check_destination(args.to, read_state(paths[-1])["step"])
        if args.action == "export":
            check_place(args.to, 0, force=args.force)
        if problems := [problem for path in paths for problem in offline.verify(path)]:
            raise ValueError(f"a damaged checkpoint makes no other: {problems[0]}")
        if args.action == "average":
            print(f"written: {edit.average(paths, args.to, weights=_weights(args.weights, paths))}")
        elif args.action == "extract":
            print(f"written: {edit.extract(paths[0], args.to, kinds=args.kinds)}")
        else:
            export(paths[0], args)
    except (ValueError, OSError) as error:
        print(f"error: {error}{_gone(paths)}", file=sys.stderr)
        return 2
    return 0


EXAMPLES = {
    "inspect": "runs/mine",
    "verify": "runs/mine",
    "list": "s3://bucket/runs/mine",
    "average": "runs/mine --window 15000 20000 --to runs/mean",
    "extract": "runs/mine --to runs/masters",
    "rewind": "runs/mine 15000",
    "import": "models/llama --to runs/begin",
    "export": "runs/mine --to exported --format hf",
}


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser("checkpoint", __doc__, EXITS, "verify runs/mine")
    actions = parser.add_subparsers(dest="action", required=True, parser_class=argparse.ArgumentParser)

    def action(name: str, count: str | int, *, writes: bool) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, **help_page(f"checkpoint {name}", EXITS, EXAMPLES[name]))
        kind = local_text if name == "import" else place
        sub.add_argument("checkpoints", nargs=count, type=kind, metavar="CHECKPOINT")
        if writes:
            sub.add_argument("--to", type=local_path, required=True, help="directory to write into")
        return sub

    action("inspect", "+", writes=False).add_argument("--names", default="", help="only tensors whose key has this")
    action("verify", "+", writes=False)
    action("list", "+", writes=False)
    mean = action("average", "+", writes=True)
    mean.add_argument("--weights", nargs="+", help="one per checkpoint, or minus_sqrt (default: equal)")
    mean.add_argument(
        "--window", nargs=2, type=int, metavar=("FIRST", "LAST"), help="all checkpoints of the run in these steps"
    )
    action("extract", 1, writes=True).add_argument("--kinds", nargs="+", default=["master"])
    back = actions.add_parser("rewind", **help_page("checkpoint rewind", EXITS, EXAMPLES["rewind"]))
    back.add_argument("run", type=local_path, help="run directory (train.run_dir); no launch of it may live")
    back.add_argument("step", type=int, help="the checkpoint that the next start takes")
    add_import_arguments(action("import", 1, writes=True))
    add_export_arguments(action("export", 1, writes=True))
    args, rest = parser.parse_known_args(arguments)  # settings may stand before and after options
    args.overrides = rest
    if rest and (args.action != "import" or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def describe_rewind(done: Rewound) -> str:
    """What was set aside, and what the next start does."""
    lines = [f"the next start goes on from checkpoint {done.step} (before: {done.newest})"]
    if done.aside is not None:
        lines.append(f"set aside, with the metrics until now: {done.aside}; delete it when nobody needs it any more")
    if done.skip is not None:
        first, end = done.skip
        lines.append(
            f"it reads samples {first} to {end - 1} again; to leave them out, add [{first},{end}] to data.skip:"
            f" 'data.skip=[[{first},{end}]]'"
        )
    return "\n".join(lines)


def _in_window(runs: Sequence[Path], first: int, last: int) -> list[Path]:
    """The complete checkpoints of a run from step `first` to step `last`. Raises ValueError for less than two."""
    if len(runs) != 1:
        raise ValueError(f"--window takes the checkpoints of one run, {len(runs)} are named")
    inside = runs[0] / "checkpoints"
    root = inside if inside.is_dir() else runs[0]
    complete = complete_steps(root)
    steps = [step for step in complete if first <= step <= last]
    if len(steps) < 2:
        listed = ", ".join(map(str, complete)) or "none"
        raise ValueError(
            f"steps {first} to {last} hold {len(steps)} checkpoint(s) of {root}, which has those of {listed}"
        )
    return [root / step_name(step) for step in steps]


def _weights(texts: Sequence[str] | None, paths: Sequence[Path]) -> list[float] | None:
    """What `--weights` says of the checkpoints; None for equal weights. Raises ValueError for what is no number."""
    if texts == ["minus_sqrt"]:
        return edit.minus_sqrt_weights([read_state(path)["step"] for path in paths])
    try:
        return [float(text) for text in texts] if texts else None
    except ValueError:
        raise ValueError(f"--weights {' '.join(texts or ())}: one number per checkpoint, or minus_sqrt alone") from None


def _gone(paths: Sequence[Path]) -> str:
    """What to say of checkpoints that were removed while they were read, as a run does with its older ones."""
    gone = [path for path in paths if not path.exists()]
    return f"; {gone[0]} was removed while it was read (checkpoint.keep_last): name a newer one" if gone else ""


def _newest(path: Path) -> Path:
    """The checkpoint that `path` names or that is the newest one in it. Raises FileNotFoundError."""
    inside = path / "checkpoints"
    return offline.resolve(inside if inside.is_dir() else path)


def describe(path: Path, names: str = "") -> str:
    """The small state in a few lines, then a line for each logical tensor."""
    state = read_state(path)
    infos = offline.list_tensors(path)
    meta = state["meta"]
    lines = [
        str(path),
        f"  step {state['step']}, tokens {state['tokens']}, score {state['score']}",
        f"  versions {meta.get('versions', {})}, git {meta.get('git')}",
    ]
    for kind in dict.fromkeys(info.kind for info in infos):
        of_kind = [info for info in infos if info.kind == kind]
        size = sum(info.num_bytes for info in of_kind) / 2**20
        elements = sum(torch.Size(info.shape).numel() for info in of_kind)
        lines.append(f"  {kind}: {len(of_kind)} tensors, {elements:,} elements, {size:,.1f} MiB")
    shown = [info for info in infos if names in info.key]
    width = max((len(info.key) for info in shown), default=0)
    lines += [
        f"    {info.key:<{width}}  {'x'.join(map(str, info.shape)):<16} {str(info.dtype).removeprefix('torch.')}"
        f"  {info.num_pieces} piece(s)"
        for info in shown
    ]
    return "\n".join(lines)


def _verify(place: str) -> int:
    """One checkpoint; the exit code. What lies in a store is checked as it arrives, in a temporary folder."""
    name: object = place
    try:
        with on_disk([place]) as (path,):
            newest = _newest(path)
            name = place if is_url(place) else newest
            problems = offline.verify(newest)
    except CorruptCheckpoint as damage:
        problems = [str(damage)]
    print(f"{name}: {'all files are as they were written' if not problems else 'DAMAGED'}")
    for problem in problems:
        print(f"  {problem}")
    return 1 if problems else 0


def _listed(place: str) -> str:
    """The complete checkpoints of a run or a mirror, a line for each. Raises FileNotFoundError."""
    if is_url(place):
        return describe_mirror(place)
    inside = Path(place) / "checkpoints"
    root = inside if inside.is_dir() else Path(place)
    states = [read_state(root / step_name(step)) for step in complete_steps(root)]
    if not states:
        raise FileNotFoundError(f"{root} holds no complete checkpoint")
    lines = [f"  {step_name(one['step'])}  tokens {one['tokens']}, score {one['score']}" for one in states]
    return "\n".join([str(root), *lines])
