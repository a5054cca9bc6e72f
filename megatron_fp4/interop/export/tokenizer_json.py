"""A tokenizer of any of our kinds as the `tokenizer.json` that AutoTokenizer reads, without what would add tokens.

    .json       itself; a post-processor that begins texts with bos goes, for training never saw one there
    .model      BPE or unigram over characters, spaces spelled U+2581, unknown characters as bytes
    .tiktoken   BPE over bytes; the merges are what the ranks imply

Whether the result gives our ids is not argued but tried (text.py).
"""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_fp4.data.text.files import require_package
from megatron_fp4.data.text.tiktoken_file import meaning_of, ranks_of
from megatron_fp4.data.text.tokenizer import Tokenizer

SPACE = "\u2581"
ADDS_TOKENS = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
"""Post-processors that write special tokens around a text."""


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json. Raises ValueError for a model that it cannot express."""
    makers = {".json": _from_json, ".model": _from_sentencepiece, ".tiktoken": _from_tiktoken}
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
    }
    content |= makers[tokenizer.path.suffix](tokenizer)
    roles = {token for token in tokenizer.special.ids().values() if token is not None}
    for token in content["added_tokens"]:
        token["special"] |= token["id"] in roles
    return content


def _added(number: int, text: str, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": text, **flags, "special": special}


def _from_json(tokenizer: Tokenizer) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(tokenizer.path.read_bytes())
    content |= {"truncation": None, "padding": None, "post_processor": _silent(content.get("post_processor"))}
    if content["model"].get("dropout"):
        content["model"]["dropout"] = None
    return content


def _silent(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """A post-processor without the parts that add tokens."""
    if processor is None or processor["type"] in ADDS_TOKENS:
        return None
    if processor["type"] == "Sequence":
        kept = [one for one in map(_silent, processor["processors"]) if one is not None]
        return {**processor, "processors": kept} if kept else None
    return processor


def _from_sentencepiece(tokenizer: Tokenizer) -> dict[str, Any]:
    schema: Any = require_package("sentencepiece.sentencepiece_model_pb2")
    proto = schema.ModelProto()
    proto.ParseFromString(tokenizer.path.read_bytes())
    kinds, trainer = schema.ModelProto.SentencePiece, schema.TrainerSpec
    if proto.trainer_spec.model_type not in (trainer.BPE, trainer.UNIGRAM):
        raise ValueError(f"{tokenizer.path} is neither BPE nor unigram, which is all that a tokenizer.json can say")
    roles = {token for token in tokenizer.special.ids().values() if token is not None}
    added = [
        _added(number, piece.piece, special=piece.type != kinds.USER_DEFINED)
        for number, piece in enumerate(proto.pieces)
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN, kinds.USER_DEFINED) or number in roles
    ]
    bytes_known = any(piece.type == kinds.BYTE for piece in proto.pieces)
    dummy = proto.normalizer_spec.add_dummy_prefix
    model: dict[str, Any] = {"byte_fallback": bytes_known}
    unknown = next((number for number, piece in enumerate(proto.pieces) if piece.type == kinds.UNKNOWN), None)
    if proto.trainer_spec.model_type == trainer.UNIGRAM:
        vocabulary = [[piece.piece, piece.score] for piece in proto.pieces]
        model |= {"type": "Unigram", "unk_id": unknown, "vocab": vocabulary}
    else:
        scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == kinds.NORMAL}
        model |= {
            "type": "BPE",
            "unk_token": None if unknown is None else proto.pieces[unknown].piece,
            "fuse_unk": True,
            "vocab": {piece.piece: number for number, piece in enumerate(proto.pieces)},
            "merges": [[left, right] for left, right in _merges(scores)],
        }
    spelled: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    stripped = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if dummy else []
    decoders = [*spelled, {"type": "ByteFallback"}, {"type": "Fuse"}, *stripped]
    return {
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(proto.normalizer_spec)},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def _normalizers(rules: Any) -> list[dict[str, Any]]:
    """What sentencepiece does to a text before it looks for pieces."""
    steps: list[dict[str, Any]] = []
    if rules.precompiled_charsmap:
        encoded = base64.b64encode(rules.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    if rules.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if rules.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    return [*steps, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]


def _merges(scores: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """The pairs that sentencepiece joins, best first: it joins any two neighbours that spell a piece."""
    for piece in sorted(scores, key=lambda text: -scores[text]):
        for cut in range(1, len(piece)):
            if piece[:cut] in scores and piece[cut:] in scores:
                yield piece[:cut], piece[cut:]


def _from_tiktoken(tokenizer: Tokenizer) -> dict[str, Any]:
    data = tokenizer.path.read_bytes()
    ranks, (pattern, special) = ranks_of(tokenizer.path, data), meaning_of(tokenizer.path, data)
    letters = _byte_letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [[spelled(left), spelled(right)] for left, right in _rank_merges(ranks)]
    vocabulary = {spelled(token): rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])}
    split = {"type": "Split", "pattern": {"Regex": _portable(pattern)}, "behavior": "Isolated", "invert": False}
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "added_tokens": [_added(number, text, special=True) for text, number in special.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, by_bytes]},
        "decoder": by_bytes,
        # special tokens too: the library numbers those that the vocabulary lacks anew, without the gaps before them
        "model": {"type": "BPE", "ignore_merges": True, "vocab": {**vocabulary, **special}, "merges": merges},
    }


def _rank_merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The last join that makes each token of several bytes, in order of rank."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joins = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            best = min(range(len(joins)), key=joins.__getitem__)
            if joins[best] >= rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def _portable(pattern: str) -> str:
    """A pattern of tiktoken's engine for Oniguruma, to which `{1,3}+` is no possessive count and `$` ends each line."""
    counted = re.sub(r"(\{\d+,?\d*\})\+", r"\1", pattern)
    return re.sub(r"(?<!\\)\$", r"\\z", counted)


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable letter of each byte."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + number) for number, byte in enumerate(hidden)}
