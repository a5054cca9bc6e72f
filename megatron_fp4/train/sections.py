"""The trainer's own sections of a run's configuration: `train`, `train.spikes`, `logging`.

Not here: the sections of the other rooms, which stand beside their owners, and the sizes that follow from several
sections (train/config.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from megatron_fp4.data.ramp import BatchRampConfig, batch_size, batch_sizes, check_ramp
from megatron_fp4.models.decoder import Recompute
from megatron_fp4.settings import MAX_SECONDS, Bound, Count, Place, Size, check_bounds
from megatron_fp4.storage.remote.url import check_place

SECRET = re.compile(
    r"(?<![A-Za-z0-9])(?=[A-Za-z0-9]*\d)(?=[A-Za-z0-9]*[A-Za-z])[A-Za-z0-9]{20,}|https?://[^/\s$]*:[^/\s$]*@"
)
"""Twenty letters and digits in a row, of both kinds, are a token and no word of a path; or a password before a host."""


NOW = "now"
"""A `train.decay_from` that the launch which reads it turns into a number of tokens."""


class Resume(Enum):
    """Whether a run goes on from a checkpoint."""

    auto = "auto"  # from the newest complete checkpoint of the run directory, if there is one
    never = "never"  # refuse a run directory that already holds checkpoints
    required = "required"  # refuse to start from scratch


class NonFinite(Enum):
    """What a NaN or Inf in a quantized tensor leads to. (One in a gradient always skips the step.)"""

    skip = "skip"  # the step is skipped on all ranks, no state changes, the tensors are named
    stop = "stop"  # the run ends with the name of the first one


class WandbMode(Enum):
    """Where Weights & Biases gets a run's metrics."""

    disabled = "disabled"
    offline = "offline"  # written to the disk, for `wandb sync`
    online = "online"
    auto = "auto"  # online where wandb finds a key, offline elsewhere


@dataclass(frozen=True)
class SpikeConfig:
    """What a loss far above the running mean leads to: a ladder of skipping, rolling back and ending the run.

    Off unless `ratio` or `z_score` is set. The rungs: train/faults/spikes.py.
    """

    ratio: Annotated[float, Bound(above=1, or_zero=True)] = 0.0
    """A loss above this multiple of the running mean is a spike; 0 = this rule is off."""
    z_score: Annotated[float, Bound(least=0)] = 0.0
    """A loss more than this many standard deviations above the running mean is a spike; 0 = this rule is off."""
    window_steps: Annotated[int, Bound(least=2)] = 128
    """Number of the last good losses that mean and deviation are of."""
    min_steps: Annotated[int, Bound(least=2)] = 64
    """No loss is judged before this many are known; at most window_steps."""
    max_skips: Count = 1
    """Spikes in a row that only skip their batch; the next one rolls back to a checkpoint, past the samples since."""
    max_rollbacks: Count = 2
    """Rollbacks after which a spike ends the run; counted anew after window_steps good losses in a row."""

    def __post_init__(self) -> None:
        check_bounds(self, "train.spikes")
        if self.min_steps > self.window_steps:
            raise ValueError(
                f"train.spikes.min_steps = {self.min_steps} must be at most train.spikes.window_steps ="
                f" {self.window_steps}"
            )

    @property
    def enabled(self) -> bool:
        return bool(self.ratio or self.z_score)


@dataclass(frozen=True)
class DistillationConfig:
    """Predictions of a model that is trained already, in high precision, to learn from beside labels."""

    teacher: str = ""
    """Checkpoint of the same model, or a run that has one, whose predictions are learned; empty = labels only."""
    weight: Annotated[float, Bound(above=0, most=1)] = 1.0
    """Part of the divergence from the teacher in what is minimized; the rest is the loss of the labels."""
    temperature: Annotated[float, Bound(above=0)] = 1.0
    """What the logits of both are divided by before they are compared."""

    def __post_init__(self) -> None:
        check_bounds(self, "train.distillation")


