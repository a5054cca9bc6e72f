"""Real text that every machine has: the standard library's sources, and the documentation of its compiled modules.

Writes one JSONL document per source file ({"id", "kind", "text"}) and per documented compiled object. Docstrings of
Python modules are already inside the sources and are not written twice. Nothing is left out silently: what is not
written is counted with its reason. Same interpreter, same file, byte for byte.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import sys
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.arguments import tool_parser
from data_tools.cli import run_tool
from megatron_fp4.storage.local import local_path

Skipped = Counter[str]


def source_documents(skipped: Skipped) -> Iterator[tuple[str, str]]:
    """(path below the standard library, text) of every .py file, sorted; third-party packages are not looked at."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages/" in f"{name}/" or "dist-packages/" in f"{name}/":
            continue
        try:
            with tokenize.open(path) as file:  # honours the coding declared in the file
                yield name, file.read()
        except (SyntaxError, UnicodeDecodeError):
            skipped["source file: not decodable in its declared encoding"] += 1
        except OSError:
            skipped["source file: not readable"] += 1


def compiled_documents(skipped: Skipped) -> Iterator[tuple[str, str]]:
    """(qualified name, documentation) of the objects of built-in and extension modules, sorted."""
    for name in _compiled_modules():
        if "test" in name or name.startswith("xx"):
            skipped["compiled module: made for tests"] += 1
            continue
        try:
            module = importlib.import_module(name)
        except Exception:  # a missing system library; nothing here depends on which
            skipped["compiled module: cannot be imported"] += 1
            continue
        text = "\n\n".join(_documentation(name, module))
        if text:
            yield name, text
        else:
            skipped["compiled module: no documentation"] += 1


def _compiled_modules() -> list[str]:
    folder = Path(sysconfig.get_paths()["platstdlib"]) / "lib-dynload"
    extensions = {path.name.split(".")[0] for path in folder.glob("*.so")}
    return sorted(extensions | set(sys.builtin_module_names))


def _documentation(name: str, module: Any) -> Iterator[str]:
    seen: set[str] = set()
    for item, value in [("", module), *sorted(vars(module).items(), key=lambda pair: pair[0])]:
        members = sorted(vars(value).items(), key=lambda pair: pair[0]) if inspect.isclass(value) else []
        for member, thing in [("", value), *members]:
            # Instances and Python functions may have been put there by whoever runs this.
            if not (inspect.isclass(thing) or inspect.ismodule(thing) or _is_compiled(thing)):
                continue
            text = getattr(thing, "__doc__", None)
            if isinstance(text, str) and text.strip() and text not in seen:
                seen.add(text)
                yield f"{'.'.join(filter(None, (name, item, member)))}\n{inspect.cleandoc(text)}"


def _is_compiled(thing: Any) -> bool:
    return (inspect.isroutine(thing) and not inspect.isfunction(thing)) or inspect.isdatadescriptor(thing)


def write_corpus(path: Path) -> tuple[Counter[str], Counter[str], Skipped]:
    """Returns documents by kind, UTF-8 bytes of text by kind, and what was skipped by reason."""
    documents: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    skipped: Skipped = Counter()
    seen: set[bytes] = set()
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as out:
        for kind, stream in (
            ("source", source_documents(skipped)),
            ("compiled", compiled_documents(skipped)),
        ):
            for name, text in stream:
                data = text.encode("utf-8", errors="surrogatepass")
                reason = _unusable(data, seen)
                if reason:
                    skipped[f"{kind}: {reason}"] += 1
                    continue
                out.write(json.dumps({"id": name, "kind": kind, "text": text}, ensure_ascii=False) + "\n")
                documents[kind] += 1
                sizes[kind] += len(data)
    temporary.replace(path)
    return documents, sizes, skipped


def _unusable(data: bytes, seen: set[bytes]) -> str:
    if not data.strip():
        return "empty"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return "lone surrogates, not valid UTF-8"
    key = hashlib.sha256(data).digest()
    if key in seen:
        return "same text as an earlier document"
    seen.add(key)
    return ""


def main(argv: list[str] | None = None) -> int:
    parser = tool_parser("make-corpus", __doc__)
    parser.add_argument("--output", type=local_path, required=True, help="JSONL file to write")
    args = parser.parse_args(argv)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    documents, sizes, skipped = write_corpus(args.output)
    for kind in documents:
        print(f"{kind:10} {documents[kind]:6d} documents {sizes[kind]:12,d} bytes of text")
    for reason, count in sorted(skipped.items()):
        print(f"skipped    {count:6d} {reason}")
    print(f"total      {documents.total():6d} documents {sizes.total():12,d} bytes of text -> {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("make_corpus", None))
