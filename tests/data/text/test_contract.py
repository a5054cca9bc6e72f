"""What every kind of tokenizer promises: text stays text, and comes back; who ends a document is said, not guessed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiktoken_ext.openai_public as published
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fp4.data.text import tiktoken_file as tiktoken_module
from megatron_fp4.data.text.special import SpecialChoice
from megatron_fp4.data.text.tokenizer import Tokenizer, describe_tokenizer, eos_of, load_tokenizer
from tests.data.text import toy_vocabularies as toy

PATTERN = r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
KINDS = ("sentencepiece", "tokenizer.json", "tiktoken")
SPELLED = ("a<eos>b", "</s>", "<s>x</s>", "<|endoftext|>", "a<|endoftext|><|endoftext|> b", "<pad><unk>")


def make(kind: str, folder: Path) -> Tokenizer:
    if kind == "sentencepiece":
        return load_tokenizer(toy.sentencepiece_model(folder / "t.model", byte_fallback=True))
    if kind == "tokenizer.json":
        special = {"<|endoftext|>": True, "<pad>": True, "<tool>": False}
        return load_tokenizer(toy.tokenizer_json(folder / "tokenizer.json", special))
    side = {"pattern": PATTERN, "special_tokens": {"<|endoftext|>": 258, "<pad>": 259}}
    return load_tokenizer(toy.tiktoken_file(folder / "v.tiktoken", side))


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make(request.param, tmp_path_factory.mktemp("vocabulary"))


def control_ids(tokenizer: Tokenizer) -> list[int]:
    return [token for token in tokenizer.special.ids().values() if token is not None]


def check_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_batch([text])[0]
    assert not np.isin(ids, control_ids(tokenizer)).any(), f"{text!r} became a special token"
    assert tokenizer.decode(ids.tolist()) == text


@pytest.mark.parametrize("text", SPELLED)
def test_text_that_spells_a_special_token_stays_text(tokenizer: Tokenizer, text: str) -> None:
    check_round_trip(tokenizer, text)


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(), st.text(" \n\tdefadrtu_rn(),'1²é<|>/s", max_size=60)))
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    check_round_trip(tokenizer, text.replace("\u2581", ""))


@pytest.mark.parametrize("filler", [" ", "a", "\n", "\u00e9"])
def test_a_million_equal_characters_are_a_document(tokenizer: Tokenizer, filler: str) -> None:
    """The regular expressions of tiktoken overflow their stack there: the worker died, again at every resume."""
    text = "x" + filler * 1_000_000 + "y"
    assert tokenizer.decode(tokenizer.encode_batch([text])[0].tolist()) == text


def test_runs_below_the_limit_are_the_librarys(tmp_path: Path) -> None:
    tokenizer = make("tiktoken", tmp_path)
    assert isinstance(tokenizer, tiktoken_module.TiktokenTokenizer)
    for text in (toy.TEXT, " " * (tiktoken_module.LONGEST_RUN - 1) + "x", "a" * 999 + "\n" * 999):
        assert tokenizer.encode_batch([text])[0].tolist() == tokenizer._model.encode_ordinary(text)


def test_truncation_in_the_file_does_not_cut_documents(tmp_path: Path) -> None:
    path = toy.tokenizer_json(tmp_path / "tokenizer.json", {"<|endoftext|>": True}, truncation=5)
    assert json.loads(path.read_text())["truncation"]["max_length"] == 5
    check_round_trip(load_tokenizer(path), toy.TEXT * 10)


@pytest.mark.parametrize(("name", "content"), [("t.model", b""), ("tokenizer.json", b""), ("v.tiktoken", b"")])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "v.tiktoken.json").write_text(json.dumps({"pattern": PATTERN, "special_tokens": {}}))
    with pytest.raises(ValueError, match=name):
        load_tokenizer(tmp_path / name)


# -- which token ends a document ---------------------------------------------------------------------------------------


def test_an_ordinary_piece_that_is_spelled_like_an_end_is_none(tmp_path: Path) -> None:
    """Qwen 3 has an ordinary piece `</s>` beside `<|endoftext|>`, Gemma 3 an HTML tag `</s>` beside `<eos>`."""
    special = {"</s>": False, "<|endoftext|>": True}
    tokenizer = load_tokenizer(toy.tokenizer_json(tmp_path / "tokenizer.json", special))
    assert tokenizer.piece(eos_of(tokenizer)) == "<|endoftext|>"


def test_two_declared_ends_are_refused_with_both(tmp_path: Path) -> None:
    path = toy.tokenizer_json(tmp_path / "tokenizer.json", {"</s>": True, "<eos>": True})
    tokenizer = load_tokenizer(path)
    with pytest.raises(ValueError, match=r"several tokens that may be its eos: \d+ '</s>' and \d+ '<eos>'.*--eos"):
        eos_of(tokenizer)
    assert "eos not decided between" in describe_tokenizer(tokenizer)
    chosen = load_tokenizer(path, SpecialChoice(eos="<eos>"))
    assert chosen.piece(eos_of(chosen)) == "<eos>"
    by_id = load_tokenizer(path, SpecialChoice(eos=str(eos_of(chosen))))
    assert eos_of(by_id) == eos_of(chosen)


@pytest.mark.parametrize(
    ("side", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "<end>"}),
        ("tokenizer_config.json", {"eos_token": {"content": "<end>", "special": True}}),
        ("special_tokens_map.json", {"eos_token": {"content": "<end>"}}),
        ("generation_config.json", {"eos_token_id": 257}),
        ("generation_config.json", {"eos_token_id": [257]}),
    ],
)
def test_the_files_beside_it_decide(tmp_path: Path, side: str, content: dict[str, object]) -> None:
    path = toy.tokenizer_json(tmp_path / "tokenizer.json", {"</s>": True, "<end>": True})
    want = json.loads(path.read_text())["added_tokens"][1]["id"]
    text = json.dumps(content).replace("257", str(want))
    (tmp_path / side).write_text(text)
    assert eos_of(load_tokenizer(path)) == want
    assert eos_of(load_tokenizer(path, SpecialChoice(eos="</s>"))) == want - 1


def test_a_chosen_end_is_never_made_by_text(tmp_path: Path) -> None:
    """Also where the file declares it an ordinary added token."""
    path = toy.tokenizer_json(tmp_path / "tokenizer.json", {"<stop>": False})
    tokenizer = load_tokenizer(path, SpecialChoice(eos="<stop>"))
    check_round_trip(tokenizer, "a<stop>b")


def test_a_chosen_end_that_words_spell_is_refused(tmp_path: Path) -> None:
    path = toy.tokenizer_json(tmp_path / "tokenizer.json", {})
    tokenizer = load_tokenizer(path, SpecialChoice(eos="a"))
    with pytest.raises(ValueError, match=r"ordinary text is encoded as \d+ 'a'.*choose another with --eos"):
        tokenizer.encode_batch(["a b"])


def test_an_id_in_a_file_beside_it_is_an_id(tmp_path: Path) -> None:
    """Nearly every vocabulary has a piece "2", which is not the token 2."""
    path = toy.tokenizer_json(tmp_path / "tokenizer.json", {"</s>": True, "<end>": True})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null}')
    assert eos_of(load_tokenizer(path)) == 2


def test_a_number_that_is_also_a_token_is_refused_with_both(tmp_path: Path) -> None:
    path = toy.tokenizer_json(tmp_path / "tokenizer.json", {"<end>": True})
    with pytest.raises(ValueError, match=r"--eos 2 may be the id 2, or the token '2' of .*, whose id is 17; give"):
        load_tokenizer(path, SpecialChoice(eos="2"))


def test_files_that_say_different_ends_are_refused_with_both(tmp_path: Path) -> None:
    """A chat model's folder: who ends an answer does not end a document."""
    path = toy.tokenizer_json(tmp_path / "tokenizer.json", {"</s>": True, "<end>": True})
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 320}')
    both = "321 'eos of tokenizer_config.json' and 320 'eos of generation_config.json'; choose with --eos"
    with pytest.raises(ValueError, match=both):
        eos_of(load_tokenizer(path))
    assert eos_of(load_tokenizer(path, SpecialChoice(eos="</s>"))) == 320
    model = toy.sentencepiece_model(tmp_path / "t.model", byte_fallback=True)
    (tmp_path / "generation_config.json").unlink()
    assert eos_of(load_tokenizer(model)) == 2, "a token that the model does not have is no candidate"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<s>", "pad_token": "<unk>"}')
    with pytest.raises(ValueError, match=r"2 'eos of t\.model' and 1 'eos of tokenizer_config\.json'"):
        eos_of(load_tokenizer(model))


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken"])
def test_a_chosen_end_of_which_text_is_made_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ValueError, match=r"eos \d+.* is an ordinary (piece|token) of .*, which text is made of"):
        load_tokenizer(make(kind, tmp_path).path, SpecialChoice(eos="a"))


