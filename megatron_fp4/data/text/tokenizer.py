"""Text <-> ids behind one small interface: sentencepiece, Hugging Face tokenizer.json, tiktoken vocabularies.

A tokenizer is identified by the content of its file (sha256, `fingerprint`); the shards' manifest holds it,
and a run refuses shards of another. No special token is ever added by `encode`: who writes shards appends EOS.
The libraries behind it are imported on use; a missing one is a ValueError that says what to install.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_fp4.data.text.chunk_encoder import ChunkEncoder

# The split pattern of cl100k_base, the common one; a .tiktoken file holds ranks only. Override in <file>.json.
TIKTOKEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "[SEP]")
BEGIN_NAMES = ("<s>", "<|startoftext|>", "<|begin_of_text|>", "<bos>", "<|bos|>", "[CLS]")
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")
UNK_NAMES = ("<unk>", "[UNK]")


@dataclass(frozen=True)
class SpecialTokens:
    """Ids, or None where the vocabulary has no such token."""

    bos: int | None
    eos: int | None
    pad: int | None
    unk: int | None


class Tokenizer(Protocol):
    vocab_size: int  # true size, not padded
    special: SpecialTokens
    fingerprint: str

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def piece(self, token_id: int) -> str: ...


class SentencePieceTokenizer:
    """A .model file; `fast=False` switches the chunk cache off (same ids, for comparison)."""

    def __init__(self, path: Path, *, fast: bool = True) -> None:
        spm = _require("sentencepiece", "sentencepiece")
        data = path.read_bytes()
        try:
            self._model = spm.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise ValueError(f"{path} is not a sentencepiece model: {error}") from None
        self.fingerprint = _fingerprint(data)
        self.vocab_size = int(self._model.get_piece_size())
        ids = (self._model.bos_id(), self._model.eos_id(), self._model.pad_id(), self._model.unk_id())
        self.special = SpecialTokens(*(i if i >= 0 else None for i in ids))
        self._chunks = ChunkEncoder.for_model(self._model) if fast else None

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        if self._chunks is not None:
            return [self._chunks.encode(text) for text in texts]
        return [np.array(ids, np.int32) for ids in self._model.encode(list(texts), num_threads=1)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(map(int, ids)))

    def piece(self, token_id: int) -> str:
        return self._model.id_to_piece(int(token_id))


class HuggingFaceTokenizer:
    """A tokenizer.json of the `tokenizers` library; special ids are found by their usual names."""

    def __init__(self, path: Path) -> None:
        library = _require("tokenizers", "tokenizers")
        data = path.read_bytes()
        try:
            self._model = library.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from None
        self._model.no_truncation()
        self._model.no_padding()
        self.fingerprint = _fingerprint(data)
        vocabulary = self._model.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1  # not their number: ids may have gaps
        self.special = _named(vocabulary)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        return [np.array(i.ids, np.int32) for i in self._model.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(map(int, ids)), skip_special_tokens=False)

    def piece(self, token_id: int) -> str:
        return self._model.id_to_token(int(token_id)) or ""


class TiktokenTokenizer:
    """A .tiktoken file (base64 token and rank per line).

    Beside it an optional <file>.json: {"pattern": "...", "special_tokens": {"<|endoftext|>": 100257}}. Without it the
    split pattern of cl100k_base is used and <|endoftext|> is the id after the last rank.
    """

    def __init__(self, path: Path) -> None:
        library = _require("tiktoken", "tiktoken")
        data = path.read_bytes()
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(data.splitlines(), 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise ValueError(f"{path}, line {number}: expected 'base64-token rank', got {line[:60]!r}") from None
        side = Path(f"{path}.json")
        options: dict[str, Any] = json.loads(side.read_text()) if side.is_file() else {}
        special = options.get("special_tokens", {"<|endoftext|>": max(ranks.values()) + 1})
        pattern = options.get("pattern", TIKTOKEN_PATTERN)
        self._model = library.Encoding(path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.fingerprint = _fingerprint(data + json.dumps([pattern, special], sort_keys=True).encode())
        self.vocab_size = int(self._model.n_vocab)
        self.special = _named(special)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        return [np.array(self._model.encode_ordinary(text), np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(map(int, ids)))

    def piece(self, token_id: int) -> str:
        return self._model.decode_single_token_bytes(int(token_id)).decode("utf-8", errors="backslashreplace")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer by the ending of its file: .model, .json or .tiktoken."""
    path = Path(path)
    kinds = {".model": SentencePieceTokenizer, ".json": HuggingFaceTokenizer, ".tiktoken": TiktokenTokenizer}
    if path.suffix not in kinds:
        raise ValueError(f"tokenizer {str(path)!r}: the ending must be one of {sorted(kinds)}")
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer {path} does not exist; data_tools.train_tokenizer makes one")
    return kinds[path.suffix](path)


def describe_tokenizer(tokenizer: Tokenizer, rows: int | None = None) -> str:
    """Start-up lines: ids and text of bos/eos/pad/unk, vocabulary, fingerprint. rows: of the model's embedding."""
    special = tokenizer.special
    lines = []
    for name in ("bos", "eos", "pad", "unk"):
        token_id = getattr(special, name)
        lines.append(f"  {name} " + ("none" if token_id is None else f"{token_id} {tokenizer.piece(token_id)!r}"))
    rows = tokenizer.vocab_size if rows is None else rows
    padded = f"padded to {rows}" if rows > tokenizer.vocab_size else "not padded"
    return "\n".join([f"tokenizer {tokenizer.fingerprint}", *lines, f"  vocabulary {tokenizer.vocab_size}, {padded}"])


def eos_of(tokenizer: Tokenizer) -> int:
    """The id that ends a document; ValueError if the vocabulary has none."""
    if tokenizer.special.eos is None:
        raise ValueError(f"the tokenizer has no end-of-document token under any of the names {END_NAMES}")
    return tokenizer.special.eos


def _named(vocabulary: dict[str, int]) -> SpecialTokens:
    def first(names: Sequence[str]) -> int | None:
        return next((vocabulary[name] for name in names if name in vocabulary), None)

    return SpecialTokens(first(BEGIN_NAMES), first(END_NAMES), first(PAD_NAMES), first(UNK_NAMES))


def _fingerprint(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _require(module: str, package: str) -> Any:
    try:
        return __import__(module)
    except ImportError:
        raise ValueError(f"this tokenizer needs the package {package!r}: pip install {package}") from None
