"""Names of the code: those that were replaced by the field's terms are not defined again, classes have one meaning."""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxmoe"
# kind, old name, where it is not to be defined (a glob), the name in its place
RETIRED = [
    line.split("\t") for line in (Path(__file__).parent / "retired_names.tsv").read_text("utf-8").splitlines() if line
]


@cache
def _definitions(path: Path) -> dict[str, frozenset[str]]:
    """Names that a file defines, by kind: class, function, variable (parameters and attributes too), key."""
    names: dict[str, set[str]] = {"class": set(), "function": set(), "variable": set(), "key": set()}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        match node:
            case ast.ClassDef():
                names["class"].add(node.name)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                names["function"].add(node.name)
            case ast.arg():
                names["variable"].add(node.arg)
            case ast.Name(ctx=ast.Store()):
                names["variable"].add(node.id)
            case ast.Attribute(ctx=ast.Store()):
                names["variable"].add(node.attr)
            case ast.Dict():
                names["key"] |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
    return {kind: frozenset(found) for kind, found in names.items()}


def _kinds(kind: str) -> tuple[str, ...]:
    return {"class": ("class", "variable"), "function": ("function",), "key": ("key",)}.get(
        kind, ("variable", "function")
    )


def _matches(scope: str) -> list[Path]:
    return (
        [path for path in ROOT.glob(scope) if path.suffix == ".py"]
        if scope.endswith(".py")
        else sorted(path for path in ROOT.glob(scope.removesuffix("**") + "**/*.py"))
    )


@pytest.mark.parametrize(("kind", "old", "scope", "new"), RETIRED)
def test_a_retired_name_is_not_defined(kind, old, scope, new):
    paths = _matches(scope)
    assert paths, f"{scope} names no file"
    if kind == "module":
        path = ROOT / (old.replace(".", "/") + ".py")
        assert not path.exists(), f"{old} is called {new}"
        return
    where = [
        path.relative_to(ROOT).as_posix()
        for path in paths
        if any(old in _definitions(path)[one] for one in _kinds(kind))
    ]
    assert not where, f"{old} is called {new}: {where}"


def test_a_class_name_has_one_meaning():
    names = Counter(name for path in PACKAGE.rglob("*.py") for name in _definitions(path)["class"])
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("folder", ["api", "aot", "cli", "engine", "map", "planner", "probe", "report", "text"])
def test_keys_of_json_have_no_spaces(folder):
    keys = {key for path in (PACKAGE / folder).rglob("*.py") for key in _definitions(path)["key"]}
    assert [key for key in keys if isinstance(key, str) and " " in key] == []


def test_a_class_name_has_two_words():
    names = {name for path in PACKAGE.rglob("*.py") for name in _definitions(path)["class"]}
    words = {name: re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z0-9]*", name) for name in names if name[0] != "_"}
    # Acronyms, and the name that transformers users know.
    assert sorted(name for name, parts in words.items() if len(parts) < 2) == ["LLM", "MLP", "Trainer"]
