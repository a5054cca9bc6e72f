"""A trained model that scores and continues rows of token ids, on all ranks of a job together.

Rows of one batch need not be equally long. To be scored they are padded behind their end, where a causal model does not
look; to be continued before their beginning, as a document of its own. Where activations are quantized, a tensor's
scale covers all that is in it, so the numbers of a row depend on the rows beside it and on padding: there a batch is
one row, and the numbers are those of any layout.

Ranks that sequence parallelism needs rows for get copies of a row, which change no scale.

Every method is collective: all ranks call it with the same arguments. Copies of the model (dp) share the batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from megatron_fp4.comm.agree import gather_to_rank0
from megatron_fp4.comm.collectives import broadcast
from megatron_fp4.layers.loss import IGNORE
from megatron_fp4.layers.vocab_logits import likeliest, log_probabilities, whole_rows
from megatron_fp4.models.past import remembering
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.train.inputs import Inputs
from megatron_fp4.train.open import TrainedModel

T = TypeVar("T")


class TokenRow(NamedTuple):
    """Token ids of which the last `num_targets` are scored, each after all ids before it."""

    ids: list[int]
    num_targets: int


class Score(NamedTuple):
    """ln p of the targets, summed in float64, and whether each was the likeliest id."""

    log_probability: float
    greedy: bool


LEAST_TEMPERATURE = 1e-6
"""Logits are divided by it in FP32; below it they overflow."""


@dataclass(frozen=True)
class Sampling:
    """How the next id is chosen. temperature: 0 takes the likeliest; else one of the `top_k` likeliest is drawn
    (0: of all), with random numbers of `seed`, which are the same whatever else is in the batch."""

    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(
                f"temperature = {self.temperature:g} must be 0, which takes the likeliest token, or at least"
                f" {LEAST_TEMPERATURE:g}"
            )
        if self.top_k < 0:
            raise ValueError(f"top-k = {self.top_k} must be 0, which draws of all tokens, or above")


@dataclass(frozen=True)
class Prompt:
    """Ids to continue by at most `num_tokens`."""

    ids: list[int]
    num_tokens: int
    sampling: Sampling = Sampling()

    def __post_init__(self) -> None:
        if self.num_tokens < 0:
            raise ValueError(f"{self.num_tokens} tokens cannot be added to a prompt; ask for 0 or more")


Ends = Callable[[list[int], list[int]], bool]
"""(prompt, ids so far) -> whether the continuation is complete; asked after each id, the same on all ranks."""


class RowModel:
    """See the module. batch: rows computed at once where no activation is quantized. cache: remember keys, values and
    states between the tokens of a continuation, instead of computing the whole row anew for each."""

    def __init__(self, trained: TrainedModel, *, batch: int = 16, cache: bool = True) -> None:
        if batch < 1:
            raise ValueError(f"a batch has at least one row, got {batch}")
        self._trained = trained
        self._largest_batch, self._cache = batch, cache
        self._vocab_size, self._mesh = trained.checked.config.model.vocab_size, trained.mesh
        self._batch = batch
        self.compute_in(trained.checked.plan.evaluation_table(trained.phase))

    def compute_in(self, table: PrecisionTable) -> None:
        """Compute by this table from now on."""
        self._trained.assign(table)
        quantized = any(row.precision.fprop.x.quantized for row in table.rows)
        self._batch = 1 if quantized else self._largest_batch

    def score(self, rows: Sequence[TokenRow]) -> list[Score]:
        """The score of every row, on rank 0; nothing elsewhere. Raises ValueError for a row without context."""
        for row in rows:
            if not 0 < row.num_targets < len(row.ids):
                raise ValueError(f"a row of {len(row.ids)} ids cannot have {row.num_targets} targets")
        scores: dict[int, Score] = {}
        for numbers in self._shares([len(row.ids) - 1 for row in rows]):
            scores.update(zip(numbers, self._score([rows[number] for number in numbers]), strict=False))
        return self._collected(scores, len(rows))

    def continue_rows(self, prompts: Sequence[Prompt], ends: Ends) -> list[list[int]]:
        """The ids that follow each prompt, on rank 0; nothing elsewhere. Raises ValueError for an empty prompt."""
        if any(not prompt.ids for prompt in prompts):
            raise ValueError("a prompt has no token; give one, or begin with the token that ends documents")
        rows: dict[int, list[int]] = {}
        for numbers in self._shares([len(prompt.ids) for prompt in prompts]):
            rows.update(zip(numbers, self._continue([prompts[number] for number in numbers], ends), strict=True))
        return self._collected(rows, len(prompts))

    def _shares(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """The batches of this copy of the model, as numbers of rows: the longest rows first, so that what does not fit
        into memory fails at once."""
        order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
        batches = [order[first : first + self._batch] for first in range(0, len(order), self._batch)]
        yield from batches[self._mesh.dp.rank :: self._mesh.dp.size]

    def _collected(self, values: dict[int, T], count: int) -> list[T]:
        """The values of all copies in order, on rank 0."""
        speaks = self._trained.engine.reports_loss and self._mesh.tp.rank == 0
        merged: dict[int, T] = {}
        for part in gather_to_rank0(values if speaks else {}, self._mesh.world):
            merged.update(part)
        return [merged[number] for number in range(count)] if self._mesh.is_main else []

    def _score(self, rows: Sequence[TokenRow]) -> list[Score]:
        """Scores of one batch, on the ranks of the last stage; none elsewhere."""
        width = max(len(row.ids) for row in rows) - 1
        tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        labels = torch.full_like(tokens, IGNORE)
        for number, row in enumerate(rows):
            length = len(row.ids) - 1
            tokens[number, :length] = torch.tensor(row.ids[:-1])
            labels[number, length - row.num_targets : length] = torch.tensor(row.ids[-row.num_targets :])
        positions = torch.arange(width).expand(len(rows), -1)
        inputs = self._inputs(tokens, labels, positions, torch.zeros_like(tokens), one_token_rows=False)
        logits = self._trained.engine.logits(inputs)
        if logits is None:
            return []
        labels_T, tp = inputs.labels.reshape(-1), self._mesh.tp
        values = log_probabilities(logits, labels_T, self._vocab_size, tp).double().view(len(inputs.tokens), width)
        right = (likeliest(logits, self._vocab_size, tp) == labels_T) | (labels_T == IGNORE)
        sums, all_right = values.sum(1).tolist(), right.view(len(inputs.tokens), width).all(1).tolist()
        return [Score(sums[number], all_right[number]) for number in range(len(rows))]

    def _continue(self, prompts: Sequence[Prompt], ends: Ends) -> list[list[int]]:
        """Continuations of one batch."""
        rows, ends_at = [list(prompt.ids) for prompt in prompts], [len(p.ids) + p.num_tokens for p in prompts]
        random = [torch.Generator().manual_seed(prompt.sampling.seed) for prompt in prompts]
        running = {number for number, prompt in enumerate(prompts) if prompt.num_tokens}
        width = max(len(row) for row in rows)
        with remembering(self._trained.engine.stages) if self._cache else nullcontext():
            while running:
                chosen = self._next_ids(rows, width, prompts, random)
                for number, row in enumerate(rows):  # one that has ended goes on beside the others, for nobody
                    row.append(chosen[number])
                    added = row[len(prompts[number].ids) :]
                    if number in running and (
                        len(added) == prompts[number].num_tokens or ends(prompts[number].ids, added)
                    ):
                        running.remove(number)
                        ends_at[number] = len(row)
                width = 1 if self._cache else width + 1
        return [row[len(prompt.ids) : end] for row, prompt, end in zip(rows, prompts, ends_at, strict=True)]

    def _next_ids(
        self, rows: Sequence[list[int]], width: int, prompts: Sequence[Prompt], random: Sequence[torch.Generator]
    ) -> list[int]:
        """The id after each row, on all ranks of this copy."""
        logits = self._next_logits(rows, width)
        chosen = torch.zeros(len(rows), dtype=torch.int64, device=self._trained.device)
        if logits is not None:
            ids = [_choose(*choice) for choice in zip(logits.cpu(), prompts, random, strict=True)]
            chosen = torch.tensor(ids, device=self._trained.device)
        pp = self._mesh.pp
        ids_of_all: list[int] = broadcast(chosen, pp, source=pp.size - 1).tolist()
        return ids_of_all

    def _next_logits(self, rows: Sequence[list[int]], width: int) -> Tensor | None:
        """Logits of the id after each row, float32 `[B, V]`, from the last `width` ids of each; None on the ranks that
        do not have them."""
        tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        positions, documents = torch.zeros_like(tokens), torch.zeros_like(tokens)
        for number, row in enumerate(rows):
            length = min(len(row), width)
            tokens[number, width - length :] = torch.tensor(row[-length:])
            positions[number, width - length :] = torch.arange(len(row) - length, len(row))
            documents[number, width - length :] = 1
        inputs = self._inputs(tokens, torch.full_like(tokens, IGNORE), positions, documents, one_token_rows=True)
        logits = self._trained.engine.logits(inputs)
        if logits is None:
            return None
        last = logits.view(len(inputs.tokens), width, -1)[: len(rows), -1]
        return whole_rows(last, self._vocab_size, self._mesh.tp)

    def _inputs(
        self, tokens: Tensor, labels: Tensor, positions: Tensor, documents: Tensor, *, one_token_rows: bool
    ) -> Inputs:
        """On the device, with copies of the last row where tensor-parallel ranks need them."""
        num_rows, width = tokens.shape
        tp = self._mesh.tp.size
        multiple = tp if one_token_rows else tp // math.gcd(tp, width)
        index = torch.arange(num_rows + -num_rows % multiple).clamp(max=num_rows - 1)
        address = torch.arange(len(index) * width).view(-1, width)
        parts = [part[index].to(self._trained.device) for part in (tokens, labels, positions, documents)]
        tokens, labels, positions, documents = parts
        return Inputs(tokens, labels, address.to(self._trained.device), positions, documents)


def _choose(logits_V: Tensor, prompt: Prompt, random: torch.Generator) -> int:
    sampling = prompt.sampling
    if sampling.temperature == 0.0:
        return int(logits_V.argmax())
    best = logits_V.topk(min(sampling.top_k or len(logits_V), len(logits_V)))
    draw = torch.multinomial((best.values / sampling.temperature).softmax(-1), 1, generator=random)
    return int(best.indices[draw])
