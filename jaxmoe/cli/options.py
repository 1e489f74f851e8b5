"""Options and helpers that several commands share, including the start of JAX and loading the model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from jaxmoe.cli.engine_options import engine_options
from jaxmoe.config.engine import EngineConfig
from jaxmoe.errors import MeshError
from jaxmoe.parallel.timeouts import JOIN_TIMEOUT_SECONDS, LOST_AFTER_SECONDS

if TYPE_CHECKING:
    from jaxmoe.api.llm import LLM

console = Console(stderr=True, highlight=False)
_META = "jaxmoe.processes."
_PROCESS_OPTIONS = ("coordinator", "num_processes", "process_id", "lost_after")
_OWN_PATHS = ("output", "plot", "trace")  # may differ between joined processes; process 0 writes them
_MIN_WIDTH = 140  # columns, for tables that are not printed to a terminal


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Hold the options of model_options: devices to emulate, and how load_model loads and serves the model."""

    devices: int | None
    engine: EngineConfig


_ENGINE_OPTIONS = (
    "mesh", "dtype", "weights_dtype", "kv_dtype", "revision", "ignore_config_keys", "virtual_stages", "layout",
    "max_num_seqs", "verify",
)  # fmt: skip
_BACKENDS = {
    "dispatch": "Backend that sends tokens to their experts: all_to_all (default), all_gather, ragged_all_to_all, "
    "hierarchical or hierarchical_ragged.",
    "grouped": "Grouped matmul backend of the experts: blocks, ragged, native or dense.",
    "linear": "Backend of all other matmuls: xla or native.",
    "attention": "Backend of attention over the paged KV cache: loop or native.",
    "pointwise": "Backend of norms, rotary embedding, routing and gated activations: xla or native.",
    "sampling": "Backend of sampling tokens from logits: xla or native.",
    "layers": "Execution of equal layers: scan (compile one and loop over them) or unroll (compile each).",
}


MODEL_OPTION_NAMES = (*_ENGINE_OPTIONS, "devices", "native", *_BACKENDS)  # parameters of a command with model_options


def dispatch_option(**changes: Any) -> Callable[..., Any]:
    """Return the option --dispatch."""
    return click.option("--dispatch", **{"help": _BACKENDS["dispatch"]} | changes)


def given_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given, with --dispatch as the kernel override that it is in EngineConfig."""
    given = {name: value for name, value in options.items() if value is not None}
    if "dispatch" in given:
        given["kernels"] = {"dispatch": given.pop("dispatch")}
    return given


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option --json of commands with one result, which reach it as `as_json`."""
    text = "Print one JSON object on standard output and nothing else."
    return click.option("--json", "as_json", is_flag=True, help=text)(function)


