"""Sentencepiece `.model` files. The model itself says which ids are bos, eos, pad and unk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_fp4.data.text.chunk_encoder import ChunkEncoder
from megatron_fp4.data.text.files import fingerprint_of, require_package
from megatron_fp4.data.text.special import UNSAID, SpecialChoice, resolve


class SentencePieceTokenizer:
    """A .model file; `fast=False` switches the chunk cache off (same ids, for comparison).

    Text is restored by `decode` except for U+2581, which sentencepiece writes for a space, and for characters that a
    vocabulary without byte pieces does not have.
    """

    def __init__(self, path: Path, choice: SpecialChoice = UNSAID, *, fast: bool = True) -> None:
        spm = require_package("sentencepiece")
        data = path.read_bytes()
        try:
            self._model = spm.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise ValueError(f"{path} is not a sentencepiece model: {error}") from None
        self.path = path
        self.fingerprint = fingerprint_of(data)
        self.vocab_size = int(self._model.get_piece_size())
        if not self.vocab_size:
            raise ValueError(f"{path} ({len(data)} bytes) is not a sentencepiece model: it holds no pieces")
        own = {role: getattr(self._model, f"{role}_id")() for role in ("bos", "eos", "pad", "unk")}
        self.special = resolve(
            choice,
            path,
            lookup=self._id_of,
            vocab_size=self.vocab_size,
            declared={},
            own={role: number if number >= 0 else None for role, number in own.items()},
        )
        self._keep_from_text()
        self._chunks = ChunkEncoder.for_model(self._model) if fast else None

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        if self._chunks is not None:
            return [self._chunks.encode(text) for text in texts]
        return [np.array(ids, np.int32) for ids in self._model.encode(list(texts), num_threads=1)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(map(int, ids)))

    def piece(self, token_id: int) -> str:
        return self._model.id_to_piece(int(token_id))

    def text_bytes(self) -> list[float]:
        return [self._text_bytes(token) for token in range(self.vocab_size)]

    def _text_bytes(self, token: int) -> float:
        model = self._model
        if model.is_unknown(token) or model.is_unused(token):
            return math.nan
        if model.is_control(token):
            return 0.0
        return 1.0 if model.is_byte(token) else float(len(self.piece(token).replace("\u2581", " ").encode()))

    def _keep_from_text(self) -> None:
        """Text never becomes what ends a document, or was chosen: a piece that users define becomes a control piece.

        Raises ValueError for one that words are made of.
        """
        roles = ["eos", *(role for role, by in self.special.said_by.items() if by == f"--{role}")]
        tokens = {role: token for role, token in self.special.ids().items() if role in roles and token is not None}
        tokens = {role: token for role, token in tokens.items() if not self._model.is_control(token)}
        if not tokens:
            return
        schema: Any = require_package("sentencepiece.sentencepiece_model_pb2")
        proto = schema.ModelProto()
        proto.ParseFromString(self._model.serialized_model_proto())
        kinds = schema.ModelProto.SentencePiece
        for role, token in tokens.items():
            if proto.pieces[token].type not in (kinds.USER_DEFINED, kinds.UNUSED):
                raise ValueError(
                    f"{role} {token} {self.piece(token)!r} is an ordinary piece of {self.path}, which text is made of;"
                    f" choose another with --{role}"
                )
            proto.pieces[token].type = kinds.CONTROL
        self._model.LoadFromSerializedProto(proto.SerializeToString())

    def _id_of(self, text: str) -> int | None:
        token = int(self._model.piece_to_id(text))
        return token if self._model.id_to_piece(token) == text else None