@dataclass(frozen=True)
class TrainConfig:
    """Length and batches of a run, where it goes, what it does between steps, and what ends it."""

    run_dir: str = "runs/default"
    """Directory of the checkpoints, the metrics and the resolved configuration."""
    device: str = "auto"
    """One of cpu, cuda (the GPU of the local rank) and auto: cuda where torch sees a GPU."""
    seed: Count = 1234
    """Seed of initial weights, dropout and rounding noise; the order of the data has data.seed."""
    micro_batch: Size = 1
    """Sequences that one data-parallel rank computes at a time."""
    global_batch: Size = 8
    """Sequences per optimizer step over all data-parallel ranks; = micro_batch x accumulation x dp."""
    batch_ramp: BatchRampConfig = field(default_factory=BatchRampConfig)
    label_smoothing: Annotated[float, Bound(least=0, below=1)] = 0.0
    """Part of the training loss that is spread evenly over the vocabulary; evaluations are not smoothed; 0 = off."""
    total_tokens: Annotated[float, Bound(least=1, most=1e15)] = 1e6
    """Length of the run in tokens, a whole number; rounded down to whole steps of global_batch x data.seq_length."""
    recompute: Recompute = Recompute.none
    """What the backward pass computes a second time instead of keeping it in memory."""
    decay_from: str = ""
    """Consumed tokens at which the decay of schedule wsd begins, whatever optim.decay_fraction says; now = those before
    the first step of the launch that says so first, which its checkpoints keep; it ends with the run; empty = by
    optim.decay_fraction."""
    init_from: Place = ""
    """Checkpoint, also by the URL of a mirror, or folder of transformers or Megatron-LM, whose weights a new run begins
    with; optimizer, data and schedules are its own; empty = weights are drawn."""
    resume: Resume = Resume.auto
    """Whether the run goes on from the newest checkpoint of run_dir."""
    resume_allow: list[str] = field(default_factory=list)
    """Settings that may differ from the checkpoint's although a resume asks about them, as globs, such as
    [data.reset_documents,data.sources.*.name]; a refused resume prints the list that it would take."""
    stop_after_steps: Count = 0
    """Save and end at this step without changing any schedule; 0 = run to the end."""
    exit_after_seconds: Annotated[float, Bound(least=0, most=MAX_SECONDS)] = 0.0
    """Save and exit, to be queued again, after this much wall-clock time; 0 = never."""
    hang_timeout_seconds: Annotated[float, Bound(least=0, most=MAX_SECONDS)] = 480.0
    """A rank that is longer in one phase of a step ends the job; above the slowest phase, which is the first step with
    its compilation, and below parallel.timeout_seconds; 0 = never."""
    log_interval_steps: Count = 10
    """A line on the console, and the norm of the parameters, every so many steps; metrics.jsonl has every step."""
    eval_interval_steps: Count = 0
    """Evaluate the sets of data.evaluation and data.tasks every so many steps, and after the last one; 0 = never."""
    save_interval_steps: Count = 0
    """Save a checkpoint every so many steps; 0 = only at the end."""
    statistics_interval_steps: Count = 0
    """Measure quantization errors (SNR, underflow, saturation), exact zeros of weight gradients by the GEMM that made
    them, and the residual stream behind each block every so many steps; 0 = never."""
    straggler_interval_steps: Count = 100
    """Log the slowest rank of each phase every so many steps, in jobs of several ranks; 0 = never."""
    check_gemms: bool = False
    """Compare the executed GEMMs with the precision table in the first step of each precision phase, to debug."""
    nonfinite: NonFinite = NonFinite.skip
    """What a NaN or Inf in a quantized tensor leads to."""
    max_skipped_steps: Size = 10
    """End the run after this many steps in a row whose gradients were not finite, or which had no target token."""
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        check_bounds(self, "train")
        check_place(self.init_from, "train.init_from")
        if not self.run_dir.strip():
            raise ValueError("train.run_dir is empty, which is the present folder; name one for this run")
        if self.total_tokens != int(self.total_tokens):
            raise ValueError(f"train.total_tokens = {self.total_tokens}, must be a whole number")
        if self.decay_from not in ("", NOW) and not self.decay_from.isdecimal():
            raise ValueError(
                f"train.decay_from = {self.decay_from!r}, must be now, a whole number of consumed tokens, or empty"
            )
        check_ramp(self.batch_ramp, self.global_batch)

    @property
    def batch_sizes(self) -> list[int]:
        """Every number of samples that a step may take, ascending; one without a ramp."""
        return batch_sizes(self.batch_ramp, self.global_batch)

    def batch_at(self, consumed_samples: int) -> int:
        """Samples of the step that begins after `consumed_samples`."""
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
    """Where metrics go besides `metrics.jsonl`, which is always written. wandb never stops or delays a run."""

    tensorboard: bool = True
    """Write the metrics for TensorBoard too, to the folder tensorboard of train.run_dir."""
    wandb: WandbMode = WandbMode.disabled
    """Whether Weights & Biases gets the metrics too."""
    wandb_project: str = "megatron_fp4"
    """Project of the run at Weights & Biases."""
    wandb_name: str = ""
    """Name of the run at Weights & Biases; empty = the last part of train.run_dir."""
    on_event: str = ""
    """Command or http(s) URL that gets each event of the run (start, stop, spike, failed save, hang, ...) as JSON, on
    its standard input or by POST; $NAME in it is read from the environment and stored nowhere; empty = nobody is
    told."""
    prometheus_file: str = ""
    """File for the newest metrics in Prometheus' text format, such as one in the folder of node_exporter's textfile
    collector, named .prom; empty = none."""

    def __post_init__(self) -> None:
        if SECRET.search(self.on_event):
            raise ValueError(
                "logging.on_event holds what looks like a secret, and a setting is stored in config.yaml and in every"
                " checkpoint; put it into an environment variable of rank 0 and write $NAME in its place"
            )

    def check_prometheus_file(self) -> None:
        """Raises ValueError for a name that nobody scrapes. For launches: what an older run stored is read."""
        if self.prometheus_file and not self.prometheus_file.endswith(".prom"):
            raise ValueError(
                f"logging.prometheus_file = {self.prometheus_file} must end in .prom: node_exporter reads no other"
                f" file; write {self.prometheus_file.removesuffix('.txt')}.prom"
            )
