"""Which ids begin and end a document: said by the user, by the files beside the tokenizer, or declared in it.

A guess by spelling picks an ordinary piece: `</s>` is a word piece of one vocabulary and an HTML tag in another, while
the real end is `<|endoftext|>` or `<eos>`. So names count only among tokens that the tokenizer declares special, and
where two of them could be meant, or two files say different ends, nobody is chosen and `require` refuses with both.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

NAMES = {
    "eos": ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "[SEP]"),
    "bos": ("<s>", "<|startoftext|>", "<|begin_of_text|>", "<bos>", "<|bos|>", "[CLS]"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
    "unk": ("<unk>", "[UNK]"),
}
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
"""In order: the first one that names a role decides it; of the end all that name it must agree."""

Lookup = Callable[[str], int | None]


@dataclass(frozen=True)
class SpecialChoice:
    """What the user says, as the text of a token or as its id; empty where nothing is said."""

    bos: str = ""
    eos: str = ""
    pad: str = ""


UNSAID = SpecialChoice()


@dataclass(frozen=True)
class SpecialTokens:
    """Ids, or None where the vocabulary has no such token, or several that could be meant (`candidates`)."""

    bos: int | None
    eos: int | None
    pad: int | None
    unk: int | None
    candidates: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    said_by: Mapping[str, str] = field(default_factory=dict)
    """The option or the file beside the tokenizer that decided a role."""

    def ids(self) -> dict[str, int | None]:
        """The four ids by role, for the manifest."""
        return {role: getattr(self, role) for role in NAMES}

    def require(self, role: str, where: str) -> int:
        """The id of a role. Raises ValueError, with the candidates, where it is not known; `where` names the file."""
        token = getattr(self, role)
        if token is not None:
            return int(token)
        several = self.candidates.get(role)
        if several:
            listed = " and ".join(f"{number} {text!r}" for text, number in several.items())
            raise ValueError(f"{where} declares several tokens that may be its {role}: {listed}; choose with --{role}")
        raise ValueError(
            f"{where} says of no token that it is its {role}; name it with --{role} TOKEN_OR_ID (the token's text, or"
            " its id)"
        )


def resolve(
    choice: SpecialChoice,
    path: Path,
    *,
    lookup: Lookup,
    vocab_size: int,
    declared: Mapping[str, int],
    own: Mapping[str, int | None] | None = None,
    beside: bool = True,
) -> SpecialTokens:
    """The special tokens of the tokenizer `path`: chosen, else its `own`, else of a file beside it, else declared.

    lookup: id of a token's text. declared: text and id of the tokens that the tokenizer itself calls special. own: the
    roles that the format has a field for. beside: whether the files beside it are asked. Raises ValueError for a
    choice, or a name in such a file, that is no token.
    """
    known = {role: number for role, number in (own or {}).items() if number is not None}
    ids: dict[str, int | None] = {}
    candidates: dict[str, Mapping[str, int]] = {}
    said_by: dict[str, str] = {}
    for role, names in NAMES.items():
        chosen = str(getattr(choice, role, ""))
        if chosen:
            ids[role] = _token_id(chosen, lookup, vocab_size, f"--{role} {chosen}", path)
            said_by[role] = f"--{role}"
            continue
        stated = {f"{role} of {path.name}": known[role]} if role in known else {}
        named = _ids_beside(path, role, lookup, vocab_size, needed=role == "eos" and not stated) if beside else {}
        stated |= {f"{role} of {name}": number for name, number in named.items()}
        if named and role not in known:
            said_by[role] = next(iter(named))
        if role != "eos":
            stated = dict(itertools.islice(stated.items(), 1))
        fitting = stated or {name: declared[name] for name in names if name in declared}
        ids[role] = next(iter(fitting.values())) if len(set(fitting.values())) == 1 else None
        if len(fitting) > 1 and ids[role] is None:
            candidates[role] = fitting
    return SpecialTokens(ids["bos"], ids["eos"], ids["pad"], ids["unk"], candidates, said_by)


def choice_of(options: Any) -> SpecialChoice:
    """The choice that the parsed arguments `--bos`, `--eos`, `--pad` make."""
    return SpecialChoice(**{item.name: getattr(options, item.name) or "" for item in fields(SpecialChoice)})


def _token_id(text: str, lookup: Lookup, vocab_size: int, choice: str, path: Path) -> int:
    """The id that a token's text, or the digits of an id, stand for. Raises ValueError for "2" where both could be."""
    token = lookup(text)
    number = int(text) if text.isascii() and text.isdecimal() and int(text) < vocab_size else None
    if token is not None and number is not None and token != number:
        raise ValueError(
            f"{choice} may be the id {number}, or the token {text!r} of {path}, whose id is {token}; give the text of"
            " the token that is meant"
        )
    token = number if token is None else token
    if token is None:
        raise ValueError(f"{choice} is no token of {path}, whose ids are 0 to {vocab_size - 1}")
    return token


def _ids_beside(path: Path, role: str, lookup: Lookup, vocab_size: int, *, needed: bool) -> dict[str, int]:
    """What the files beside the tokenizer say of a role, by file. A token that it lacks is refused if it is needed."""
    ids = {}
    for token, side in _named_beside(path, role):
        number = lookup(token) if isinstance(token, str) else token
        if type(number) is int and 0 <= number < vocab_size:
            ids[side.name] = number
        elif needed:
            raise ValueError(
                f"{role} {token!r} of {side} is no token of {path}, whose ids are 0 to {vocab_size - 1}; name it with"
                f" --{role} TOKEN_OR_ID"
            )
    return ids


def _named_beside(path: Path, role: str) -> Iterator[tuple[Any, Path]]:
    """What the files beside the tokenizer say of a role: the text of a token, or an id, which is a number there."""
    for name in SIDE_FILES:
        side = path.parent / name
        if not side.is_file() or side == path:
            continue
        try:
            stated = json.loads(side.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{side} beside the tokenizer is not valid JSON ({error}); mend or remove it") from None
        if not isinstance(stated, dict):
            continue
        token = stated.get(f"{role}_token")
        if token is None:
            token = stated.get(f"{role}_token_id")
        if isinstance(token, Sequence) and not isinstance(token, str):
            token = token[0] if len(token) == 1 else None  # several ends are a chat model's, not a document's
        if isinstance(token, dict):
            token = token.get("content")
        if token is not None and token != "":
            yield token, side
