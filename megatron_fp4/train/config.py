"""The whole configuration of a run, as frozen values.

One idea: each section is the dataclass that stands beside its owner; this file only puts them together and adds the
trainer's own. (No `from __future__ import annotations`: omegaconf reads the annotations.)
"""

from dataclasses import dataclass, field
from enum import Enum

from megatron_fp4.checkpoint import CheckpointConfig
from megatron_fp4.comm.mesh import ParallelConfig
from megatron_fp4.data.config import DataConfig
from megatron_fp4.data.ramp import BatchRampConfig, BatchStage, batch_size, batch_sizes, batch_stages, check_ramp
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.decoder import Recompute
from megatron_fp4.optim.config import OptimConfig
from megatron_fp4.precision.config import PrecisionConfig


class Resume(Enum):
    auto = "auto"  # from the newest complete checkpoint of the run directory, if there is one
    never = "never"  # refuse a run directory that already holds checkpoints
    required = "required"  # refuse to start from scratch


class NonFinite(Enum):
    """What a NaN or Inf in a quantized tensor leads to. (One in a gradient always skips the step.)"""

    skip = "skip"  # the step is skipped on all ranks, no state changes, the tensors are named
    stop = "stop"  # the run ends with the name of the first one


class WandbMode(Enum):
    disabled = "disabled"
    offline = "offline"
    online = "online"
    auto = "auto"  # online where wandb finds a key, offline elsewhere


@dataclass(frozen=True)
class SpikeConfig:
    """What a loss far above the running mean leads to: a ladder, off by default (train/faults/spikes.py).

    ratio: a loss above ratio * mean is a spike; z_score: one more than so many standard deviations above the mean (0 =
    rule off, each). window_steps: of the running mean. min_steps: no judgement before so many losses are known.
    max_skips: so many spikes in a row only skip their batch; the next one rolls back to a checkpoint and skips the
    samples since. max_rollbacks: then the run ends; counted until the loss was good for window_steps in a row.
    """

    ratio: float = 0.0
    z_score: float = 0.0
    window_steps: int = 128
    min_steps: int = 64
    max_skips: int = 1
    max_rollbacks: int = 2

    def __post_init__(self) -> None:
        if self.ratio and self.ratio <= 1.0:
            raise ValueError(f"train.spikes.ratio = {self.ratio}, must be above 1, or 0 (off)")
        if self.z_score < 0:
            raise ValueError(f"train.spikes.z_score = {self.z_score}, must be positive, or 0 (off)")
        if not 2 <= self.min_steps <= self.window_steps:
            raise ValueError(
                f"train.spikes.min_steps = {self.min_steps} must be at least 2 and at most train.spikes.window_steps ="
                f" {self.window_steps}"
            )
        if self.max_skips < 0 or self.max_rollbacks < 0:
            raise ValueError(
                f"train.spikes.max_skips = {self.max_skips} and train.spikes.max_rollbacks = {self.max_rollbacks} must"
                " not be negative"
            )

    @property
    def enabled(self) -> bool:
        return bool(self.ratio or self.z_score)


