"""Check how plainly docstrings and comments are written: python -m scripts.check_prose [--write].

Two figures for each folder of jaxmoe/, and for scripts/:
markers    words per 1000 that stand in for a term ("what", "those", "such", ...)
fragments  share of docstrings of functions and classes that open with such a word in place of a verb or a noun
Limits are in scripts/prose_limits.json. A figure above both its limit and the GOAL is an error; --write lowers limits
to the figures of today and never raises one.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMITS = Path(__file__).with_name("prose_limits.json")
GOAL = {"markers": 6.0, "fragments": 3.0}
_MARKERS = """
what those such alike beside told tell tells held kept none whose whatever nobody nothing stand stands came comes said
says lie lies asked
"""
_OPENERS = """
what of whether those that as how where for from by to who whom which so all some one none with at in on if than this
these
"""
MARKERS, OPENERS = frozenset(_MARKERS.split()), frozenset(_OPENERS.split())
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(source: str) -> list[tuple[str, bool]]:
    """Return the docstrings of a file, each with whether it is of a function or class."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Module, *DEFINITIONS))]
    texts = [(ast.get_docstring(node), isinstance(node, DEFINITIONS)) for node in nodes]
    return [(text, counts) for text, counts in texts if text]


def comments(source: str) -> list[str]:
    """Return the comments of a file."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]


def figures(paths: list[Path]) -> dict[str, float]:
    """Return markers per 1000 words, and fragments in percent, over all of these files."""
    words = markers = documented = fragments = 0
    for path in paths:
        source = path.read_text(encoding="utf-8")
        texts = docstrings(source)
        for text in [text for text, _ in texts] + comments(source):
            each = re.findall(r"[a-z']+", text.lower())
            words += len(each)
            markers += sum(word in MARKERS for word in each)
        for text in [text for text, counts in texts if counts]:
            first = re.search(r"[A-Za-z']+", text)
            documented += 1
            fragments += first is not None and first[0].lower() in OPENERS
    share = 100 * fragments / max(documented, 1)
    return {"markers": round(1000 * markers / max(words, 1), 1), "fragments": round(share, 1)}


def folders() -> dict[str, list[Path]]:
    """Return the files of every folder that has limits; "." is the top level of the package."""
    package = ROOT / "jaxmoe"
    inner = sorted(path for path in package.iterdir() if path.is_dir() and list(path.rglob("*.py")))
    each = {f"jaxmoe/{path.name}": sorted(path.rglob("*.py")) for path in inner}
    return {"jaxmoe": sorted(package.rglob("*.py")), **each, "scripts": sorted((ROOT / "scripts").rglob("*.py"))}


def main() -> int:
    """Compare with the limits; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="lower the limits to the figures of today")
    write = parser.parse_args().write
    limits = json.loads(LIMITS.read_text(encoding="utf-8")) if LIMITS.exists() else {}
    today = {name: figures(paths) for name, paths in folders().items()}
    worse = 0
    for name, each in today.items():
        for kind, value in each.items():
            limit = max(GOAL[kind], limits.get(name, GOAL)[kind])
            if value > limit:
                print(f"{name}: {kind} {value} is above its limit of {limit}: use the terms of docs/glossary.md")
                worse += 1
    if write:
        lowered = {
            name: {kind: min(value, limits.get(name, {}).get(kind, value)) for kind, value in each.items()}
            for name, each in today.items()
        }
        LIMITS.write_text(json.dumps(lowered, indent=1) + "\n", encoding="utf-8")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
