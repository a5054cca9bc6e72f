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
        self.tokenizer, self._model = trained.checked.tokenizer, model

    def continuations(self, texts: Sequence[str], num_tokens: int, sampling: Sampling) -> list[str]:
        """The text of up to `num_tokens` more tokens of each, on rank 0; it ends early at the end of a document.

        Collective over the ranks of the model. Raises ValueError for a text without a token.
        """
        encoded = self.tokenizer.encode_batch(list(texts))
        return self.complete([Prompt([int(token) for token in ids], num_tokens, sampling) for ids in encoded])

    def complete(self, prompts: Sequence[Prompt], stops: Sequence[str] = ()) -> list[str]:
        """The same for prompts in tokens. A text ends before the first of `stops` in it, too."""
        added = self._model.continue_rows(prompts, lambda before, ids: self._ends(before, ids, stops))
        texts = [self._text(prompt.ids, ids) for prompt, ids in zip(prompts, added, strict=False)]
        for stop in stops:
            texts = [text.split(stop)[0] for text in texts]
        return texts

    def _ends(self, before: list[int], ids: list[int], stops: Sequence[str]) -> bool:
        if ids[-1] == self.tokenizer.special.eos:
            return True
        text = self._text(before, ids) if stops else ""
        return any(stop in text for stop in stops)

    def _text(self, before: list[int], ids: list[int]) -> str:
        ids = ids[:-1] if ids and ids[-1] == self.tokenizer.special.eos else ids
        return self.tokenizer.decode(before + ids)[len(self.tokenizer.decode(before)) :]