@pytest.mark.parametrize("source", ["--eos", "tokenizer_config.json"])
def test_a_piece_that_users_define_ends_documents_and_nothing_else(tmp_path: Path, source: str) -> None:
    """Sentencepiece makes such a piece of text that spells it."""
    path = toy.sentencepiece_model(tmp_path / "t.model", byte_fallback=True, users=["<end>"], eos_id=-1)
    if source == "--eos":
        tokenizer = load_tokenizer(path, SpecialChoice(eos="<end>"))
    else:
        (tmp_path / source).write_text('{"eos_token": "<end>", "pad_token": "<unk>"}')
        tokenizer = load_tokenizer(path)
    assert tokenizer.piece(eos_of(tokenizer)) == "<end>"
    check_round_trip(tokenizer, "a<end>b")


def test_a_unigram_model_spells_its_special_tokens(tmp_path: Path) -> None:
    """They are pieces of it, and win: `</s>` in a text ended the document, `<mask>` became the token."""
    tokenizer = load_tokenizer(toy.unigram_json(tmp_path / "tokenizer.json", ["</s>", "<mask>"]))
    for text in ("a</s>b", "</s>", "a <mask></s> b"):
        check_round_trip(tokenizer, text)
        assert 2 not in tokenizer.encode_batch([text])[0]
    assert tokenizer.special.unk == 0, "unknown characters are counted by it"


