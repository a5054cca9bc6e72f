"""The language model that lm-eval 0.4 asks, computed by a trained run on all its ranks.

lm-eval runs on rank 0, and knows this model as one of a single process. No begin-of-document token is put before a
text unless it is asked for: documents of our shards begin without one (`data tokenize` writes one eos behind each), and
a token that the model never saw costs it nats at the start of every text. Where a text has no context, the token that
ends documents stands before it, which is what training saw there.

Imports lm_eval; what does not judge must not import this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from megatron_fp4.data.text.tokenizer import Tokenizer, eos_of
from megatron_fp4.inference.lead import Led
from megatron_fp4.inference.model import Prompt, Sampling, Score, TokenRow

UNDERSTOOD = {"do_sample", "temperature", "top_k", "until", "max_gen_toks"}
"""What of a task's generation settings has a meaning here."""
TOP_K = 50
"""Of how many tokens a task that samples draws where it does not say: transformers' default."""


class HarnessModel(TemplateLM):
    """See the module. led: has `score` and `complete`. bos: whether texts begin with the tokenizer's bos.

    max_length: tokens of a row, the run's sequence. Raises ValueError where the tokenizer has no eos, or no bos that
    was asked for.
    """

    def __init__(self, led: Led, tokenizer: Tokenizer, max_length: int, *, bos: bool = False) -> None:
        super().__init__()
        self._led = led
        self._tokenizer, self._max_length = tokenizer, max_length
        self._eos = eos_of(tokenizer)
        self._bos = [tokenizer.special.require("bos", f"tokenizer {tokenizer.path}")] if bos else []

    @property
    def eot_token_id(self) -> int:
        return self._eos

    @property
    def prefix_token_id(self) -> int:
        return self._bos[0] if self._bos else self._eos

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        (ids,) = self._tokenizer.encode_batch([string])
        before = [] if add_special_tokens is False else self._bos
        return [*before, *(int(token) for token in ids)]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """ln p of each text, in windows of the sequence that do not overlap, but for one token of context."""
        windows: list[tuple[int, TokenRow]] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in utils.get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self._max_length, context_len=1
            ):
                context, targets = utils.make_disjoint_window(window)
                windows.append((number, TokenRow(context + targets, len(targets))))
        totals = [0.0] * len(requests)
        scores: list[Score] = self._led.call("score", [row for _, row in windows])
        for (number, _), score in zip(windows, scores, strict=True):
            totals[number] += score.log_probability
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        rows = [self._row(context, targets) for _, context, targets in requests]
        scores: list[Score] = self._led.call("score", rows)
        results = [(score.log_probability, score.greedy) for score in scores]
        for (texts, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def _row(self, context: list[int], targets: list[int]) -> TokenRow:
        """What is too long loses its beginning."""
        if len(targets) > self._max_length:
            raise ValueError(
                f"a continuation of {len(targets)} tokens is longer than the run's sequence, {self._max_length}; this"
                " task needs a model with a longer one"
            )
        return TokenRow((context + targets)[-(self._max_length + 1) :], len(targets))

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        texts: list[str] = [""] * len(requests)
        kinds: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(repr(request.args[1]), []).append(number)
        for numbers in kinds.values():
            settings: dict[str, Any] = dict(normalize_gen_kwargs(requests[numbers[0]].args[1]))
            if unknown := sorted(settings.keys() - UNDERSTOOD):
                raise ValueError(
                    f"generation settings {', '.join(unknown)} of a task have no meaning here; remove them"
                )
            added = self._complete([requests[number].args[0] for number in numbers], settings)
            for number, text in zip(numbers, added, strict=True):
                texts[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return texts

    def _complete(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        num_tokens = settings["max_gen_toks"]
        room = self._max_length - num_tokens
        if room < 1:
            raise ValueError(
                f"a task generates {num_tokens} tokens, and the run's sequence has {self._max_length}; say"
                " --gen-kwargs max_gen_toks=N"
            )
        sampling = Sampling(settings.get("temperature", 0.0), settings.get("top_k", TOP_K))
        prompts = [Prompt(self.tok_encode(text)[-room:] or [self._eos], num_tokens, sampling) for text in contexts]
        texts: list[str] = self._led.call("complete", prompts, settings["until"])
        return texts
