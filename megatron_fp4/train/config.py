"""The whole configuration of a run, as frozen values, and the sizes that follow from several of its sections.

Each section is the dataclass that stands beside its owner; the trainer's own are in sections.py. Every field has its
sentence under it, which `megatron-fp4 explain` prints.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_fp4.checkpoint import CheckpointConfig
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.data.config import DataConfig
from megatron_fp4.data.ramp import BatchStage, batch_stages
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.optim import learning_rate
from megatron_fp4.optim.config import OptimConfig
from megatron_fp4.precision.config import PrecisionConfig
from megatron_fp4.train.sections import LoggingConfig, TrainConfig


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the numbers of a run, and where they go."""

    model: ModelConfig = field(default_factory=ModelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a whole global batch."""
        return self.train.global_batch * self.data.seq_length

    def stages(self, consumed_samples: int = 0) -> list[BatchStage]:
        """The steps from `consumed_samples` to the end of the run, by size; several with a batch-size ramp."""
        end = int(self.train.total_tokens) // self.data.seq_length
        return batch_stages(consumed_samples, end, self.train.batch_ramp, self.train.global_batch)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, those of a batch-size ramp included."""
        return sum(stage.num_steps for stage in self.stages())

    @property
    def run_samples(self) -> int:
        """Samples of the whole steps. Raises ValueError if no step of a whole global batch fits."""
        stages, train = self.stages(), self.train
        if not stages or stages[-1].size < train.global_batch:
            ramp = train.batch_ramp.ramp_samples
            before = f"the batch ramp of {ramp} samples and " if ramp else ""
            raise ValueError(
                f"train.total_tokens = {train.total_tokens:g} is less than {before}one step: train.global_batch *"
                f" data.seq_length = {train.global_batch} * {self.data.seq_length} = {self.tokens_per_step}"
                + (f", the ramp {ramp * self.data.seq_length} tokens; shorten train.batch_ramp" if ramp else "")
            )
        return stages[-1].end

    @property
    def run_tokens(self) -> int:
        """Tokens of `run_samples`; the learning rate and the precision schedule are functions of it."""
        return self.run_samples * self.data.seq_length

    @property
    def decay_start(self) -> int | None:
        """Consumed tokens at which `train.decay_from` lets the decay begin; None where `optim.decay_fraction` says it,
        and as long as `now` is not settled (checked.py)."""
        text = self.train.decay_from
        return int(text) if text.isdecimal() else None

    @property
    def further_losses(self) -> list[str]:
        """Names of the losses of a step beside that of the labels: see `train.engine.Engine.further_losses`."""
        of_depths = [f"mtp_{depth}_loss" for depth in range(1, self.model.mtp.depth + 1)]
        return [*of_depths, "distillation_kl"] if self.train.distillation.teacher else of_depths

    def learning_rate(self, tokens_seen: int) -> float:
        """Rate of the step after which so many tokens of the run are consumed. Raises ValueError as `optim.lr`."""
        return learning_rate(self.optim, tokens_seen, self.run_tokens, self.decay_start)

    def last_step(self, step: int, consumed_samples: int) -> int:
        """The step at which a run stops that has made `step` steps, of `consumed_samples` samples in all.

        One that is past `train.stop_after_steps` already stops where it is.
        """
        last = step + sum(stage.num_steps for stage in self.stages(consumed_samples))
        stop = self.train.stop_after_steps
        return max(step, min(stop, last)) if stop else last

    def check_evaluations(self) -> None:
        """Raises ValueError for evaluations of nothing, and if checkpoints are to be kept by a score that none has."""
        if self.data.tasks and not self.train.eval_interval_steps:
            raise ValueError(
                "data.tasks would have no effect: train.eval_interval_steps = 0; set it, or leave the tasks out"
            )
        if self.train.eval_interval_steps and not self.data.evaluation and not self.data.tasks:
            raise ValueError(
                f"train.eval_interval_steps = {self.train.eval_interval_steps} would have no effect: data.evaluation"
                " names no held-out set, and data.tasks no file; add one, or set train.eval_interval_steps=0"
            )
        if self.checkpoint.keep_best and not (self.data.evaluation and self.train.eval_interval_steps):
            raise ValueError(
                f"checkpoint.keep_best = {self.checkpoint.keep_best} would have no effect: nothing is evaluated; set"
                " data.evaluation and train.eval_interval_steps, or keep_best=0"
            )

    def check_timeouts(self, world_size: int) -> None:
        """What names a culprit must come before the process groups' time-out, which names none. Raises ValueError."""
        limit = self.parallel.timeout_seconds
        culprits = {
            "train.hang_timeout_seconds": self.train.hang_timeout_seconds,
            "checkpoint.timeout_seconds": self.checkpoint.timeout_seconds,
        }
        for name, seconds in culprits.items():
            if world_size > 1 and seconds >= limit:
                raise ValueError(
                    f"{name} = {seconds:g} must be below parallel.timeout_seconds = {limit:g}: until then the other"
                    " ranks wait in a collective, whose time-out would end the job first; lower the one or raise the"
                    " other"
                )
