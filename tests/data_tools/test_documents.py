import gzip
import json

import pytest

from data_tools.documents import expand_inputs, read_batches, read_texts, texts_of
from data_tools.policies import Policies, Report
from data_tools.records import Position

TEXTS = ["first", "second line\nand more", "third é", "x" * 50]


def jsonl(texts, key="text"):
    return b"".join(json.dumps({key: t}).encode() + b"\n" for t in texts)


def read(path, key="text", **policies):
    report = Report()
    return list(read_texts([path], key, Policies(**policies), report)), dict(report.counts)


def test_jsonl_plain_gz_zst(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    data = jsonl(TEXTS)
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data[:40]) + gzip.compress(data[40:]))  # two members
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "a.jsonl.zst").write_bytes(compress(data[:40]) + compress(data[40:]))  # two frames
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
        assert read(tmp_path / name)[0] == TEXTS, name


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"body": [*TEXTS, None], "id": list(range(5))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    texts, counts = read(tmp_path / "a.parquet", key="body", missing_key="skip")
    assert texts == TEXTS
    assert counts["missing key: skip"] == 1
    for offset in range(6):  # a resumed run starts at any row
        rest = read_batches([tmp_path / "a.parquet"], Policies(), text_key="body", start=Position(0, offset))
        assert [r for batch in rest for r in batch.records] == [*TEXTS, None][offset:]
    with pytest.raises(ValueError, match=r"no column 'text'; its columns are \['body', 'id'\]"):
        read(tmp_path / "a.parquet")


def test_plain_text_by_file_and_by_line(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert read(tmp_path / "a.txt")[0] == ["one\ntwo\n"]
    assert read(tmp_path / "a.txt", text_unit="line")[0] == ["one", "two"]


def test_everything_that_is_not_a_document_is_counted(tmp_path):
    lines = [b'{"text": "good"}', b"", b'{"text": "  "}', b'{"txet": "typo"}', b"{broken", b'{"text": 5}', b"[1]"]
    lines += [b'{"text": "bad \xff utf8"}', b'{"text": "lone \\ud800 surrogate"}', b'{"text": "' + b"y" * 99 + b'"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    policy = {"missing_key": "skip", "invalid_json": "skip", "too_long": "skip", "max_document_bytes": 60}
    texts, counts = read(tmp_path / "a.jsonl", **policy)
    assert texts == ["good", "bad \ufffd utf8", "lone \ufffd\ufffd\ufffd surrogate"]
    counts.pop("text_bytes")
    assert counts == {
        "documents": 3,
        "empty: skip": 2,
        "missing key: skip": 3,
        "invalid json: skip": 1,
        "invalid utf8: replace": 2,
        "too long: skip": 1,
    }
    assert sum(counts.values()) - 2 == len(lines)  # the two replaced ones are documents too
    assert read(tmp_path / "a.jsonl", **policy, invalid_utf8="skip")[1]["invalid utf8: skip"] == 2
    kept, _ = read(tmp_path / "a.jsonl", **{**policy, "too_long": "keep", "empty": "keep"})
    assert "y" * 99 in kept
    assert len(kept) == 6


@pytest.mark.parametrize(
    ("line", "reason"),
    [(b'{"a": 1}', "missing key"), (b"{", "invalid json"), (b'{"text": "\xff"}', "invalid utf8"), (b"", "empty")],
)
def test_error_policy_names_the_place_and_the_flag(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["good"]) + line + b"\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl, byte 0 \+ 1 records.*{reason}.*--on-{reason.replace(' ', '-')}"):
        read(tmp_path / "a.jsonl", **{reason.replace(" ", "_"): "error"})


def test_too_long_is_an_error_by_default_and_never_loaded(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["short"]) + b"z" * 1000)
    with pytest.raises(ValueError, match=r"byte 18: a record of more than 100 bytes; raise --max-document-bytes"):
        read(tmp_path / "a.jsonl", max_document_bytes=100)
    assert read(tmp_path / "a.jsonl", max_document_bytes=100, too_long="skip")[0] == ["short"]
    (tmp_path / "b.txt").write_bytes(b"z" * 1000)
    assert read(tmp_path / "b.txt", max_document_bytes=100, too_long="skip") == ([], {"too long: skip": 1})


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_batches_cover_the_file_and_start_anywhere(tmp_path, ending):
    data = jsonl([f"document {n}" for n in range(200)])
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(gzip.compress(data) if ending else data)
    batches = list(read_batches([path], Policies(), batch_bytes=500))
    assert len(batches) > 5
    everything = [r for batch in batches for r in batch.records]
    for number, batch in enumerate(batches):
        rest = list(read_batches([path], Policies(), batch_bytes=500, start=batch.end))
        assert [r for b in rest for r in b.records] == [r for b in batches[number + 1 :] for r in b.records]
    assert len(everything) == 200
    assert texts_of(batches[0], "text", Policies(), Report())[0] == "document 0"