def test_dropout_in_the_file_does_not_change_the_ids(tmp_path: Path) -> None:
    path = toy.tokenizer_json(tmp_path / "tokenizer.json", {"<end>": True})
    wanted = load_tokenizer(path).encode_batch([toy.TEXT])[0].tolist()
    stored = json.loads(path.read_text())
    stored["model"]["dropout"] = 0.9
    path.write_text(json.dumps(stored))
    assert load_tokenizer(path).encode_batch([toy.TEXT])[0].tolist() == wanted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("printed", ["<nothing>", "99999"])
def test_a_choice_that_is_no_token_is_refused(tmp_path: Path, kind: str, printed: str) -> None:
    path = make(kind, tmp_path).path
    with pytest.raises(ValueError, match=rf"--eos {printed} is no token of .*ids are 0 to"):
        load_tokenizer(path, SpecialChoice(eos=printed))


def test_no_end_at_all_says_how_to_name_one(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(toy.tokenizer_json(tmp_path / "tokenizer.json", {"<tool>": True}))
    with pytest.raises(ValueError, match="--eos TOKEN_OR_ID"):
        eos_of(tokenizer)


# -- tiktoken ----------------------------------------------------------------------------------------------------------


def test_an_unknown_file_of_ranks_needs_its_side_file(tmp_path: Path) -> None:
    path = toy.tiktoken_file(tmp_path / "v.tiktoken", None)
    with pytest.raises(ValueError, match=r"none of the published files: write .*v\.tiktoken\.json"):
        load_tokenizer(path)
    Path(f"{path}.json").write_text('{"special_tokens": {}}')
    with pytest.raises(ValueError, match=r"v\.tiktoken\.json: expected .*pattern"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("special", "pattern", "sentence"),
    [
        ({"<|endoftext|>": 97}, PATTERN, r"the id 97 of the special token '<\|endoftext\|>' is also another token's"),
        ({"<|endoftext|>": -1}, PATTERN, "the id -1 of the special token"),
        ({"<|endoftext|>": 258, "<pad>": 258}, PATTERN, "the id 258 of the special token"),
        ({"<|endoftext|>": 258.5}, PATTERN, r"v\.tiktoken\.json: expected"),
        ({"<|endoftext|>": 258}, 5, r"v\.tiktoken\.json: expected"),
        ({"<|endoftext|>": 258}, "", "leaves text out"),
        ({"<|endoftext|>": 258}, r"\p{L}+", r"the pattern .* of .*v\.tiktoken leaves text out"),
    ],
)
def test_a_side_file_that_contradicts_is_refused(
    tmp_path: Path, special: dict[str, object], pattern: object, sentence: str
) -> None:
    path = toy.tiktoken_file(tmp_path / "v.tiktoken", {"pattern": pattern, "special_tokens": special})
    with pytest.raises(ValueError, match=sentence):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda lines: lines[:100], r"v\.tiktoken \(100 tokens\) lacks 156 of the 256 single bytes"),
        (lambda lines: [*lines, b"enp6 5"], "ranks must be different numbers"),
        (lambda lines: [*lines, b"enp6 -5"], "ranks must be different numbers"),
    ],
    ids=["cut", "one rank twice", "negative"],
)
def test_a_damaged_file_of_ranks_is_refused(
    tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], sentence: str
) -> None:
    """The library panics, at the first text that needs what is missing."""
    path = toy.tiktoken_file(tmp_path / "v.tiktoken", {"pattern": PATTERN, "special_tokens": {"<|endoftext|>": 300}})
    path.write_bytes(b"\n".join(change(path.read_bytes().splitlines())))
    with pytest.raises(ValueError, match=sentence):
        load_tokenizer(path)


