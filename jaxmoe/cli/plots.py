"""Plots of results with matplotlib, an optional dependency."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from jaxmoe.errors import ConfigError, RequestError

_FORMATS = (".png", ".svg")


def check_plot_path(path: str) -> None:
    """Check that a plot can be written to path.

    Raises: RequestError if the suffix is not .png or .svg, or the folder does not exist; ConfigError if matplotlib is
    not installed.
    """
    if Path(path).suffix not in _FORMATS:
        raise RequestError(f"--plot {path!r} must end in {' or '.join(_FORMATS)}")
    if not Path(path).resolve().parent.is_dir():
        raise RequestError(f"--plot {path!r}: its folder does not exist")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'jaxmoe[plot]'") from error


def save_plot(path: str, draw: Callable[[Any], None], *, inches: tuple[float, float] = (10.0, 5.0)) -> None:
    """Let draw fill an empty figure, and write it to path atomically.

    Raises: RequestError naming the path if it cannot be written.
    """
    from matplotlib.figure import Figure

    from jaxmoe.files import write_whole

    figure = Figure(figsize=inches, layout="constrained")
    draw(figure)
    picture = BytesIO()
    figure.savefig(picture, format=Path(path).suffix[1:])
    try:
        write_whole(Path(path), picture.getvalue())
    except OSError as error:
        raise RequestError(f"--plot {path!r} cannot be written: {error.strerror or error}") from error
