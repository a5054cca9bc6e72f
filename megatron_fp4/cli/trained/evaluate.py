"""`megatron-fp4 evaluate RUN --precision bf16 --precision same`: held-out loss of a trained model, per precision.

In one process, whatever layout wrote the checkpoint, or under torchrun on the run's tp * pp ranks. `same` is the
precision in which the last step before the checkpoint computed, behind a switch another one than at the start; a
recipe's name puts every linear into that recipe. `exported` is what a server computes with the codes of `checkpoint
export`: weights as in `same`, activations not quantized.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_fp4.cli.arguments import CommandParser
from megatron_fp4.cli.trained.opening import add_choice, with_trained
from megatron_fp4.inference.precisions import table_of
from megatron_fp4.train.open import TrainedModel
from megatron_fp4.train.opened import examiner, open_data

EXITS = {0: "done", 1: "failed"}


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 2 where run, data or recipe are not there."""
    parser = CommandParser("evaluate", __doc__, EXITS, "runs/mine --precision bf16 --precision same")
    add_choice(parser)
    parser.add_argument(
        "--precision", action="append", help="bf16, same, exported or a recipe of the run (several times)"
    )
    args = parser.parse_args(arguments)

    def use(trained: TrainedModel) -> None:
        mesh = trained.mesh
        data = open_data(trained.checked, dp_rank=mesh.dp.rank)
        if not data.evaluations and not data.tasks:
            raise ValueError("the run has no held-out set (data.evaluation) and no task file (data.tasks)")
        tables = {name: table_of(trained, name) for name in args.precision or ["bf16", "same"]}
        examined = examiner(trained.checked, trained.engine, data, mesh, trained.device)
        for precision, table in tables.items():
            for finding in examined.examine(table):
                if mesh.is_main:
                    print(f"{args.run.resolve().name}: {finding.text} computed in {precision}", flush=True)

    return with_trained(args, use)
