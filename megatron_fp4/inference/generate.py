"""Continue texts with a trained model."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_fp4.inference.model import Prompt, RowModel, Sampling
from megatron_fp4.train.open import TrainedModel


class TextGenerator:
    """The model and the tokenizer of a run. Raises ValueError where the run has no tokenizer."""

    def __init__(self, trained: TrainedModel, model: RowModel) -> None:
        if trained.checked.tokenizer is None:
            raise ValueError("the run has no data.tokenizer, so text cannot be turned into tokens")
        self._tokenizer, self._model = trained.checked.tokenizer, model

    def continuations(self, texts: Sequence[str], num_tokens: int, sampling: Sampling) -> list[str]:
        """The text of up to `num_tokens` more tokens of each, on rank 0; it ends early at the end of a document.

        Collective over the ranks of the model. Raises ValueError for a text without a token.
        """
        eos = self._tokenizer.special.eos
        encoded = [[int(token) for token in ids] for ids in self._tokenizer.encode_batch(list(texts))]
        prompts = [Prompt(ids, num_tokens, sampling) for ids in encoded]
        added = self._model.continue_rows(prompts, lambda ids: ids[-1] == eos)
        return [self._text(prompt.ids, ids, eos) for prompt, ids in zip(prompts, added, strict=False)]

    def _text(self, before: list[int], ids: list[int], eos: int | None) -> str:
        ids = ids[:-1] if ids and ids[-1] == eos else ids
        return self._tokenizer.decode(before + ids)[len(self._tokenizer.decode(before)) :]
