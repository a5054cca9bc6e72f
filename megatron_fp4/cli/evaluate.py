"""`megatron-fp4 evaluate RUN --precision bf16 --precision same`: held-out loss of a trained model, per precision.

One process, whatever layout wrote the checkpoint. `same` is the precision in which the last step before the checkpoint
computed, behind a switch another one than at the start; a recipe's name puts every linear into that recipe.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron_fp4.cli.compose import load_run_config
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.train.checked import check_config, open_data
from megatron_fp4.train.engine import LocalEngine, TokenLoss
from megatron_fp4.train.evaluate import evaluate
from megatron_fp4.train.open import TrainedModel, open_trained


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 2 where run, data or recipe are not there."""
    parser = argparse.ArgumentParser(prog="megatron-fp4 evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory (train.run_dir)")
    parser.add_argument("--precision", action="append", help="bf16, same or a recipe of the run (several times)")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    args = parser.parse_args(arguments)
    mesh, device = ParallelMesh.single_process(), torch.device("cpu")
    try:
        trained = open_trained(load_run_config(args.run), args.step)
        config = trained.checked.config
        _, loaders = open_data(trained.checked, dp_rank=0)
        if not loaders:
            raise ValueError("the run has no held-out set (data.evaluation)")
        tables = {name: _table(trained, name) for name in args.precision or ["bf16", "same"]}
        engine = LocalEngine(trained.model, TokenLoss(config.model.vocab_size, mesh.tp))
        for precision, table in tables.items():
            for loader in loaders:
                loss = evaluate(engine, loader, table, mesh, device)
                print(f"{args.run.resolve().name}: {loader.name} loss {loss:.4f} computed in {precision}", flush=True)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _table(trained: TrainedModel, precision: str) -> PrecisionTable:
    """What the run would have evaluated in with `precision.evaluation` set to this. Raises ValueError."""
    config = trained.checked.config
    config = replace(config, precision=replace(config.precision, evaluation=precision))
    return check_config(config, world_size=1).plan.evaluation_table(trained.phase)
