"""Running the command line within the test's own process (eight devices are emulated there already)."""

from __future__ import annotations

import shlex
from typing import Any, NamedTuple

import pytest

from jaxmoe.cli.main import cli, run


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


def parsed(line: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parse a line of `jaxmoe generate` as a shell and the command do, without running it.

    Returns its parameters, and the options that join processes, which the command keeps apart.
    """
    program, name, *arguments = shlex.split(line)
    assert (program, name) == ("jaxmoe", "generate")
    context = cli.commands[name].make_context(name, arguments)
    prefix = "jaxmoe.processes."
    joining = {key.removeprefix(prefix): value for key, value in context.meta.items() if key.startswith(prefix)}
    return context.params, joining
