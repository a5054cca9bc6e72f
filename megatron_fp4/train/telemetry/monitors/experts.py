"""How the load of the experts stands: what one step and the steps since the last line sent to each of them.

Numbers are of global counts (layers/moe/balance.py), which all ranks of a stage know, so no layout changes them. Counts
stay on the device and are read on the steps that are written only: every `train.log_interval_steps`.

    experts/max_vio/blocks.3    tokens of the busiest expert over the mean, less 1 (MaxVio, arXiv 2408.15664), of that
                                step: 0 where all is even, E/k - 1 where all tokens go to the same experts
    experts/dead/blocks.3       experts that no token was sent to in all the steps since the last line
    experts/entropy/blocks.3    mean over tokens of the entropy of a router's shares, nats; ln E where it is undecided
    experts/LOSS/blocks.3       sequence_loss, global_loss, z_loss: without their coefficients, where these are not 0
    experts/max_vio, experts/median_vio, experts/dead     the worst layer, the middle one, all of them

On the steps that are measured, `experts/step_N.txt` in the run's directory has the tokens that the steps since the last
line sent to every expert.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_fp4.comm.agree import gather_to_rank0
from megatron_fp4.layers.moe.balance import LoadBalance
from megatron_fp4.layers.moe.losses import MEANS
from megatron_fp4.train.run import Run
from megatron_fp4.train.telemetry.console import Console
from megatron_fp4.train.telemetry.metrics import Metrics
from megatron_fp4.train.telemetry.quantization import measures, model_order

FOLDER = "experts"
MOST_LISTED = 5


@dataclass(frozen=True)
class LayerLoad:
    """A layer's load. step, interval: tokens sent to each expert in the newest step, and since the last line."""

    step: list[float]
    interval: list[float]
    means: dict[str, float]

    @property
    def max_vio(self) -> float:
        mean = sum(self.step) / len(self.step)
        return max(self.step) / mean - 1 if mean else 0.0

    @property
    def dead(self) -> int:
        return sum(count == 0 for count in self.interval)


class ExpertMonitor:
    """Follows the steps of an attempt. Methods are collective."""

    def __init__(self, run: Run, metrics: Metrics, console: Console) -> None:
        self._run = run
        self._metrics = metrics
        self._console = console
        balance = run.optimizer.gradient_free
        self._balance = balance if isinstance(balance, LoadBalance) else None
        self._counts: dict[str, Tensor] = {}
        self._num_steps = 0
        self._said = ""

    def end(self, step: int, *, skipped: bool) -> None:
        """A step has ended; skipped: without an update, which leaves the loads as they were."""
        if self._balance is None:
            return
        if not skipped:
            self._num_steps += 1
            for name, load in self._balance.loads.items():
                counts = self._counts.get(name)
                self._counts[name] = load.counts_E if counts is None else counts + load.counts_E
        if self._num_steps and step % max(1, self._run.config.train.log_interval_steps) == 0:
            self._write(step, self._read())
            self._counts, self._num_steps = {}, 0

    def _read(self) -> dict[str, LayerLoad]:
        """The layers of all stages in order, on the main rank; empty elsewhere. Reads back once."""
        mesh, loads = self._run.mesh, self._balance.loads if self._balance else {}
        if not mesh.tp.rank == mesh.cp.rank == mesh.dp.rank == 0:
            return {}
        rows = [torch.cat([load.counts_E, self._counts[name], load.means]) for name, load in loads.items()]
        size, local = self._run.config.model.moe.num_experts, dict[str, LayerLoad]()
        for name, row in zip(loads, torch.stack(rows).tolist() if rows else [], strict=True):
            means = dict(zip(MEANS, row[2 * size :], strict=True))
            local[name.removesuffix(".moe.router")] = LayerLoad(row[:size], row[size : 2 * size], means)
        layers = {name: load for part in gather_to_rank0(local, mesh.pp) for name, load in part.items()}
        return dict(sorted(layers.items(), key=lambda item: model_order(item[0])))

    def _write(self, step: int, layers: Mapping[str, LayerLoad]) -> None:
        if not layers:
            return
        moe = self._run.config.model.moe
        values: dict[str, float] = {}
        for name, load in layers.items():
            shown = {key: mean for key, mean in load.means.items() if key == "entropy" or getattr(moe, key)}
            shown |= {"max_vio": load.max_vio, "dead": float(load.dead)}
            values |= {f"{FOLDER}/{key}/{name}": value for key, value in shown.items()}
        vios = [load.max_vio for load in layers.values()]
        values |= {
            f"{FOLDER}/max_vio": max(vios),
            f"{FOLDER}/median_vio": statistics.median(vios),
        }
        values[f"{FOLDER}/dead"] = float(sum(load.dead for load in layers.values()))
        self._metrics.write(step, values)
        self._say_dead(step, layers)
        if measures(self._run, step):
            folder = Path(self._run.config.train.run_dir) / FOLDER
            folder.mkdir(exist_ok=True)
            (folder / f"step_{step:08}.txt").write_text(load_table(layers, self._num_steps))

    def _say_dead(self, step: int, layers: Mapping[str, LayerLoad]) -> None:
        """A line where experts get no tokens, once until it is another."""
        dead = [f"{load.dead} of {len(load.step)} in {name}" for name, load in layers.items() if load.dead]
        listed = ", ".join(dead[:MOST_LISTED]) + (
            f" and {len(dead) - MOST_LISTED} more layers" * (len(dead) > MOST_LISTED)
        )
        if listed and listed != self._said:
            steps = "step" if self._num_steps == 1 else f"{self._num_steps} steps"
            self._console.say(f"step {step}: experts without a token in the last {steps}: {listed}")
        self._said = listed


def load_table(layers: Mapping[str, LayerLoad], num_steps: int) -> str:
    """A line for each layer: its name, then the tokens that `num_steps` steps sent to each expert, in their order."""
    head = f"tokens sent to each expert in {num_steps} steps"
    lines = (f"{name} {' '.join(f'{count:.0f}' for count in load.interval)}" for name, load in layers.items())
    return "\n".join([head, *lines]) + "\n"
