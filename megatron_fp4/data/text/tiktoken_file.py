"""`.tiktoken` files: base64 token and rank per line, and nothing else.

How text is split and which ids are special stands in another place, so a file alone does not say how to encode. It
stands in <file>.json here, {"pattern": "...", "special_tokens": {"<|endoftext|>": 100257}}; the published files of
`tiktoken` are known by the hash of their content, which is what the library itself checks
(tiktoken_ext/openai_public.py).
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import operator
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_fp4.data.text.files import fingerprint_of, require_package
from megatron_fp4.data.text.special import UNSAID, SpecialChoice, resolve

LONGEST_RUN = 100_000
"""Characters of white space, or of anything else, in a row. The library's regular expressions overflow their stack on a
million blanks; longer runs are encoded in pieces of this length, the same everywhere."""
_RUNS = re.compile(rf"\s{{{LONGEST_RUN}}}|\S{{{LONGEST_RUN}}}")
PROBE = "It's 1 text, 23,\t\u65e5\u672c\u8a9e\r\n\n  e\u0301 \U0001f600\u200b!?_ "
"""Of every kind of character, so that a pattern which leaves text out is noticed."""

R50K_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Meaning(NamedTuple):
    """What a file of ranks does not say."""

    pattern: str
    special_tokens: dict[str, int]


KNOWN = {  # sha256 of the file
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": Meaning(R50K_PATTERN, {"<|endoftext|>": 50256}),
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069": Meaning(R50K_PATTERN, {"<|endoftext|>": 50256}),
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": Meaning(
        CL100K_PATTERN,
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": Meaning(
        O200K_PATTERN, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}
    ),
}


class TiktokenTokenizer:
    """A .tiktoken file with its <file>.json, or one of the published files."""

    def __init__(self, path: Path, choice: SpecialChoice = UNSAID) -> None:
        library = require_package("tiktoken")
        data = path.read_bytes()
        ranks = ranks_of(path, data)
        pattern, special = meaning_of(path, data)
        self.path = path
        self._ranks, self._special = ranks, special
        _check_special(path, special, ranks)
        self._model = library.Encoding(path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        if not pattern or self.decode(self.encode_batch([PROBE])[0].tolist()) != PROBE:
            raise ValueError(f"the pattern {pattern!r} of {path} leaves text out: {PROBE!r} does not come back")
        self.fingerprint = fingerprint_of(data + json.dumps([pattern, special], sort_keys=True).encode())
        self.vocab_size = int(self._model.n_vocab)
        self.special = resolve(
            choice, path, lookup=self._id_of, vocab_size=self.vocab_size, declared=special, beside=False
        )
        for role, token in self.special.ids().items():
            if token is not None and token not in special.values():
                raise ValueError(
                    f"{role} {token} is an ordinary token of {path}, which text is made of; choose one of its special"
                    f" tokens, {special}"
                )

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        return [np.array(self._encode(text), np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(map(int, ids)))

    def piece(self, token_id: int) -> str:
        return self._model.decode_single_token_bytes(int(token_id)).decode("utf-8", errors="backslashreplace")

    def text_bytes(self) -> list[float]:
        numbers = [math.nan] * self.vocab_size
        for token, rank in self._ranks.items():
            numbers[rank] = float(len(token))
        for number in self._special.values():
            numbers[number] = 0.0
        return numbers

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        start = 0
        for run in _RUNS.finditer(text):
            ids += self._model.encode_ordinary(text[start : run.end()])
            start = run.end()
        return ids + self._model.encode_ordinary(text[start:])

    def _id_of(self, text: str) -> int | None:
        try:
            return int(self._model.encode_single_token(text))
        except KeyError:
            return None


def ranks_of(path: Path, data: bytes) -> dict[bytes, int]:
    """Tokens and their ranks. Raises ValueError for what is no vocabulary over bytes."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"{path}, line {number}: expected 'base64-token rank', got {line[:60]!r}") from None
    if not ranks:
        raise ValueError(f"{path} holds no tokens; copy it again")
    if missing := 256 - sum(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError(f"{path} ({len(ranks)} tokens) lacks {missing} of the 256 single bytes; copy it again")
    numbers = set(ranks.values())
    if len(numbers) < len(ranks) or not 0 <= min(numbers) <= max(numbers) < 2**31:
        raise ValueError(f"{path}: the ranks must be different numbers of 0 to 2^31 - 1; copy it again")
    return ranks


def _check_special(path: Path, special: dict[str, int], ranks: dict[bytes, int]) -> None:
    """Raises ValueError for ids that are no special token's alone."""
    taken = Counter([*special.values(), *ranks.values()])
    for text, number in special.items():
        if taken[number] > 1 or not 0 <= number < 2**31:
            raise ValueError(f"{path}: the id {number} of the special token {text!r} is also another token's, or none")


def meaning_of(path: Path, data: bytes) -> Meaning:
    """Pattern and special tokens, from the file beside it or of a published one. Raises ValueError."""
    side = Path(f"{path}.json")
    if side.is_file():
        try:
            stated: dict[str, Any] = json.loads(side.read_text(encoding="utf-8"))
            special = {text: operator.index(number) for text, number in stated["special_tokens"].items()}
            return Meaning("" + stated["pattern"], special)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{side}: expected {{"pattern": "...", "special_tokens": {{"<|endoftext|>": 100257}}}},'
                f" got {type(error).__name__}: {error}"
            ) from None
    digest = hashlib.sha256(data).hexdigest()
    if digest not in KNOWN:
        raise ValueError(
            f"{path} holds tokens and ranks only, and its content (sha256 {digest[:16]}...) is none of the published"
            f" files: write {side} with its split pattern and special tokens:"
            ' {"pattern": "...", "special_tokens": {...}}'
        )
    return KNOWN[digest]
