"""The tokenizer of an exported model, and the ids with which a text begins and ends.

AutoTokenizer must give the ids that training saw, so the files are made of one kind, `tokenizer.json`, and every piece
of the vocabulary is encoded by both before anything is written. One difference stays: a text that spells a special
token is text to training, and the token to AutoTokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_fp4.data.config import DataConfig
from megatron_fp4.data.shards.manifest import MANIFEST, read_manifest
from megatron_fp4.data.text.files import require_package
from megatron_fp4.data.text.special import SpecialChoice
from megatron_fp4.data.text.tiktoken_file import PROBE
from megatron_fp4.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_fp4.interop.export.tokenizer_json import tokenizer_json

ROLES = ("bos", "eos", "pad")
WINDOW = 5
"""Pieces that are encoded together as one text, beside each alone."""


@dataclass(frozen=True)
class ExportedText:
    """ids: of bos, eos and pad, None where nothing says. files: by name. notes: what the user should know."""

    ids: dict[str, int | None]
    files: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def config_ids(self) -> dict[str, int | None]:
        """The keys of config.json and generation_config.json; null is written, for a default would be another's."""
        return {f"{role}_token_id": self.ids.get(role) for role in ROLES}


def without_tokenizer(choice: SpecialChoice) -> ExportedText:
    """A model without tokenizer files; the ids are those that the user gives. Raises ValueError for other texts."""
    ids: dict[str, int | None] = {}
    for role in ROLES:
        text = getattr(choice, role)
        if text and not text.isdecimal():
            raise ValueError(f"--{role} {text}: without a tokenizer only an id says which token it is")
        ids[role] = int(text) if text else None
    notes = ["no tokenizer files are written"]
    if ids["eos"] is None:
        notes.append("no token ends a text, so generation goes on to its limit; --eos ID names one")
    return ExportedText(ids, notes=notes)


def exported_text(path: str, data: DataConfig, choice: SpecialChoice, max_tokens: int) -> ExportedText:
    """The tokenizer `path` as files of transformers. max_tokens: of a sample in training.

    choice: tokens that the user names. Without one, eos is what ended the documents of the run's shards, where their
    manifests are there to be asked, else what the tokenizer says. Raises ValueError and FileNotFoundError with the
    remedy, also where AutoTokenizer would give other ids.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"the tokenizer {path} of the run is not here; --tokenizer FILE says where it is, --no-tokenizer leaves it"
            " out"
        )
    tokenizer = load_tokenizer(path, choice)
    ended_by = _end_of_documents(data, tokenizer)
    if not choice.eos and ended_by not in (None, tokenizer.special.eos):
        tokenizer = load_tokenizer(path, SpecialChoice(choice.bos, tokenizer.piece(ended_by), choice.pad))
    tokenizer.special.require("eos", path)
    content = tokenizer_json(tokenizer)
    count = _check_equal(tokenizer, content)
    ids = tokenizer.special.ids()
    named = {f"{role}_token": tokenizer.piece(token) for role, token in ids.items() if token is not None}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_tokens,
    }
    files = {"tokenizer.json": _json(content), "tokenizer_config.json": _json(config)}
    return ExportedText(ids, files, [f"tokenizer.json gives the ids of {path} on {count:,} texts"])


def _json(values: Any) -> bytes:
    return json.dumps(values, ensure_ascii=False, indent=1).encode()


def _end_of_documents(data: DataConfig, tokenizer: Tokenizer) -> int | None:
    """The token that ended every document of the run's shard sets; None where nothing says, or several.

    Raises ValueError for shards of another tokenizer.
    """
    ends = set()
    folders = [Path(path) for source in data.sources for path in source.paths if (Path(path) / MANIFEST).is_file()]
    for folder in folders:
        manifest = read_manifest(folder)
        made_by = (manifest.get("tokenizer") or {}).get("fingerprint")
        if made_by and made_by != tokenizer.fingerprint:
            raise ValueError(
                f"{folder} was made with the tokenizer {made_by}, and {tokenizer.path} is {tokenizer.fingerprint};"
                " --tokenizer FILE says where the right one is"
            )
        ends.add((manifest.get("special_tokens") or {}).get("eos"))
    return ends.pop() if len(ends) == 1 else None


def _check_equal(tokenizer: Tokenizer, content: dict[str, Any]) -> int:
    """The number of texts that were compared. Raises ValueError with one that the two encode differently."""
    library = require_package("tokenizers")
    other = library.Tokenizer.from_str(json.dumps(content))
    special = [token["content"] for token in content["added_tokens"] if token["special"]]
    for role, token in tokenizer.special.ids().items():
        if token is not None and other.token_to_id(tokenizer.piece(token)) != token:
            raise ValueError(
                f"a tokenizer.json cannot say that {role} of {tokenizer.path} is {token}; --no-tokenizer leaves it out"
            )
    texts = list(_without(_probes(tokenizer), special))
    theirs = [one.ids for one in other.encode_batch(texts, add_special_tokens=False)]
    for text, expected, got in zip(texts, tokenizer.encode_batch(texts), theirs, strict=True):
        if expected.tolist() != got:
            raise ValueError(
                f"AutoTokenizer would encode {text!r} as {got[:8]}, training as {expected.tolist()[:8]}: a"
                f" tokenizer.json cannot say what {tokenizer.path} does; --no-tokenizer leaves it out"
            )
    return len(texts)


def _probes(tokenizer: Tokenizer) -> Iterator[str]:
    """Texts of every kind of character, every piece of the vocabulary, and pieces joined."""
    yield from (PROBE, f" {PROBE}", f"\n\n{PROBE * 2}", PROBE.swapcase(), "  two  spaces\n\n\n")
    pieces = [_spelling(tokenizer, number) for number in range(tokenizer.vocab_size)]
    yield from pieces
    yield from ("".join(pieces[first : first + WINDOW]) for first in range(0, len(pieces), WINDOW))


def _spelling(tokenizer: Tokenizer, number: int) -> str:
    """The text of one token; "" where the ids have a gap."""
    try:
        return tokenizer.decode([number]) if tokenizer.piece(number) else ""
    except KeyError:  # tiktoken's word for a gap
        return ""


def _without(texts: Iterable[str], special: Sequence[str]) -> Iterator[str]:
    """The texts that spell no special token."""
    return (text for text in texts if text and not any(token in text for token in special))