@pytest.mark.parametrize("name", ["r50k_base", "p50k_base", "cl100k_base", "o200k_base"])
def test_known_files_mean_what_the_library_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes: list[str] = []
    monkeypatch.setattr(published, "load_tiktoken_bpe", lambda url, expected_hash: hashes.append(expected_hash))
    stated = published.ENCODING_CONSTRUCTORS[name]()
    assert tiktoken_module.KNOWN[hashes[0]] == (stated["pat_str"], stated["special_tokens"])


def test_a_known_file_is_recognised_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = toy.tiktoken_file(tmp_path / "any_name.tiktoken", None)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(tiktoken_module.KNOWN, digest, tiktoken_module.Meaning(PATTERN, {"<|endoftext|>": 300}))
    assert eos_of(load_tokenizer(path)) == 300


# -- sentencepiece -----------------------------------------------------------------------------------------------------


def test_without_byte_pieces_neighbouring_unknowns_are_one_token(tmp_path: Path) -> None:
    """The chunk cache made two of them where a border lay between: `'?b Ä.!'`."""
    model = load_tokenizer(toy.sentencepiece_model(tmp_path / "t.model", byte_fallback=False))
    for text in ("?b Ä.!", "Ä Ö Ü", "xÄÖ,Ü"):
        assert model.encode_batch([text])[0].tolist() == model._model.encode(text)  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", [*SPELLED, "", " ", "\n" * 1000, "x" + " " * 1_000_000 + "y"])
def test_without_byte_pieces_text_makes_no_special_token(tmp_path: Path, text: str) -> None:
    """Except the one for unknown characters, which the tools count."""
    model = load_tokenizer(toy.sentencepiece_model(tmp_path / "t.model", byte_fallback=False))
    ids = model.encode_batch([text])[0].tolist()
    special = model.special
    assert not {special.bos, special.eos, special.pad} & set(ids)
    assert special.unk in ids or model.decode(ids) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text(" ,.?!abÄÖ1\n", max_size=20))
def test_random_text_without_byte_pieces(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "plain.model"
    if not path.exists():
        toy.sentencepiece_model(path, byte_fallback=False)
    model = load_tokenizer(path)
    assert model.encode_batch([text])[0].tolist() == model._model.encode(text)  # type: ignore[attr-defined]
