"""Entry point of the command `jaxmoe`. User errors print one line on standard error and exit with code 2."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

import click

from jaxmoe import __version__
from jaxmoe.cli.balance import balance
from jaxmoe.cli.bench import bench
from jaxmoe.cli.compile import compile_model
from jaxmoe.cli.convert import convert
from jaxmoe.cli.generate import generate
from jaxmoe.cli.info import info
from jaxmoe.cli.inspect import inspect_model
from jaxmoe.cli.launch import launch
from jaxmoe.cli.map import map_model
from jaxmoe.cli.plan import plan
from jaxmoe.cli.probe import probe
from jaxmoe.cli.score import score
from jaxmoe.cli.verify import verify
from jaxmoe.config.engine import RENAMED
from jaxmoe.errors import JaxmoeError, ProcessLostError
from jaxmoe.parallel.timeouts import LOST_CODE

if TYPE_CHECKING:
    from jaxmoe.parallel.processes import ProcessGroup


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="jaxmoe")
def cli() -> None:
    """Run Mixture-of-Experts models that are too large for one device on a named mesh of many devices."""


for command in (
    generate, score, verify, bench, balance, info, plan, inspect_model, map_model, compile_model, convert, probe,
    launch,
):  # fmt: skip
    cli.add_command(command)


def run(arguments: list[str] | None = None) -> None:
    """Run the command and exit: 0 on success, 1 if a check failed, 2 for invalid input, 130 if interrupted.

    3 if another of the joined processes was lost.
    """
    for stream in (sys.stdout, sys.stderr):  # characters that the terminal cannot encode are escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = cli.main(args=arguments, prog_name="jaxmoe", standalone_mode=False)
        _exit(code if isinstance(code, int) else 0)
    except ProcessLostError:  # a thread ends this process at exit, with the line that says so
        sys.exit(LOST_CODE)
    except JaxmoeError as error:
        message = str(error)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.NoSuchOption as error:
        message = _renamed(error) or error.format_message()
    except click.ClickException as error:
        message = error.format_message()
    except (click.Abort, KeyboardInterrupt):
        print("jaxmoe: interrupted", file=sys.stderr)
        _exit(130, "interrupted")
    except OSError as error:
        message = f"{error.filename or 'output'}: {error.strerror}"
    message = " ".join(message.split())
    group = _joined()
    if group is None or group.claims_end():  # otherwise a thread prints the line of another process
        print(f"jaxmoe: error: {message}", file=sys.stderr)
    _exit(2, message)


def _exit(code: int, failure: str | None = None) -> None:
    """Exit with a code. Joined processes end alike: with their own code, or because of this failure."""
    group = _joined()
    if group is not None:
        if failure is not None:
            group.fail(failure, code)
        group.exit_code = code
    sys.exit(code)


def _joined() -> ProcessGroup | None:
    """Return the group of joined processes, if any, without importing JAX."""
    module = sys.modules.get("jaxmoe.parallel.processes")
    return None if module is None else module.joined()


def _renamed(error: click.NoSuchOption) -> str | None:
    """Return the message for an option of an earlier version of the command, or None."""
    new = "--" + RENAMED.get(error.option_name.lstrip("-").replace("-", "_"), "").replace("_", "-")
    options = [] if error.ctx is None else [option for param in error.ctx.command.params for option in param.opts]
    return f"{error.option_name} is now called {new}" if new in options else None
