"""What a run reads, as values: sources, phases, evaluation sets. No behaviour except refusals of impossible values.

Read by omegaconf: plain frozen dataclasses, no unions, no Literal; `to_object` turns tuples into lists.
"""

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class SourceConfig:
    """One stream of documents, shuffled anew each epoch."""

    name: str = ""  # unique; the shuffle depends on it, and phases refer to it
    # Each entry: a shard-set directory (has manifest.json), a Megatron prefix, or a glob of prefixes.
    paths: list[str] = field(default_factory=list)
    max_epochs: int = 1  # how often the source may be read; 0 = no limit


@dataclass(frozen=True)
class PhaseConfig:
    """A blend and how long it holds. `weights` by source name, any positive scale; empty = by size."""

    name: str = ""
    tokens: int = 0  # length of this phase; 0 = to the end of the run (the last phase only)
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationConfig:
    """A held-out set, read in stored order, every token a target once, the last sample padded and masked."""

    name: str = ""
    paths: list[str] = field(default_factory=list)
    max_tokens: int = 0  # of the set's beginning; 0 = all


@dataclass(frozen=True)
class DataConfig:
    sources: list[SourceConfig] = field(default_factory=list)
    phases: list[PhaseConfig] = field(default_factory=list)  # empty = one phase, by size
    seq_length: int = 2048  # tokens per sample S; a sample is S + 1 consecutive tokens of a source's stream
    seed: int = 1234
    tokenizer: str = ""  # .model (sentencepiece), .json (Hugging Face tokenizers) or .tiktoken
    reset_documents: bool = False  # True: attention and state end at document boundaries, labels never cross them
    evaluation: list[EvaluationConfig] = field(default_factory=list)
    skip: list[list[int]] = field(default_factory=list)  # [[a, b], ...]: sample ids a <= id < b are never delivered
    index_cache: str = ""  # folder for epoch indexes, shared by the processes of a machine; empty = in memory
    prefetch_batches: int = 2  # batches made ahead by a thread; 0 = none

    def __post_init__(self) -> None:
        if self.seq_length < 1:
            raise ValueError(f"data.seq_length={self.seq_length} must be at least 1")
        if self.prefetch_batches < 0:
            raise ValueError(f"data.prefetch_batches={self.prefetch_batches} must be 0 (no thread) or more")
        _check_names("data.sources", [source.name for source in self.sources])
        _check_names("data.evaluation", [item.name for item in self.evaluation])
        for number, source in enumerate(self.sources):
            if source.max_epochs < 0:
                raise ValueError(f"data.sources[{number}].max_epochs={source.max_epochs} must be 0 (no limit) or more")
        for number, item in enumerate(self.evaluation):
            if item.max_tokens < 0:
                raise ValueError(f"data.evaluation[{number}].max_tokens={item.max_tokens} must be 0 (all) or more")
        for number, phase in enumerate(self.phases):
            if phase.tokens < 0 or (phase.tokens == 0 and number + 1 < len(self.phases)):
                raise ValueError(f"data.phases[{number}].tokens={phase.tokens}: only the last phase may be open (0)")
        for span in self.skip:
            if len(span) != 2 or not 0 <= span[0] < span[1]:
                raise ValueError(f"data.skip has {list(span)}; each entry is [first, end) with 0 <= first < end")


def config_from_dict(value: dict[str, Any]) -> DataConfig:
    """A DataConfig from plain data (YAML, JSON). ValueError names a key that does not exist and those that do."""
    lists = {"sources": SourceConfig, "phases": PhaseConfig, "evaluation": EvaluationConfig}
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
    for name, found in value.items():
        wanted = type(getattr(kind(), name))
        if type(found) is not wanted:
            hint = "; YAML reads 5e6 as text and 5.0e+6 as a fraction: write 5_000_000" if wanted is int else ""
            raise ValueError(f"{kind.__name__}.{name}={found!r} must be of type {wanted.__name__}{hint}")


def _check_names(field_name: str, names: list[str]) -> None:
    if "" in names:
        raise ValueError(f"{field_name}[{names.index('')}] has no name")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{field_name}: names must be unique, but {twice} occur more than once")
