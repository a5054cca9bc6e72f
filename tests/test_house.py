"""The house stays readable: sizes of rooms and files, imports a file, one meaning a class name, no import circle.

Each exception is named with its reason; a test also fails on an exception that is no longer needed: lists shrink.
"""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_fp4"
TREES = ("megatron_fp4", "data_tools", "benchmarks", "launch", "tests")
BARE_NAMES = ("again", "found", "made", "meanwhile", "met", "mine", "said", "there", "told")
MAX_FILES_PER_ROOM = 16
MAX_LINES = 260
MAX_FUNCTION_LINES = 60
MAX_INTERNAL_IMPORTS = 12
MAX_TARGETS = 2

CROWDED_ROOMS: dict[str, str] = {}
LONG_FILES: dict[str, str] = {}
MANY_IMPORTS: dict[str, str] = {
    "train/job.py": "a rank's life: it starts and leaves everything, one line each",
    "train/trainable.py": "puts models, layers, optimizer, pipeline and precision together for one rank",
}
MANY_TARGETS: dict[str, str] = {}


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Path within the package and syntax tree of every file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())


def module_name(path: str) -> str:
    return re.sub(r"(/__init__)?\.py$", "", f"megatron_fp4/{path}").replace("/", ".")


KNOWN = {module_name(path) for path, _ in modules()}


def imported_modules(tree: ast.AST) -> set[str]:
    """Modules of the package that the code of `tree` imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "megatron_fp4":
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & KNOWN
            names |= submodules or {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names} & KNOWN
    return names


def runtime_imports(tree: ast.Module) -> set[str]:
    """As `imported_modules`, without what only the type checker sees."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    return imported_modules(tree)


def compare(violations: dict[str, int], exceptions: dict[str, str], rule: str) -> None:
    """Fails where a violation has no exception, or an exception no violation."""
    unnamed = {path: count for path, count in violations.items() if path not in exceptions}
    assert not unnamed, f"{rule}: {unnamed}"
    needless = exceptions.keys() - violations.keys()
    assert not needless, f"{rule}: no exception is needed any more for {sorted(needless)}"


def test_rooms_are_not_crowded() -> None:
    files = Counter(path.rpartition("/")[0] for path, _ in modules() if not path.endswith("__init__.py"))
    crowded = {room: count for room, count in files.items() if count > MAX_FILES_PER_ROOM}
    compare(crowded, CROWDED_ROOMS, f"more than {MAX_FILES_PER_ROOM} files in a room")


def test_files_are_short() -> None:
    lines = {path: (PACKAGE / path).read_text().count("\n") for path, _ in modules()}
    long = {path: count for path, count in lines.items() if count > MAX_LINES}
    compare(long, LONG_FILES, f"more than {MAX_LINES} lines")


def test_functions_are_short() -> None:
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= MAX_FUNCTION_LINES, f"{path}: {node.name} has {lines} lines"


def test_files_import_few_others() -> None:
    counts = {path: len(imported_modules(tree)) for path, tree in modules() if not path.endswith("__init__.py")}
    many = {path: count for path, count in counts.items() if count > MAX_INTERNAL_IMPORTS}
    compare(many, MANY_IMPORTS, f"more than {MAX_INTERNAL_IMPORTS} internal imports")


def test_a_class_name_means_one_thing() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path, tree in modules():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(path)
    ambiguous = {name: paths for name, paths in places.items() if len(paths) > 1}
    assert not ambiguous, ambiguous


def test_no_import_circle() -> None:
    """Also not through an import inside a function."""
    graph = {module_name(path): runtime_imports(tree) - {module_name(path)} for path, tree in modules()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_assignments_have_at_most_two_targets() -> None:
    """`self.a, self.b, self.c = a, b, c` is shorter, not clearer. Unpacking one value (a shape, a result) is free."""
    counts: Counter[str] = Counter()
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
                literal = isinstance(node.value, ast.Tuple)
                counts[path] += literal and len(node.targets[0].elts) > MAX_TARGETS
    compare({path: count for path, count in counts.items() if count}, MANY_TARGETS, "more than two targets")


BEGINNINGS = ("Of", "Or", "Also", "And", "As", "But", "By", "For", "Nothing", "Those")
"""Words with which a docstring goes on from something that is not there."""


def test_docstrings_begin_at_their_beginning() -> None:
    """ "Of delivered sample `index`." saves a word and costs a second reading."""
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                begins = text.split(maxsplit=1)[0]
                assert begins.rstrip(",:") not in BEGINNINGS, f"{path}: {getattr(node, 'name', 'module')}: {text[:60]}"


def every_file() -> list[Path]:
    return [path for tree in TREES for path in sorted((PACKAGE.parent / tree).rglob("*.py")) if path != Path(__file__)]


def test_no_label_where_the_idea_itself_can_stand() -> None:
    labelled = [path for path in every_file() if "One idea:" in path.read_text()]
    assert not labelled, labelled


def names_given(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of every variable, argument, function and class that `tree` defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.lineno, node.name


def test_names_say_what_a_thing_is() -> None:
    """`found` is how it came; what is it?"""
    bare = [
        f"{path}:{line}: {name}"
        for path in every_file()
        for line, name in names_given(ast.parse(path.read_text()))
        if name in BARE_NAMES
    ]
    assert bare == []


def test_every_room_says_its_floor() -> None:
    """The table of docs/architecture.md and the first line of each top room agree."""
    rows = re.findall(r"^\| ([\d, ]+) \| (.*?) \|", (PACKAGE.parent / "docs/architecture.md").read_text(), re.MULTILINE)
    floors = {room: floor for floor, rooms in rows for room in re.findall(r"`(\w+)/`", rooms)}
    assert set(floors) == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    for room, floor in floors.items():
        docstring = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
        assert f"floor {floor}" in docstring.splitlines()[0].lower(), (
            f"megatron_fp4/{room}/__init__.py: not floor {floor}"
        )


def test_commands_take_paths_of_this_machine() -> None:
    """`type=Path` takes a URL for a local folder of that name; storage/local.py has the types that refuse it."""
    for path in every_file():
        if path.parts[len(PACKAGE.parent.parts)] != "tests":
            assert not re.search(r"add_argument\([^)]*type=Path\b", path.read_text()), path
