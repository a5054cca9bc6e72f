"""How many bytes of text stand behind tokens: what makes losses comparable between tokenizers.

A loss in nats per token is lower for a vocabulary of shorter pieces; per byte of text it is not. The bytes are those
of the text that the tokenizer gives back, so they are exact where it gives back what it was given. That is tried with
texts that are often changed (composed letters, blanks in a row, capitals): who changes one of them gets no number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fp4.data.batch import Batch
from megatron_fp4.data.text.tokenizer import Tokenizer

PROBES = (
    "x",
    "It's 1 text, 23",
    "two  blanks",
    "a\tb",
    "one\nmore\r\n",
    "NaÏve É",
    "e\u0301",
    "\ufb01 \u2460",
    "日本",
    "x ",
)


@dataclass(frozen=True)
class TextBytes:
    """lengths: bytes of each token, FP64 `[V]`, 0 for what is no text, NaN where none can tell. end: the token that
    ends documents. has_prefix: whether the first piece of a document begins with a blank that is not in the text.
    """

    lengths: Tensor
    end: int | None
    has_prefix: bool

    def of_targets(self, batch: Batch) -> float:
        """Bytes of the tokens of a batch that are targets; NaN where one of them is not known."""
        tokens, labels = batch.tokens[batch.loss_mask], batch.labels[batch.loss_mask]
        if bool((labels >= len(self.lengths)).any()):
            return math.nan
        lengths = self.lengths[labels]
        if self.has_prefix:
            lengths = lengths - ((tokens == self.end) & (lengths > 0)).double()
        return float(lengths.sum())


def text_bytes(tokenizer: Tokenizer) -> TextBytes | None:
    """The bytes behind each token; None where a tokenizer changes text, or does not say what its pieces are."""
    lengths = torch.tensor(tokenizer.text_bytes(), dtype=torch.float64)
    surplus = set()
    for text, encoded in zip(PROBES, tokenizer.encode_batch(PROBES), strict=True):
        ids = encoded.tolist()
        total = float(lengths[ids].sum())
        if math.isnan(total):
            continue  # with characters that the vocabulary does not have
        if tokenizer.decode(ids) != text:
            return None
        surplus.add(total - len(text.encode()))
    if surplus not in ({0.0}, {1.0}):
        return None
    end, has_prefix = tokenizer.special.eos, surplus == {1.0}
    return None if has_prefix and end is None else TextBytes(lengths, end, has_prefix)
