"""Training loop with a progress line and periodic evaluation on held-out text."""

from __future__ import annotations

import time
from dataclasses import dataclass

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxmoe.train.data import batches, evaluation_batches
from jaxmoe.train.step import StepMetrics, Trainer, TrainState


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Report the loss on text that is not trained on, in nats. bits_per_byte is nats_per_byte / log(2)."""

    nats_per_token: float
    nats_per_byte: float
    bits_per_byte: float
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Report a finished run.

    held_out: evaluation of the weights as exported, rounded to the checkpoint's dtype. loss_nats_per_token, balance:
    losses of the last training batch. wall_s, cpu_s: wall and CPU time of train() alone; other load on the machine
    affects only wall_s.
    """

    state: TrainState
    held_out: HeldOut
    loss_nats_per_token: float
    balance: float
    num_tokens: int
    wall_s: float
    cpu_s: float


def evaluate(trainer: Trainer, state: TrainState, stream: np.ndarray, *, num_bytes: int) -> HeldOut:
    """Evaluate the loss over a token stream, in windows of the recipe's length. num_bytes: size of its text."""
    recipe = trainer.recipe
    nats, num_tokens = 0.0, 0
    for tokens, lengths in evaluation_batches(stream, batch_rows=recipe.batch_rows, window_tokens=recipe.window_tokens):
        nats += float(np.sum(np.asarray(trainer.nats(state.params, tokens, lengths)), dtype=np.float64))
        num_tokens += int(lengths.sum())
    return HeldOut(
        nats_per_token=nats / num_tokens,
        nats_per_byte=nats / num_bytes,
        bits_per_byte=nats / num_bytes / float(np.log(2)),
        num_tokens=num_tokens,
        num_bytes=num_bytes,
    )


def as_written(params: tuple[jax.Array, ...], dtype: str) -> tuple[jax.Array, ...]:
    """Round parameters to the dtype of the checkpoint and return them in the training dtype."""
    return tuple(param.astype(dtype).astype(param.dtype) for param in params)


def train(
    trainer: Trainer,
    training: np.ndarray,
    held_out: np.ndarray,
    *,
    held_out_bytes: int,
    evaluate_every: int = 200,
    console: Console | None = None,
) -> TrainResult:
    """Train the recipe on a token stream. Metrics are read one step late, so the host never blocks the device.

    Raises: FloatingPointError if the loss is not finite.
    """
    recipe = trainer.recipe
    console = Console(stderr=True) if console is None else console
    windows = batches(training, batch_rows=recipe.batch_rows, window_tokens=recipe.window_tokens, seed=recipe.seed)
    started, started_cpu = time.perf_counter(), time.process_time()
    state, pending, metrics = trainer.init(), None, (float("nan"), float("nan"))
    columns = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=recipe.num_steps, shown="")
        for step in range(1, recipe.num_steps + 1):
            state, new = trainer.step(state, next(windows))
            if pending is not None:
                metrics = _read(pending, step - 1)
            pending = new
            progress.update(task, advance=1, shown=f"loss {metrics[0]:.3f} balance {metrics[1]:.3f}")
            if step % evaluate_every == 0 and step < recipe.num_steps:
                result = evaluate(trainer, state, held_out, num_bytes=held_out_bytes)
                console.print(f"step {step}: {_line(result, metrics, time.perf_counter() - started)}")
    assert pending is not None
    metrics = _read(pending, recipe.num_steps)
    state = TrainState(as_written(state.params, recipe.model.dtype), state.optimizer)
    result = evaluate(trainer, state, held_out, num_bytes=held_out_bytes)
    wall_s = time.perf_counter() - started
    console.print(f"step {recipe.num_steps}: {_line(result, metrics, wall_s)}")
    return TrainResult(
        state=state,
        held_out=result,
        loss_nats_per_token=metrics[0],
        balance=metrics[1],
        num_tokens=recipe.num_steps * recipe.batch_rows * recipe.window_tokens,
        wall_s=wall_s,
        cpu_s=time.process_time() - started_cpu,
    )


def _read(metrics: StepMetrics, step: int) -> tuple[float, float]:
    loss, balance = float(metrics.loss), float(metrics.balance)
    if not np.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} at step {step}: lower learning_rate")
    return loss, balance


def _line(held_out: HeldOut, metrics: tuple[float, float], wall_s: float) -> str:
    return (
        f"held-out {held_out.nats_per_token:.4f} nats/token, {held_out.bits_per_byte:.4f} bits/byte; "
        f"training {metrics[0]:.4f}, balance {metrics[1]:.3f}; {wall_s:.0f} s"
    )
