"""What a run reads, as values: sources, phases, evaluation sets. No behaviour except refusals of impossible values.

Read by omegaconf: no unions, no Literal; `to_object` turns tuples into lists.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from megatron_fp4.settings import Count, Size, check_bounds

MAX_SAMPLES = 10**15
"""Samples that a run may have, skipped ones included: as many tokens as train.total_tokens may be."""


@dataclass(frozen=True)
class SourceConfig:
    """One stream of documents, shuffled anew each epoch."""

    name: str = ""
    """Unique name, which phases refer to; the shuffle depends on it."""
    paths: list[str] = field(default_factory=list)
    """Shard-set directories (with a manifest.json), Megatron prefixes, or globs of prefixes."""
    max_epochs: Count = 1
    """How often the source may be read; 0 = without limit."""


@dataclass(frozen=True)
class PhaseConfig:
    """A blend of the sources and how long it holds."""

    name: str = ""
    """What the log, the ledger and the data plan call the phase."""
    tokens: Count = 0
    """Length of the phase; 0 = to the end of the run, for the last phase only."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of each source by its name, on any positive scale; empty = by size."""


@dataclass(frozen=True)
class EvaluationConfig:
    """A held-out set, read in stored order, every token a target once, the last sample padded and masked."""

    name: str = ""
    """Unique name, under which the loss is logged: eval/NAME/loss."""
    paths: list[str] = field(default_factory=list)
    """Shard-set directories (with a manifest.json), Megatron prefixes, or globs of prefixes."""
    max_tokens: Count = 0
    """Tokens of the set's beginning that are read; 0 = all."""
    may_overlap: bool = False
    """Accept documents that a source holds too; otherwise they are looked for at the start, and refused."""


@dataclass(frozen=True)
class TaskConfig:
    """Questions whose choices the model ranks, a JSON object a line (data/tasks.py)."""

    name: str = ""
    """Unique name, under which the score is logged: task/NAME/acc and acc_norm."""
    path: str = ""
    """The .jsonl file."""
    max_questions: Count = 0
    """Questions of the file's beginning that are asked; 0 = all."""


@dataclass(frozen=True)
class DataConfig:
    """The data of a run, in which order it is read, and as what samples."""

    sources: list[SourceConfig] = field(default_factory=list)
    """What the run is trained on."""
    phases: list[PhaseConfig] = field(default_factory=list)
    """Blends of the sources, one after the other; empty = one phase, by size."""
    seq_length: Size = 2048
    """Tokens of a sample, S; it is S + 1 consecutive tokens of a source's stream, as inputs and shifted by one as
    targets."""
    seed: Count = 1234
    """Seed of the order of documents and samples."""
    tokenizer: str = ""
    """File of the tokenizer: .model (sentencepiece), .json (Hugging Face tokenizers) or .tiktoken; empty = none, and
    model.vocab_size is set."""
    reset_documents: bool = False
    """End attention, positions and Mamba-2 states at document boundaries, which no label crosses then."""
    evaluation: list[EvaluationConfig] = field(default_factory=list)
    """Held-out sets, which train.eval_interval_steps evaluates; the first one scores checkpoints."""
    tasks: list[TaskConfig] = field(default_factory=list)
    """Task files, whose questions are asked with every evaluation; needs data.tokenizer."""
    skip: list[list[int]] = field(default_factory=list)
    """Spans [first, end) of sample ids that are never delivered, such as [[120000, 120512]]."""
    index_cache: str = "auto"
    """Folder of the epoch indices (16 bytes a document), shared by the processes of a machine; auto = one in this
    machine's temporary folder, or none for a million documents and fewer; empty = in the memory of each process."""
    prefetch_batches: Count = 2
    """Batches that a thread makes ahead; 0 = no thread."""

    def __post_init__(self) -> None:
        check_bounds(self, "data")
        _check_names("data.sources", [source.name for source in self.sources])
        _check_names("data.evaluation", [item.name for item in self.evaluation])
        _check_names("data.tasks", [item.name for item in self.tasks])
        for name in ("sources", "phases", "evaluation", "tasks"):
            for number, part in enumerate(getattr(self, name)):
                check_bounds(part, f"data.{name}[{number}]")
        if self.tasks and not self.tokenizer:
            raise ValueError("data.tasks asks questions in words, but data.tokenizer is not set; set it")
        for number, phase in enumerate(self.phases[:-1]):
            if phase.tokens == 0:
                raise ValueError(f"data.phases[{number}].tokens = 0: only the last phase may be open (0)")
        for span in self.skip:
            if len(span) != 2 or not 0 <= span[0] < span[1] <= MAX_SAMPLES:
                raise ValueError(
                    f"data.skip has {list(span)}; each entry is [first, end) with 0 <= first < end <= {MAX_SAMPLES:,}"
                )


def config_from_dict(value: dict[str, Any]) -> DataConfig:
    """A DataConfig from nested dicts (YAML, JSON). ValueError names a key that does not exist and those that do."""
    lists = {"sources": SourceConfig, "phases": PhaseConfig, "evaluation": EvaluationConfig, "tasks": TaskConfig}
    _check_keys(DataConfig, value)
    built = {name: [_build(kind, item) for item in value.get(name, [])] for name, kind in lists.items()}
    return DataConfig(**{**value, **built})


def _build(kind: Any, value: Any) -> Any:
    _check_keys(kind, value)
    return kind(**value)


def _check_keys(kind: Any, value: Any) -> None:
    """`value` is a dictionary whose keys are fields of `kind`, each of the type of the field's default."""
    known = [item.name for item in fields(kind)]
    if not isinstance(value, dict):
        raise ValueError(f"{kind.__name__} must have the keys {known}, got {value!r}")
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ValueError(f"{kind.__name__} has no {unknown}; its keys are {known}")
    for name, given in value.items():
        wanted = type(getattr(kind(), name))
        if type(given) is not wanted:
            hint = "; YAML reads 5e6 as text and 5.0e+6 as a fraction: write 5_000_000" if wanted is int else ""
            raise ValueError(f"{kind.__name__}.{name}={given!r} must be of type {wanted.__name__}{hint}")


def _check_names(field_name: str, names: list[str]) -> None:
    if "" in names:
        raise ValueError(f"{field_name}[{names.index('')}] has no name")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{field_name}: names must be unique, but {twice} occur more than once")
