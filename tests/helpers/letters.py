"""A tokenizer.json of letters."""

from __future__ import annotations

from pathlib import Path
from string import ascii_lowercase

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def make_tokenizer(folder: Path) -> Path:
    """Letters and spaces, one token each, and the token that ends documents."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {letter: 2 + number for number, letter in enumerate(ascii_lowercase + " ")}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"
