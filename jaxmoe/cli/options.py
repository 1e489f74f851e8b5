"""Options and helpers that several commands share, such as starting JAX and loading the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

if TYPE_CHECKING:
    from jaxmoe.api.llm import LLM

console = Console(stderr=True, highlight=False)
_MIN_WIDTH = 140  # columns, for tables that are not printed to a terminal


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Hold the values of the options of model_options, which load_model reads."""

    mesh: str | None
    devices: int | None
    dtype: str | None
    weights_dtype: str | None
    kv_dtype: str | None
    revision: str | None
    ignore_config_keys: tuple[str, ...]
    dispatch: str | None
    grouped: str | None
    linear: str | None
    attention: str | None
    pointwise: str | None
    sampling: str | None
    layers: str | None
    native: bool | None
    virtual_stages: int
    layout: str
    max_num_seqs: int
    verify: bool


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of ModelOptions to a command, which receives them as its argument `options`."""
    declared = [
        click.option(
            "--mesh", help="Mesh axes and their sizes, as in data=2,tensor=2,expert=2, or a mesh preset such as cpu-8."
        ),
        click.option("--devices", type=int, help="Emulate this many devices on the CPU."),
        click.option(
            "--dtype",
            help="Dtype of weights and activations: float32, bfloat16 or float16. Defaults to the checkpoint's dtype.",
        ),
        click.option(
            "--weights-dtype",
            help="Dtype of the weight matrices: int8, fp8, int8-block or fp8-block quantizes them on load; float32, "
            "bfloat16 or float16 dequantizes them. Defaults to the checkpoint's format.",
        ),
        click.option("--kv-dtype", help="Dtype of the KV cache: float32, bfloat16, fp8 or int8. Defaults to --dtype."),
        click.option("--revision", help="Branch, tag or commit of a Hugging Face Hub model."),
        click.option(
            "--ignore-config-key",
            "ignore_config_keys",
            multiple=True,
            help="Ignore this key of config.json. Can be given several times.",
        ),
        click.option(
            "--native/--no-native",
            default=None,
            help="Use C++ kernels, or XLA only. By default C++ kernels are used on a CPU with a C++ compiler.",
        ),
        click.option(
            "--dispatch",
            help="Backend that sends tokens to their experts: all_to_all (default), all_gather, ragged_all_to_all, "
            "hierarchical or hierarchical_ragged.",
        ),
        click.option("--grouped", help="Grouped matmul backend of the experts: blocks, ragged, native or dense."),
        click.option("--linear", help="Backend of all other matmuls: xla or native."),
        click.option("--attention", help="Backend of attention over the paged KV cache: loop or native."),
        click.option(
            "--pointwise", help="Backend of norms, rotary embedding, routing and gated activations: xla or native."
        ),
        click.option("--sampling", help="Backend of sampling tokens from logits: xla or native."),
        click.option(
            "--layers",
            help="Execution of equal layers: scan (compile one and loop over them) or unroll (compile each).",
        ),
        click.option(
            "--virtual-stages",
            type=int,
            default=1,
            show_default=True,
            help="Virtual stages per pipeline stage (interleaved schedule).",
        ),
        click.option(
            "--layout",
            default="ep-tp",
            show_default=True,
            help="Parallelism layout: how mesh axes shard attention and experts. One of ep-tp, tp-ep, dp-ep, tp, "
            "ep-tp-sp, tp-ep-sp, tp-sp and cp-ep-tp, or its parts, as in batch=data+expert,split=tensor.",
        ),
        click.option(
            "--max-num-seqs",
            type=int,
            default=64,
            show_default=True,
            help="Maximum number of requests that run at once, over all devices.",
        ),
        click.option(
            "--verify", is_flag=True, help="Verify a converted checkpoint by its checksums before loading it."
        ),
    ]
    names = [field.name for field in fields(ModelOptions)]

    @wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        options = ModelOptions(**{name: kwargs.pop(name) for name in names})
        return function(*args, options=options, **kwargs)

    for option in reversed(declared):
        command = option(command)
    return command


def _can_write(folder: Path) -> bool:
    """Return whether folder is writable or can be created. It is not created here, before the input is checked."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def start_jax(devices: int | None) -> None:
    """Emulate devices if given, and set up the cache of compiled programs. Call before anything else uses JAX."""
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
    if devices is not None:
        emulate_devices(devices)


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
    """Load the model on its mesh, with a progress bar unless quiet. Call start_jax before."""
    from jaxmoe.api.llm import LLM
    from jaxmoe.model.kernels import NATIVE_OPS, OPS, KernelConfig
    from jaxmoe.weights.source import DEFAULT_MODEL

    name = DEFAULT_MODEL if model is None else model
    steps = {op: getattr(options, op) for op in OPS if getattr(options, op) is not None}
    if options.native is not None:
        plain = KernelConfig()
        steps = {op: "native" if options.native else getattr(plain, op) for op in NATIVE_OPS} | steps
    KernelConfig(**steps)  # raises for an unknown backend before any file is read
    with loading_bar(f"loading {Path(name).name}", show=not quiet) as on_progress:
        return LLM.load(
            name, mesh=options.mesh, dtype=options.dtype, weights_dtype=options.weights_dtype,
            kv_dtype=options.kv_dtype, revision=options.revision, kernels=steps,
            ignore_config_keys=options.ignore_config_keys, max_num_seqs=options.max_num_seqs,
            virtual_stages=options.virtual_stages, layout=options.layout, redundant_experts=redundant_experts,
            verify=options.verify, on_progress=on_progress,
        )  # fmt: skip


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
