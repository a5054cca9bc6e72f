"""Text <-> ids behind one small interface: sentencepiece, Hugging Face tokenizer.json, tiktoken vocabularies.

A tokenizer is identified by the content of its file (sha256, `fingerprint`); the shards' manifest holds it, and a run
refuses shards of another. No special token is ever made by `encode_batch`, whatever the text spells: who writes shards
appends the one that ends a document.

Not here: which token that is (special.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_fp4.data.text.sentencepiece_model import SentencePieceTokenizer
from megatron_fp4.data.text.special import UNSAID, SpecialChoice, SpecialTokens
from megatron_fp4.data.text.tiktoken_file import TiktokenTokenizer
from megatron_fp4.data.text.tokenizer_json import HuggingFaceTokenizer


class Tokenizer(Protocol):
    path: Path
    vocab_size: int  # true size, not padded
    special: SpecialTokens
    fingerprint: str

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def piece(self, token_id: int) -> str: ...
    def text_bytes(self) -> list[float]: ...  # of each id, in UTF-8; 0 for what is no text, NaN where none can tell


def load_tokenizer(path: str | Path, choice: SpecialChoice = UNSAID) -> Tokenizer:
    """Open a tokenizer by the ending of its file: .model, .json or .tiktoken.

    choice: tokens that the user names as begin, end and padding. Raises ValueError (FileNotFoundError) with the remedy.
    """
    path = Path(path)
    kinds = {".model": SentencePieceTokenizer, ".json": HuggingFaceTokenizer, ".tiktoken": TiktokenTokenizer}
    if path.suffix not in kinds:
        raise ValueError(f"tokenizer {str(path)!r}: the ending must be one of {sorted(kinds)}")
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer {path} does not exist; data_tools.train_tokenizer makes one")
    return kinds[path.suffix](path, choice)


def describe_tokenizer(tokenizer: Tokenizer, rows: int | None = None) -> str:
    """Start-up lines: ids and text of bos/eos/pad/unk, vocabulary, fingerprint.

    rows: how many the model's embedding has.
    """
    special = tokenizer.special
    lines = []
    for role in ("bos", "eos", "pad", "unk"):
        token_id = getattr(special, role)
        several = ", ".join(f"{number} {text!r}" for text, number in special.candidates.get(role, {}).items())
        unknown = f"not decided between {several}" if several else "none"
        known = "" if token_id is None else f"{token_id} {tokenizer.piece(token_id)!r}"
        said_by = f" (says {special.said_by[role]})" if role in special.said_by else ""
        lines.append(f"  {role} {known or unknown}{said_by}")
    rows = tokenizer.vocab_size if rows is None else rows
    padded = f"padded to {rows}" if rows > tokenizer.vocab_size else "not padded"
    return "\n".join([f"tokenizer {tokenizer.fingerprint}", *lines, f"  vocabulary {tokenizer.vocab_size}, {padded}"])


def eos_of(tokenizer: Tokenizer) -> int:
    """The id that ends a document; ValueError if it is not known, or not decided."""
    return tokenizer.special.require("eos", f"tokenizer {tokenizer.path}")
