"""Continue a text with a trained model, in one process.

Every token recomputes the whole prefix: this is for a look at a model, not for serving.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.open import open_trained


class TextGenerator:
    """The model and the tokenizer of a run, in its evaluation precision.

    step: which checkpoint, None for the newest. Raises ValueError or FileNotFoundError where run, checkpoint or
    tokenizer are not there.
    """

    def __init__(self, config: RunConfig, step: int | None = None) -> None:
        trained = open_trained(config, step)
        if trained.checked.tokenizer is None:
            raise ValueError("the run has no data.tokenizer, so text cannot be turned into tokens")
        self.tokenizer, self.model = trained.checked.tokenizer, trained.model

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        """Logits of the token after `ids`, float32 `[V]`."""
        tokens = torch.tensor([ids])
        positions = torch.arange(len(ids))[None]
        out: Tensor = self.model(tokens, positions, positions, torch.zeros_like(tokens))
        return out[-1].float()

    def continuation(self, prompt: str, num_tokens: int, temperature: float, top_k: int, seed: int) -> str:
        """The text of up to `num_tokens` more tokens; it ends early at the end of a document.

        temperature: 0 takes the likeliest token; else one of the `top_k` likeliest is drawn.
        """
        ids = [int(token) for token in self.tokenizer.encode_batch([prompt])[0]]
        num_prompt_ids, random = len(ids), torch.Generator().manual_seed(seed)
        for _ in range(num_tokens):
            token = _choose(self.logits(ids), temperature, top_k, random)
            if token == self.tokenizer.special.eos:
                break
            ids.append(token)
        return self.tokenizer.decode(ids)[len(self.tokenizer.decode(ids[:num_prompt_ids])) :]


def _choose(logits: Tensor, temperature: float, top_k: int, random: torch.Generator) -> int:
    if temperature == 0.0:
        return int(logits.argmax())
    best = logits.topk(min(top_k, len(logits)))
    draw = torch.multinomial((best.values / temperature).softmax(-1), 1, generator=random)
    return int(best.indices[draw])
