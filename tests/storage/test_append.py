"""Lines of JSON objects: what a power cut leaves between them costs no good one."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fp4.storage.append import AppendFile, Line, read_lines, read_values

GOOD = [b'{"step": 1, "loss": 2.5}', b'{"step": 2}', b'{"step": 3}']


@pytest.mark.parametrize(
    ("content", "damaged"),
    [
        (b"\n".join(GOOD) + b"\n", []),
        (b"\n".join(GOOD) + b'\n{"step": 4, "lo', []),
        (GOOD[0] + b"\n" + b"\0" * 4096 + b"\n" + GOOD[1] + b"\n" + GOOD[2] + b"\n", [b""]),
        (GOOD[0] + b"\n" + b"\0" * 4096 + GOOD[1] + b"\n" + GOOD[2] + b"\n", [b""]),
        (GOOD[0] + b'\n{"step": 2, "lo' + b"\0" * 9 + GOOD[1] + b"\n" + GOOD[2] + b"\n", [b'{"step": 2, "lo']),
        (b"\n".join(GOOD) + b"\n" + b"\0" * 4096, [b""]),
        (b"\n".join(GOOD) + b'\n\xff\xfe{"step"\n[1]\n{"loss": 1}\n{"step": "4"}\n', [
            b'\xff\xfe{"step"', b"[1]", b'{"loss": 1}', b'{"step": "4"}',
        ]),
        (b"[" * 100_000 + b"\n" + b"\n".join(GOOD) + b"\n", [b"[" * 100_000]),
        (b"", []),
    ],
    ids=[
        "whole", "killed", "zeros", "zeros before a line", "zeros in a line", "zeros at the end", "others", "brackets",
        "empty",
    ],
)  # fmt: skip
def test_what_stands_between_good_lines(tmp_path: Path, content: bytes, damaged: list[bytes]) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content)
    lines = list(read_lines(path))
    assert [line.text for line in lines if line.value is not None] == (GOOD if content else [])
    assert [line for line in lines if line.value is None] == [Line(text, None) for text in damaged]


def test_what_is_appended_to_half_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The next line was glued to it, and both were lost."""
    path = tmp_path / "lines.jsonl"
    path.write_bytes(GOOD[1] + b'\n{"step": 3, "lo')
    for step in (4, 5):
        file = AppendFile(path)
        file.add({"step": step})
        file.close()
    assert [value["step"] for value in read_values(path)] == [2, 4, 5]
    assert "lines.jsonl: 1 damaged line(s) are left out" in caplog.text


def test_no_file(tmp_path: Path) -> None:
    assert list(read_lines(tmp_path / "lines.jsonl")) == []