@dataclass(frozen=True)
class TrainConfig:
    """run_dir: where checkpoints, metrics and the resolved configuration go. micro_batch, global_batch: in sequences.
    batch_ramp: smaller steps at the beginning, up to global_batch (data/ramp.py); off by default.
    label_smoothing: of the training loss, at least 0 and below 1 (0 = off); evaluations are not smoothed.
    total_tokens: length of the run, rounded down to whole steps (`RunConfig.run_tokens`).
    stop_after_steps: stop (and save) at that step without changing any schedule; 0 = run to the end.
    exit_after_seconds: save and exit for requeue after so much wall clock; 0 = never.
    hang_timeout_seconds: a rank that is longer in one phase of a step ends the job (faults/watchdog.py); above the
    slowest phase, the first step with its compilation included; 0 = never.
    """

    run_dir: str = "runs/default"
    device: str = "auto"
    seed: int = 1234
    micro_batch: int = 1
    global_batch: int = 8
    batch_ramp: BatchRampConfig = field(default_factory=BatchRampConfig)
    label_smoothing: float = 0.0
    total_tokens: float = 1e6
    recompute: Recompute = Recompute.none
    resume: Resume = Resume.auto
    resume_allow: list[str] = field(default_factory=list)
    """Globs of settings that may differ from the checkpoint's although its rule says ask, e.g. ["data.*"]."""
    stop_after_steps: int = 0
    exit_after_seconds: float = 0.0
    hang_timeout_seconds: float = 480.0
    log_interval_steps: int = 10
    eval_interval_steps: int = 0
    save_interval_steps: int = 0
    statistics_interval_steps: int = 0
    """Measure quantization errors (SNR, underflow, saturation) every so many steps; 0 = never."""
    straggler_interval_steps: int = 100
    """Every so many steps the slowest rank of each phase is logged (jobs of several ranks); 0 = never."""
    check_gemms: bool = False
    """Debug: compare the executed GEMMs with the precision table in the first step of each precision phase."""
    nonfinite: NonFinite = NonFinite.skip
    max_skipped_steps: int = 10
    """Abort after so many steps in a row whose gradients were not finite."""
    spikes: SpikeConfig = field(default_factory=SpikeConfig)

    def __post_init__(self) -> None:
        if self.micro_batch < 1 or self.global_batch < 1:
            raise ValueError(
                f"train.micro_batch = {self.micro_batch} and train.global_batch = {self.global_batch} must be positive"
            )
        if self.total_tokens < 1 or self.total_tokens != int(self.total_tokens):
            raise ValueError(f"train.total_tokens = {self.total_tokens}, must be a positive whole number")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"train.label_smoothing = {self.label_smoothing}, must be in [0, 1)")
        check_ramp(self.batch_ramp, self.global_batch)
        if self.hang_timeout_seconds < 0:
            raise ValueError(
                f"train.hang_timeout_seconds = {self.hang_timeout_seconds:g}, must be positive, or 0 (off)"
            )

    @property
    def batch_sizes(self) -> list[int]:
        """Every number of samples that a step may take, ascending; one without a ramp."""
        return batch_sizes(self.batch_ramp, self.global_batch)

    def batch_at(self, consumed_samples: int) -> int:
        """Samples of the step that begins there."""
        return batch_size(consumed_samples, self.batch_ramp, self.global_batch)

    def gradient_accumulation(self, dp: int, samples: int) -> int:
        """Microbatches per rank of a step of `samples`. Raises ValueError with the equation if they do not divide."""
        count, rest = divmod(samples, self.micro_batch * dp)
        if rest or not count:
            raise ValueError(
                "global_batch = micro_batch * gradient_accumulation * dp does not hold:"
                f" {samples} is not a multiple of {self.micro_batch} * {dp} = {self.micro_batch * dp};"
                f" change {'train.batch_ramp' if self.batch_ramp.ramp_samples else 'train.global_batch'},"
                " train.micro_batch or the layout"
            )
        return count


@dataclass(frozen=True)
class LoggingConfig:
    """The local `metrics.jsonl` is always written; the rest is for people. wandb never stops or delays a run."""

    tensorboard: bool = True
    wandb: WandbMode = WandbMode.disabled
    wandb_project: str = "megatron_fp4"
    wandb_name: str = ""


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
        """Of a whole global batch."""
        return self.train.global_batch * self.data.seq_length

    def stages(self, consumed_samples: int = 0) -> list[BatchStage]:
        """The steps from there to the end of the run, by size; several with a batch-size ramp."""
        end = int(self.train.total_tokens) // self.data.seq_length
        return batch_stages(consumed_samples, end, self.train.batch_ramp, self.train.global_batch)

    @property
    def total_steps(self) -> int:
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
        """Of `run_samples`; the learning rate and the precision schedule are functions of it."""
        return self.run_samples * self.data.seq_length

    def last_step(self, step: int, consumed_samples: int) -> int:
        """The step at which this run stops, which has made `step` steps of `consumed_samples` samples in all."""
        last = step + sum(stage.num_steps for stage in self.stages(consumed_samples))
        stop = self.train.stop_after_steps
        return min(stop, last) if stop else last

    def check_evaluations(self) -> None:
        """Raises ValueError for evaluations of nothing, and if checkpoints are to be kept by a score that none has."""
        if self.train.eval_interval_steps and not self.data.evaluation:
            raise ValueError(
                f"train.eval_interval_steps = {self.train.eval_interval_steps} would have no effect: data.evaluation"
                " names no held-out set; add one, or set train.eval_interval_steps=0"
            )
        if self.checkpoint.keep_best and not (self.data.evaluation and self.train.eval_interval_steps):
            raise ValueError(
                f"checkpoint.keep_best = {self.checkpoint.keep_best} would have no effect: nothing is evaluated; set"
                " data.evaluation and train.eval_interval_steps, or keep_best=0"
            )

    def check_timeouts(self, world_size: int) -> None:
        """What names a culprit must come before the process groups' time-out, which names none. Raises ValueError."""
        limit, hang, save = (
            self.parallel.timeout_seconds,
            self.train.hang_timeout_seconds,
            self.checkpoint.timeout_seconds,
        )
        for name, seconds in (("train.hang_timeout_seconds", hang), ("checkpoint.timeout_seconds", save)):
            if world_size > 1 and seconds >= limit:
                raise ValueError(
                    f"{name} = {seconds:g} must be below parallel.timeout_seconds = {limit:g}: the other ranks wait in"
                    " a collective meanwhile, whose time-out would end the job first; lower the one or raise the other"
                )
