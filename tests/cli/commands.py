"""Running the command line within the test's own process (eight devices are emulated there already)."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from jaxmoe.cli.main import run


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


def jaxmoe(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """Exit code and output of `jaxmoe ARGUMENTS`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run([str(argument) for argument in arguments])
    return Outcome(int(caught.value.code or 0), *capsys.readouterr())
