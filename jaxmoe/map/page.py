"""The map as one page of HTML that needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jaxmoe.engine.trace import write_whole
from jaxmoe.errors import RequestError
from jaxmoe.jsontext import json_text

_SUFFIXES = (".html", ".htm")
_SCRIPTS = ("model.js", "fabric.js", "mesh.js", "play.js", "stages.js", "main.js")


def as_page(data: Mapping[str, Any]) -> str:
    """The page of what map_data gives."""
    folder = resources.files("jaxmoe.map")
    read = lambda name: folder.joinpath(name).read_text(encoding="utf-8")  # noqa: E731
    text = json_text(data).replace("<", "\\u003c")  # no name may end the script
    page = read("page.html").replace("/*STYLE*/", read("style.css")).replace("/*SCRIPT*/", "".join(map(read, _SCRIPTS)))
    return page.replace("/*DATA*/", text)


def check_page_path(path: str | Path, *, inputs: Iterable[str | Path] = ()) -> Path:
    """The path of a page. Raises: RequestError for one that is a folder, lies in none open to us, is no page's, or is
    one of the inputs."""
    target = Path(path)
    if target.is_dir():
        raise RequestError(f"output {target} is a folder: name a file such as map.html")
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK | os.X_OK):
        raise RequestError(f"output {target} cannot be written: {target.parent} is no folder open to you")
    if target.suffix.lower() not in _SUFFIXES:
        raise RequestError(f"output {target} must end in {' or '.join(_SUFFIXES)}: it is a page")
    for one in map(Path, inputs):
        if target.exists() and one.exists() and target.samefile(one):
            raise RequestError(f"output {target} is what the map is made of: name another file")
    return target


def write_page(path: str | Path, data: Mapping[str, Any]) -> Path:
    """Write the page, whole or not at all; where it is. Raises: RequestError naming the path."""
    target = check_page_path(path)
    try:
        write_whole(target, as_page(data))
    except OSError as error:
        raise RequestError(f"output {target} cannot be written: {error.strerror or error}") from error
    return target
