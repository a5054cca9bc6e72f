"""`tokenizer.json` files of Hugging Face's `tokenizers` library."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_fp4.data.text.files import fingerprint_of, require_package
from megatron_fp4.data.text.special import UNSAID, SpecialChoice, resolve


class HuggingFaceTokenizer:
    """A tokenizer.json. Text that spells a special token is encoded as text: only who writes shards ends documents."""

    def __init__(self, path: Path, choice: SpecialChoice = UNSAID) -> None:
        library = require_package("tokenizers")
        data = path.read_bytes()
        try:
            stored: dict[str, Any] = json.loads(data)
            self._model = library.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from None
        added = stored.get("added_tokens") or []
        vocabulary = self._model.get_vocab()
        self.path = path
        self.fingerprint = fingerprint_of(data)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1  # not their number: ids may have gaps
        if not self.vocab_size:
            raise ValueError(f"{path} has an empty vocabulary; copy it again")
        self.special = resolve(
            choice,
            path,
            lookup=vocabulary.get,
            vocab_size=self.vocab_size,
            declared={token["content"]: token["id"] for token in added if token["special"]},
            own={"unk": _unknown(stored["model"], vocabulary)},
        )
        known = {role: token for role, token in self.special.ids().items() if token is not None}
        unknown = self.special.unk  # which often pads, too
        self._never = np.array([token for role, token in known.items() if token != unknown or role == "eos"])
        undeclared = [token for token in added if not token["special"] and token["id"] in self._never]
        for token in undeclared:
            token["special"] = True
        if undeclared:  # a vocabulary of 256k tokens is not read twice without need
            self._model = library.Tokenizer.from_str(json.dumps(stored))
        self._model.encode_special_tokens = True
        self._model.no_truncation()
        self._model.no_padding()
        if getattr(self._model.model, "dropout", None):  # of merges, for training: each encoding would be another one
            self._model.model.dropout = None
        self._decoders = _types(stored.get("decoder"))
        self._added = {token["id"]: "" if token["special"] else token["content"] for token in added}
        self._spelled: dict[int, list[int]] = {}
        if stored["model"].get("type") == "Unigram":
            special = {token["content"]: token["id"] for token in added if token["special"] and token["id"] != unknown}
            self._spelled = _by_character(special, vocabulary, unknown)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Raises ValueError where ordinary text would become a special token all the same."""
        encoded = self._model.encode_batch(list(texts), add_special_tokens=False)
        documents = [np.array(self._as_text(one.ids), np.int32) for one in encoded]
        for ids in documents:
            control = ids[np.isin(ids, self._never)]
            if len(control):
                raise ValueError(
                    f"ordinary text is encoded as {control[0]} {self.piece(control[0])!r}, a special token of"
                    f" {self.path} that its vocabulary can also spell; choose another with --eos, --bos or --pad"
                )
        return documents

    def _as_text(self, ids: list[int]) -> list[int]:
        """A unigram model holds its special tokens as pieces, which win where text spells them: characters instead."""
        if self._spelled.keys().isdisjoint(ids):
            return ids
        return [part for token in ids for part in self._spelled.get(token, [token])]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(map(int, ids)), skip_special_tokens=False)

    def piece(self, token_id: int) -> str:
        return self._model.id_to_token(int(token_id)) or ""

    def text_bytes(self) -> list[float]:
        return [self._text_bytes(token) for token in range(self.vocab_size)]

    def _text_bytes(self, token: int) -> float:
        """Pieces over bytes have a character for each; others are text, but for U+2581 as blank, and <0xNN> as byte."""
        piece = self.piece(token)
        if token == self.special.unk or not piece:
            return math.nan
        if token in self._added:
            return float(len(self._added[token].encode()))
        if "ByteLevel" in self._decoders:
            return float(len(piece))
        if not {"Metaspace", "Replace", "Fuse"} & self._decoders:
            return math.nan
        is_byte = "ByteFallback" in self._decoders and re.fullmatch("<0x[0-9A-F]{2}>", piece)
        return 1.0 if is_byte else float(len(piece.replace("\u2581", " ").encode()))


def _types(part: dict[str, Any] | None) -> set[str]:
    """The type of a part of a tokenizer.json, and those that a sequence is made of."""
    part = part or {}
    inner = [one for key in ("decoders", "normalizers", "pretokenizers") for one in part.get(key) or []]
    return {part.get("type", "")}.union(*map(_types, inner))


def _unknown(model: dict[str, Any], vocabulary: dict[str, int]) -> int | None:
    """The id for what the vocabulary lacks: a unigram model has its number, others its text."""
    number = model.get("unk_id")
    return number if number is not None else vocabulary.get(model.get("unk_token") or "")


def _by_character(special: dict[str, int], vocabulary: dict[str, int], unknown: int | None) -> dict[int, list[int]]:
    """The ids that spell each special token; none for one that has a single character, or one that is in no piece."""
    spelled: dict[int, list[int]] = {}
    for text, number in special.items():
        ids = [vocabulary.get(character, unknown) for character in text]
        if len(text) > 1 and None not in ids:
            spelled[number] = [token for token in ids if token is not None]
    return spelled
