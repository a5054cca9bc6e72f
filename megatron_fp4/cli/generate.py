"""`megatron-fp4 generate RUN --prompt "def "`: continue a text with the weights of a run.

One process, whatever layout wrote the checkpoint; the evaluation precision of the run. Every token recomputes the whole
prefix: this is for a look at a model, not for serving.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_fp4.cli.compose import load_run_config
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.open import open_trained


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="megatron-fp4 generate", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory (train.run_dir)")
    parser.add_argument("--prompt", action="append", help="text to continue; may be given several times")
    parser.add_argument("--tokens", type=int, default=60, help="tokens to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=40)
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        generator = Generator(load_run_config(args.run), args.step)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for prompt in args.prompt or ["import os\n", "def main(", '"""Return the']:
        print(f"--- {prompt!r}")
        print(prompt + generator.continue_text(prompt, args.tokens, args.temperature, args.top_k, args.seed))
    return 0


class Generator:
    """A trained model in one process."""

    def __init__(self, config: RunConfig, step: int | None) -> None:
        checked, self.model = open_trained(config, step)
        if checked.tokenizer is None:
            raise ValueError("the run has no data.tokenizer, so text cannot be turned into tokens")
        self.tokenizer = checked.tokenizer

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """Logits of the token after `ids`, float32 `[V]`."""
        tokens = torch.tensor([ids])
        positions = torch.arange(len(ids))[None]
        out: torch.Tensor = self.model(tokens, positions, positions, torch.zeros_like(tokens))
        return out[-1].float()

    def continue_text(self, prompt: str, num_tokens: int, temperature: float, top_k: int, seed: int) -> str:
        """Up to `num_tokens` more tokens, ending early at the end of a document."""
        ids = [int(token) for token in self.tokenizer.encode_batch([prompt])[0]]
        begin, random = len(ids), torch.Generator().manual_seed(seed)
        for _ in range(num_tokens):
            logits = self.logits(ids)
            if temperature == 0.0:
                choice = int(logits.argmax())
            else:
                best = logits.topk(min(top_k, len(logits)))
                draw = torch.multinomial((best.values / temperature).softmax(-1), 1, generator=random)
                choice = int(best.indices[draw])
            if choice == self.tokenizer.special.eos:
                break
            ids.append(choice)
        return self.tokenizer.decode(ids)[len(self.tokenizer.decode(ids[:begin])) :]
