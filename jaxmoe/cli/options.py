"""Options that several commands share, and what they set up before JAX starts."""

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
_MIN_WIDTH = 140  # of tables that no terminal shows


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What a command was told of the model it loads; load_model reads it."""

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
    """Adds the options of ModelOptions, which reach the command as its argument `options`."""
    declared = [
        click.option("--mesh", help="axes, as in data=2,tensor=2,expert=2, or a preset such as cpu-8"),
        click.option("--devices", type=int, help="emulate this many devices on the CPU"),
        click.option("--dtype", help="float32, bfloat16 or float16; the checkpoint's own by default"),
        click.option(
            "--weights-dtype",
            help="of matrices: int8, fp8, int8-block or fp8-block quantizes; float32, bfloat16 or float16 dequantizes; "
            "as the checkpoint has them by default",
        ),
        click.option(
            "--kv-dtype", help="of cached keys and values: float32, bfloat16, fp8 or int8; as --dtype by default"
        ),
        click.option("--revision", help="branch, tag or commit of a hub model"),
        click.option("--ignore-config-key", "ignore_config_keys", multiple=True, help="a config.json key to pass over"),
        click.option(
            "--native/--no-native", default=None, help="C++ kernels for the CPU; by default where they compile"
        ),
        click.option(
            "--dispatch",
            help="tokens to experts: all_to_all (default), all_gather, ragged_all_to_all, hierarchical[_ragged]",
        ),
        click.option("--grouped", help="grouped matmul backend of experts: blocks, ragged, native or dense"),
        click.option("--linear", help="backend of all other matmuls: xla or native"),
        click.option("--attention", help="over pages: loop or native"),
        click.option("--pointwise", help="norms, rotary embedding, routing and gates: xla or native"),
        click.option("--sampling", help="from logits to tokens: xla or native"),
        click.option("--layers", help="alike layers: scan (one program in a loop) or unroll"),
        click.option(
            "--virtual-stages",
            type=int,
            default=1,
            show_default=True,
            help="virtual stages of each pipeline stage (interleaved schedule)",
        ),
        click.option(
            "--layout",
            default="ep-tp",
            show_default=True,
            help="how mesh axes shard attention and experts: ep-tp, tp-ep, dp-ep, tp, with -sp, cp-ep-tp, or parts",
        ),
        click.option("--max-num-seqs", type=int, default=64, show_default=True, help="most requests that run at once"),
        click.option("--verify", is_flag=True, help="hold a converted checkpoint against its checksums first"),
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
    """Whether folder is there and open to us, or can be made. Nothing is made yet: input is not checked."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def start_jax(devices: int | None) -> None:
    """Emulate devices if asked, and keep compiled programs between runs. Call before anything else touches JAX."""
    import jax

    from jaxmoe.parallel.mesh import emulate_devices

    if jax.config.jax_compilation_cache_dir is None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "jaxmoe" / "compiled"
        if _can_write(folder):
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        else:
            console.print(f"jaxmoe: compiled programs are not kept: {folder} cannot be written; set XDG_CACHE_HOME")
    if devices is not None:
        emulate_devices(devices)


def table_console() -> Console:
    """Standard output for tables: as wide as the terminal, or wide enough for most of them where there is none."""
    screen = Console()
    if not screen.is_terminal:
        screen.width = max(screen.width, _MIN_WIDTH)
    return screen


def size_text(num_bytes: float) -> str:
    """In a unit that makes it a short number; nothing of nothing."""
    if not num_bytes:
        return ""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.{0 if unit == 'B' else 1}f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} GiB"


@contextmanager
def loading_bar(label: str, *, show: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error for bytes placed; nothing where not shown or not a terminal."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        console=console, disable=not show or not console.is_terminal, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task(label)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def load_model(
    model: str | None, options: ModelOptions, *, quiet: bool = False, redundant_experts: int | None = None
) -> LLM:  # fmt: skip
    """The model on its mesh, with a progress bar unless quiet. JAX must have been started (start_jax)."""
    from jaxmoe.api.llm import LLM
    from jaxmoe.model.kernels import NATIVE_OPS, OPS, KernelConfig
    from jaxmoe.weights.source import DEFAULT_MODEL

    name = DEFAULT_MODEL if model is None else model
    steps = {op: getattr(options, op) for op in OPS if getattr(options, op) is not None}
    if options.native is not None:
        plain = KernelConfig()
        steps = {op: "native" if options.native else getattr(plain, op) for op in NATIVE_OPS} | steps
    KernelConfig(**steps)  # a kernel that does not exist is said before anything is read
    with loading_bar(f"loading {Path(name).name}", show=not quiet) as on_progress:
        return LLM.load(
            name, mesh=options.mesh, dtype=options.dtype, weights_dtype=options.weights_dtype,
            kv_dtype=options.kv_dtype, revision=options.revision, kernels=steps,
            ignore_config_keys=options.ignore_config_keys, max_num_seqs=options.max_num_seqs,
            virtual_stages=options.virtual_stages, layout=options.layout, redundant_experts=redundant_experts,
            verify=options.verify, on_progress=on_progress,
        )  # fmt: skip


def read_id_lines(path: str) -> list[list[int]]:
    """One JSON list of token ids a line. Raises: RequestError naming the file and line."""
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
            raise RequestError(f"{path} line {number} is not JSON: one list of token ids a line is needed") from error
        if not isinstance(ids, list):
            raise RequestError(f"{path} line {number} holds {line.strip()[:40]!r}, a JSON list of token ids is needed")
        rows.append(ids)
    if not rows:
        raise RequestError(f"{path} holds no lines: one JSON list of token ids a line is needed")
    return rows