def test_truncated_gzip_is_named(tmp_path):
    whole = gzip.compress(jsonl(TEXTS))
    for cut in (9, len(whole)):
        (tmp_path / "a.jsonl.gz").write_bytes(whole[:-cut])
        with pytest.raises(ValueError, match=r"a\.jsonl\.gz: the compressed file is truncated"):
            read(tmp_path / "a.jsonl.gz")


def test_globs(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "odd[1].jsonl"):
        (tmp_path / name).write_text("")
    inputs = expand_inputs([str(tmp_path / "*.jsonl"), str(tmp_path / "a.jsonl"), str(tmp_path / "odd[1].jsonl")])
    assert [path.name for path in inputs] == ["a.jsonl", "b.jsonl", "odd[1].jsonl"]
    with pytest.raises(ValueError, match="no input file matches"):
        expand_inputs([str(tmp_path / "*.txt")])
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(ValueError, match="ending must be one of"):
        expand_inputs([str(tmp_path / "a.csv")])


def test_a_truncated_zst_is_refused_wherever_it_is_cut(tmp_path):
    """zstandard's own reader ends quietly there: with whole records before the cut, the rest would be lost silently."""
    zstandard = pytest.importorskip("zstandard")
    compressor = zstandard.ZstdCompressor()
    data = jsonl([f"document {n}" for n in range(5000)])
    whole = compressor.compress(data[:50_000]) + compressor.compress(data[50_000:])
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(whole)
    assert len(read(path)[0]) == 5000
    skipping = {"invalid_json": "skip", "missing_key": "skip"}
    for cut in (1, 5, len(whole) // 3, len(whole) // 2, len(whole)):
        path.write_bytes(whole[:-cut])
        with pytest.raises(ValueError, match=r"a\.jsonl\.zst: the compressed file is truncated"):
            read(path, **skipping)
    path.write_bytes(b"no zst at all")
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst: the compressed file is damaged"):
        read(path)


def test_a_damaged_gzip_is_named(tmp_path):
    """Every byte of a small file flipped in turn: other text, a refusal, never a traceback of the library."""
    data = bytearray(gzip.compress(jsonl(TEXTS), mtime=0))
    for place in range(len(data)):
        changed = data.copy()
        changed[place] ^= 0xFF
        (tmp_path / "a.jsonl.gz").write_bytes(changed)
        refused = ""
        try:
            texts = read(tmp_path / "a.jsonl.gz")[0]
        except ValueError as error:
            refused = str(error)
        assert "a.jsonl.gz" in refused or texts == TEXTS, f"byte {place}: neither refused nor without effect"


def test_parquet_values_that_are_no_text(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [1, None]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", missing_key="skip") == ([], {"missing key: skip": 2})
    with pytest.raises(ValueError, match=r"row 0 \+ 0 records \(no text in 'text': 1\): missing key"):
        read(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"b\.parquet: "):
        read(tmp_path / "b.parquet")


def test_a_deeply_nested_line_is_invalid_json(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["good"]) + b'{"text": ' + b"[" * 100_000 + b"\n")
    assert read(tmp_path / "a.jsonl", invalid_json="skip")[1]["invalid json: skip"] == 1


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(TEXTS))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert read(tmp_path / "a.jsonl")[0] == TEXTS
    assert read(tmp_path / "a.txt")[0] == ["one"]


def test_an_empty_text_file_is_an_empty_document(tmp_path):
    files = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    for path, text in zip(files, ("", "two", ""), strict=True):
        path.write_text(text)
    assert read(files[0]) == ([], {"empty: skip": 1})
    assert read(files[0], empty="keep")[0] == [""]
    batches = list(read_batches(files, Policies()))
    assert [len(batch.records) for batch in batches] == [1, 1, 1]
    for number, batch in enumerate(batches):  # a resumed run counts it once
        rest = list(read_batches(files, Policies(), start=batch.end))
        assert [r for b in rest for r in b.records] == [r for b in batches[number + 1 :] for r in b.records]
