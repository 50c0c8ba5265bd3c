"""The house stays as it is drawn: nothing grows too long, and what has a registry is named in its own file alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from foresight.exporter.registry import REGISTRY
from foresight.runtime.caches import CACHE_MODES
from foresight.runtime.policies import POLICIES
from tests.test_packaging import ROOT, source_files

MOST_LINES = {"file": 400, "class": 150, "function": 50}
# Where it was decided otherwise, and why.
LONGER = {
    "foresight.exporter.checkpoint.Checkpoint": "one method a question that the export asks of the files",
    "foresight.runtime.pipeline.VideoPipeline": "its call is typed twice, for one prompt and for several",
    "foresight.serving.service.VideoService": "all that a job goes through, from its creation to its removal",
}
WORDS = {"output", "none", "forecast"}  # that also mean something else


def parts(tree: ast.Module, module: str) -> Iterator[tuple[str, str, int]]:
    """Every class and function: what it is, its name, its lines."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            assert node.end_lineno is not None
            yield kind, f"{module}.{node.name}", node.end_lineno - node.lineno + 1


def whole(module: str, path: Path) -> tuple[str, str, int]:
    return "file", module, len(path.read_text(encoding="utf-8").splitlines())


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_nothing_is_too_long() -> None:
    found = {
        name: lines
        for module, path in source_files().items()
        for kind, name, lines in (whole(module, path), *parts(parsed(path), module))
        if lines > MOST_LINES[kind]
    }
    assert found.keys() == LONGER.keys(), found
    assert all(lines <= 200 for lines in found.values())


@pytest.mark.parametrize(
    ("names", "home"),
    [({*CACHE_MODES}, "foresight.runtime.caches"), ({*POLICIES}, "foresight.runtime.policies")],
    ids=["cache modes", "policies"],
)
def test_what_has_a_registry_is_named_at_home_alone(names: set[str], home: str) -> None:
    """No other file compares with such a name; those that mean nothing else stand nowhere as a string."""
    wrong = []
    for module, path in source_files().items():
        if module.startswith(home):
            continue
        tree = parsed(path)
        compared = {id(side) for node in ast.walk(tree) if isinstance(node, ast.Compare) for side in ast.walk(node)}
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names):
                continue
            meant = node.value not in WORDS and node.value != "foresight"  # the package's own name
            if meant or id(node) in compared:
                wrong.append(f"{module}, line {node.lineno}: {node.value!r}")
    assert not wrong


@pytest.mark.parametrize("family", sorted({row.family for row in REGISTRY.values()}))
def test_a_family_is_its_module_and_its_rows(family: str) -> None:
    """The package names it nowhere else, in no spelling: not in code, not in messages, not in comments."""
    spelled = re.compile(rf"(?i:{family.replace('_', '[ ._-]?')})(?![a-z])")
    homes = ("foresight.exporter.registry", f"foresight.exporter.models.{family}")
    wrong = [
        f"{module}, line {number}: {line.strip()}"
        for module, path in source_files().items()
        if not module.startswith(homes)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if spelled.search(line)
    ]
    assert not wrong


def test_benchmarks_ask_for_no_model_by_its_name() -> None:
    """What differs from one to the other is told by the zoo."""
    names = {*REGISTRY, *(row.family for row in REGISTRY.values())}
    wrong = [
        f"{path.name}, line {node.lineno}"
        for path in (ROOT / "benchmarks").rglob("*.py")
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Compare)
        for side in ast.walk(node)
        if isinstance(side, ast.Constant) and side.value in names
    ]
    assert not wrong


def test_no_file_has_the_marks_of_a_merge() -> None:
    mark = re.compile(rf"^({'<' * 7}|{'>' * 7}) ", re.MULTILINE)
    texts = (path for kind in ("*.md", "*.toml", "*.json", "*.txt") for path in ROOT.glob(f"[!.]*/**/{kind}"))
    assert not [
        path for path in (*ROOT.glob("*.*"), *texts) if path.is_file() and mark.search(path.read_text(errors="replace"))
    ]
