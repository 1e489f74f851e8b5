"""Write the map as one self-contained HTML page."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jaxmoe.errors import RequestError
from jaxmoe.files import write_whole
from jaxmoe.jsontext import json_text

_SUFFIXES = (".html", ".htm")
_SCRIPTS = ("model.js", "fabric.js", "mesh.js", "play.js", "stages.js", "main.js")


def as_page(data: Mapping[str, Any]) -> str:
    """Return the HTML page of the data that map_data returns."""
    folder = resources.files("jaxmoe.map")
    read = lambda name: folder.joinpath(name).read_text(encoding="utf-8")  # noqa: E731
    text = json_text(data).replace("<", "\\u003c")  # so that no name closes the script element
    page = read("page.html").replace("/*STYLE*/", read("style.css")).replace("/*SCRIPT*/", "".join(map(read, _SCRIPTS)))
    return page.replace("/*DATA*/", text)


def check_page_path(path: str | Path, *, inputs: Iterable[str | Path] = ()) -> Path:
    """Check the path of a page and return it.

    Raises: RequestError if it is a folder, is in a folder that is missing or not writable, does not end in .html or
    .htm, or is one of the inputs.
    """
    target = Path(path)
    if target.is_dir():
        raise RequestError(f"output {target} is a folder: name a file such as map.html")
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK | os.X_OK):
        raise RequestError(f"output {target} cannot be written: {target.parent} is not a writable folder")
    if target.suffix.lower() not in _SUFFIXES:
        raise RequestError(f"output {target} must end in {' or '.join(_SUFFIXES)}: it is an HTML page")
    for one in map(Path, inputs):
        if target.exists() and one.exists() and target.samefile(one):
            raise RequestError(f"output {target} is an input of the map: name another file")
    return target


def write_page(path: str | Path, data: Mapping[str, Any]) -> Path:
    """Write the page atomically and return its path. Raises: RequestError naming the path."""
    target = check_page_path(path)
    try:
        write_whole(target, as_page(data))
    except OSError as error:
        raise RequestError(f"output {target} cannot be written: {error.strerror or error}") from error
    return target