def devices_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option --devices and the options of process_options. start_jax reads them."""
    help_text = "Emulate this many devices on the CPU, in each process."
    return click.option("--devices", type=int, help=help_text)(process_options(function))


def process_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that join this process and others, which start_jax reads."""

    def keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        context.meta[f"{_META}{parameter.name}"] = value

    shared: dict[str, Any] = {"expose_value": False, "callback": keep, "show_envvar": True}
    for option in (
        click.option(
            "--lost-after", type=float, default=LOST_AFTER_SECONDS, show_default=True,
            help="Seconds without a sign of life after which a process is lost, and all others end with exit code 3.",
            envvar="JAXMOE_LOST_AFTER", **shared,
        ),
        click.option(
            "--join-timeout", type=float, default=JOIN_TIMEOUT_SECONDS, show_default=True,
            help="Seconds to wait for all processes.", envvar="JAXMOE_JOIN_TIMEOUT", **shared,
        ),
        click.option(
            "--process-id", type=int, help="Index of this process, with --coordinator HOST:PORT.",
            envvar="JAXMOE_PROCESS_ID", **shared,
        ),
        click.option(
            "--num-processes", type=int, help="Number of processes, with --coordinator HOST:PORT.",
            envvar="JAXMOE_NUM_PROCESSES", **shared,
        ),
        click.option(
            "--coordinator", metavar="HOST:PORT|auto", envvar="JAXMOE_COORDINATOR", **shared,
            help="Run over the devices of several processes, each started with the same command: address of process "
            "0, or auto to detect it from Slurm, Open MPI, Kubernetes or GKE.",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of loading a model to a command, which receives them as its argument `options`."""

    @wraps(function)
    def command(*args: Any, devices: int | None, native: bool | None, **kwargs: Any) -> Any:
        kernels = _kernel_overrides(native, {op: kwargs.pop(op) for op in _BACKENDS})
        engine = EngineConfig().with_options(
            {name: kwargs.pop(name) for name in _ENGINE_OPTIONS} | {"kernels": kernels}
        )
        return function(*args, options=ModelOptions(devices=devices, engine=engine), **kwargs)

    for op, text in reversed(_BACKENDS.items()):
        command = click.option(f"--{op}", help=text)(command)
    native_help = "Use C++ kernels, or XLA only. By default C++ kernels are used on a CPU with a C++ compiler."
    command = click.option("--native/--no-native", default=None, help=native_help)(command)
    return engine_options(*_ENGINE_OPTIONS)(devices_option(command))


def _kernel_overrides(native: bool | None, chosen: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the backends that were chosen, by op."""
    overrides = {op: backend for op, backend in chosen.items() if backend is not None}
    if native is None:
        return overrides
    from jaxmoe.model.kernels import NATIVE_OPS, KernelConfig

    plain = KernelConfig()
    return {op: "native" if native else getattr(plain, op) for op in NATIVE_OPS} | overrides


def _can_write(folder: Path) -> bool:
    """Return whether folder is writable or can be created. It is not created here, before the input is checked."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def start_jax(devices: int | None) -> None:
    """Join other processes or emulate devices, as the options request, and set up the cache of compiled programs.

    Call it before anything else uses JAX. In a process that follows, standard output goes nowhere from here on.
    """
    import jax

    from jaxmoe.parallel.mesh import emulate_devices

    if jax.config.jax_compilation_cache_dir is None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "jaxmoe" / "compiled"
        if _can_write(folder):
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        else:
            console.print(f"jaxmoe: compiled programs are not cached: {folder} cannot be written; set XDG_CACHE_HOME")
    if not join_processes(devices) and devices is not None:
        emulate_devices(devices)


def join_processes(devices: int | None = None, *, with_jax: bool = True) -> bool:
    """Join other processes if the command was started with a coordinator. Returns whether it was.

    with_jax: start jax.distributed, too.
    """
    context = click.get_current_context(silent=True)
    given = {} if context is None else {name: context.meta.get(f"{_META}{name}") for name in _PROCESS_OPTIONS}
    coordinator, num_processes, process_id = (given.get(name) for name in _PROCESS_OPTIONS[:3])
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise MeshError("--num-processes and --process-id need --coordinator HOST:PORT")
        return False
    from jaxmoe.parallel.processes import join

    assert context is not None
    arguments = {
        _shown_name(one): str(context.params[one.name])
        for one in context.command.params
        if one.name in context.params and one.name not in _OWN_PATHS
    }
    group = join(
        coordinator, num_processes=num_processes, process_id=process_id, devices=devices,
        lost_after=context.meta[f"{_META}lost_after"], join_timeout=context.meta[f"{_META}join_timeout"],
        arguments={"command": str(context.info_name), **arguments}, with_jax=with_jax,
    )  # fmt: skip
    sys.stdout.flush()
    if group.is_controller:
        sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors="backslashreplace")
    else:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
        console.quiet = True
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # libraries print to it: gloo for every peer
    os.close(nowhere)
    return True


def _shown_name(parameter: click.Parameter) -> str:
    """Return the name of an option or argument as the help of its command shows it."""
    if isinstance(parameter, click.Option):
        return max(parameter.opts, key=len)
    return parameter.human_readable_name.strip("[]")


def table_console() -> Console:
    """Return the console that prints tables: as wide as the terminal, or at least _MIN_WIDTH columns without one."""
    screen = Console()
    if not screen.is_terminal:
        screen.width = max(screen.width, _MIN_WIDTH)
    return screen


def size_text(num_bytes: float) -> str:
    """Format a number of bytes in B, KiB, MiB or GiB; zero gives an empty string."""
    if not num_bytes:
        return ""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.{0 if unit == 'B' else 1}f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} GiB"


@contextmanager
def loading_bar(label: str, *, show: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar of bytes on standard error, if `show` is set and it is a terminal.

    Yield a callback (bytes done, bytes in all).
    """
    with Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        console=console, disable=not show or not console.is_terminal, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task(label)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def load_model(
    model: str | None, options: ModelOptions, *, quiet: bool = False, redundant_experts: int | None = None
) -> LLM:  # fmt: skip
    """Load the model on its mesh, with a progress bar unless quiet. Call start_jax before.

    In a process that follows, this runs the operations of process 0, and exits with it.
    """
    from jaxmoe.api.llm import LLM
    from jaxmoe.model.kernels import KernelConfig
    from jaxmoe.weights.source import DEFAULT_MODEL

    name = DEFAULT_MODEL if model is None else model
    engine = options.engine.with_options({"redundant_experts": redundant_experts})
    KernelConfig(**engine.kernels)  # reject an unknown backend before anything is read
    with loading_bar(f"loading {Path(name).name}", show=not quiet) as on_progress:
        llm = LLM(name, engine, on_progress=on_progress)
    if llm.follows:
        sys.exit(llm.follow())
    return llm


def read_id_lines(path: str) -> list[list[int]]:
    """Read token ids from a file with one JSON list per line. Raises: RequestError naming the file and line."""
    import json

    from jaxmoe.errors import RequestError

    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            ids = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RequestError(
                f"{path} line {number} is not JSON: write one JSON list of token ids per line"
            ) from error
        if not isinstance(ids, list):
            raise RequestError(f"{path} line {number} holds {line.strip()[:40]!r}: write a JSON list of token ids")
        rows.append(ids)
    if not rows:
        raise RequestError(f"{path} holds no lines: write one JSON list of token ids per line")
    return rows
