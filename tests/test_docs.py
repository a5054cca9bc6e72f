"""The pages under docs/ say what is true: examples run, snippets are the code, files and links exist."""

from __future__ import annotations

import ast
import doctest
import re
import textwrap
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.train.checked import check_config

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
EXAMPLES = [page for page in PAGES if "\n>>> import" in page.read_text()]

FILE = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|sh|yaml|sbatch|toml|md))(?::([\w.]+))?`")
SNIPPET = re.compile(r"<!-- from ([\w./]+?)(?::([\w.]+))? -->\n```(?:python|yaml)\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
ELSEWHERE = ("tools/preprocess_data.py", "build_tools/pytorch.py")  # files of Megatron-LM and Transformer Engine


def by_name(page: Path) -> str:
    return page.name


def definition(path: Path, name: str) -> ast.AST:
    """The function, class, method or variable `name` ("Class.method") of a Python file."""
    nodes: list[ast.stmt] = ast.parse(path.read_text()).body
    node: ast.AST | None = None
    for part in name.split("."):
        node = next((one for one in nodes if part in names_of(one)), None)
        assert node is not None, f"{path.relative_to(ROOT)} defines no {name}"
        nodes = getattr(node, "body", [])
    assert node is not None
    return node


def names_of(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def lines_of(text: str) -> str:
    return "\n".join(line.rstrip() for line in textwrap.dedent(text).strip("\n").splitlines())


@pytest.mark.parametrize("page", EXAMPLES, ids=by_name)
def test_examples_print_what_the_page_shows(page: Path) -> None:
    failures, tried = doctest.testfile(str(page), module_relative=False)
    assert tried > 0
    assert failures == 0, f"{page.name}: {failures} of {tried} examples print something else"


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_named_files_and_definitions_exist(page: Path) -> None:
    for name, member in FILE.findall(page.read_text()):
        if name in ELSEWHERE:
            continue
        path = next((base / name for base in (ROOT, ROOT / "megatron_fp4") if (base / name).exists()), None)
        assert path is not None, f"{page.name} names {name}, which is neither under the root nor under megatron_fp4/"
        if member:
            definition(path, member)


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_snippets_are_the_code(page: Path) -> None:
    """Those under a line `<!-- from FILE[:NAME] -->`; a line of three dots stands for what is left out."""
    assert len(SNIPPET.findall(page.read_text())) == page.read_text().count("<!-- from ")
    for name, member, shown in SNIPPET.findall(page.read_text()):
        source = (ROOT / name).read_text()
        if member:
            source = ast.get_source_segment(source, definition(ROOT / name, member), padded=True) or ""
        body = lines_of(shown).split("\n...\n")
        for part in body:
            assert lines_of(part) in lines_of(source), f"{page.name}: {name}:{member} has changed; show what it is now"


def test_the_readme_shows_the_table_of_its_rules() -> None:
    yaml, table = re.findall(r"```(?:yaml)?\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[:2]
    precision = OmegaConf.to_container(OmegaConf.create(yaml))
    assert isinstance(precision, dict)
    overrides = ["model=gpt_tiny", "model.num_layers=5", "model.vocab_size=1024"]
    tree = OmegaConf.merge(compose_config(overrides), {"precision": precision})
    assert isinstance(tree, DictConfig)
    printed = check_config(to_run_config(tree), world_size=1).plan.describe()
    for part in table.strip("\n").split("\n...\n"):
        assert part in printed


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_index_and_has_neighbours() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in DOCS:
        if page.name == "README.md":
            continue
        assert f"]({page.name})" in index, f"docs/README.md does not list {page.name}"
        neighbours = {target for target in LINK.findall(page.read_text()) if target.endswith(".md")}
        assert len(neighbours) >= 2, f"{page.name} links to {sorted(neighbours)}; a reader wants to go on"
