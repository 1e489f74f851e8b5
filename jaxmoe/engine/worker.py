"""The device state of an engine core, and the operations that change it: the same in every process.

Process 0 decides: a `ModelExecutor` sends each operation to the other processes, where a `ModelFollower` runs it, and
runs it here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import jax
import numpy as np

from jaxmoe.cache.pages import PageCopy
from jaxmoe.engine.batch import StepBucket
from jaxmoe.engine.control import ControlMessage, ControlSender
from jaxmoe.engine.limits import SchedulerConfig
from jaxmoe.engine.runner import ModelRunner
from jaxmoe.engine.step_programs import EngineState, StepOutput
from jaxmoe.engine.transfer import HostOffload
from jaxmoe.errors import ProcessLostError, StepError
from jaxmoe.parallel.eplb import ExpertPlacement
from jaxmoe.parallel.processes import ProcessGroup

_FAILED = "failed"  # an operation that has failed in process 0, too
Broadcast = Callable[..., AbstractContextManager[None]]  # as ModelExecutor.broadcast


class EngineWorker:
    """Hold the KV cache of one engine core on this process's devices, with its pages in host memory, and run its steps.

    broadcast: context manager around each operation, called with its name, values and arrays.
    """

    def __init__(
        self, runner: ModelRunner, broadcast: Broadcast, worker_id: int,
        *, max_num_seqs: int, num_pages: int, page_size: int, num_host_pages: int,
    ) -> None:  # fmt: skip
        self._runner, self._broadcast, self._id = runner, broadcast, worker_id
        self._sizes = max_num_seqs, num_pages, page_size
        self._host_offload = HostOffload(runner) if num_host_pages else None
        values = {
            "max_num_seqs": max_num_seqs, "num_pages": num_pages, "page_size": page_size,
            "num_host_pages": num_host_pages,
        }  # fmt: skip
        self._programs: set[tuple[Any, ...]] = set()
        with self._operation("worker", values):
            self.state: EngineState = runner.empty_state(*self._sizes)

    def _operation(
        self, op: str, values: dict[str, Any] | None = None, arrays: Sequence[np.ndarray] = (), **facts: Any
    ) -> AbstractContextManager[None]:
        return self._broadcast(op, {"worker": self._id, **(values or {})}, arrays, **facts)

    def step(
        self, packed: np.ndarray, features: tuple[bool, bool, bool], bucket: StepBucket,
        *, decode_steps: int, max_decode_steps: int, traced: bool, token_bitmask: np.ndarray | None = None,
    ) -> StepOutput:  # fmt: skip
        """Run one step, as ModelRunner.step."""
        values = {
            "features": features, "bucket": bucket, "decode_steps": decode_steps,
            "max_decode_steps": max_decode_steps, "traced": traced,
        }  # fmt: skip
        arrays = [packed] if token_bitmask is None else [packed, token_bitmask]
        program = bucket, max_decode_steps, traced
        with self._operation("step", values, arrays, compiles=program not in self._programs):
            self.state, output = self._runner.step(
                self.state, packed, features, bucket, decode_steps=decode_steps, max_decode_steps=max_decode_steps,
                traced=traced, token_bitmask=token_bitmask,
            )  # fmt: skip
        self._programs.add(program)
        return output

    def copy_page(self, rank: int, page_copy: PageCopy) -> None:
        """Copy one page of a rank to host memory, or back."""
        assert self._host_offload is not None
        values, program = {"rank": rank, "copy": page_copy}, (page_copy.direction,)
        with self._operation("copy_page", values, compiles=program not in self._programs):
            self.state = self._host_offload.run(self.state, rank, page_copy)
        self._programs.add(program)

    def clear_host_pages(self) -> None:
        """Drop all pages in host memory."""
        if self._host_offload is not None:
            with self._operation("clear_host_pages"):
                self._host_offload.clear()

    def reset(self) -> None:
        """Replace the state by an empty one, after a step that failed. Drops the pages in host memory."""
        with self._operation("reset"):
            self._delete()  # frees memory for the empty state
            self.state = self._runner.empty_state(*self._sizes)
            if self._host_offload is not None:
                self._host_offload.clear()

    def free(self) -> None:
        """Free the device arrays. The worker cannot run afterwards."""
        with self._operation("free"):
            self._delete()

    def _delete(self) -> None:
        for array in jax.tree.leaves(self.state):  # some may have been donated
            array.delete()

    def wait(self) -> None:
        """Wait for all steps and page copies. Raises: the error of a step that failed."""
        jax.block_until_ready(self.state)


class ModelExecutor:
    """Run the operations of one loaded model: in this process, and in all that follow if there are any.

    sender: channel to the other processes; None in a process by itself. model_id: of the models of this process.
    """

    def __init__(
        self, runner: ModelRunner, *, sender: ControlSender | None = None, group: ProcessGroup | None = None,
        model_id: int = 0,
    ) -> None:  # fmt: skip
        self.runner = runner
        self._sender, self._group, self._model_id = sender, group, model_id
        self._order = threading.RLock()  # operations are sent and dispatched in one order
        self._num_workers = 0

    @contextmanager
    def broadcast(
        self, op: str, values: dict[str, Any], arrays: Sequence[np.ndarray] = (), *, compiles: bool = True
    ) -> Iterator[None]:
        """Send an operation to the other processes, then run the body of the with statement.

        compiles: whether the body may compile a program, which can take any time.
        """
        if self._sender is None or self._group is None:
            yield
            return
        with self._order:
            self._sender.send(op, {"model": self._model_id, **values}, arrays)
            if not compiles:
                self._group.in_step(self._sender.sent - 1)
            try:
                yield
            except Exception:  # the same error in all processes, which ends no process
                self._sender.send(_FAILED, {"model": self._model_id})
                raise
            finally:
                self._group.idle(self._sender.sent)

    def worker(self, config: SchedulerConfig) -> EngineWorker:
        """Return a worker with empty pages. Raises: RequestError if the devices have too little memory."""
        with self._order:
            self._num_workers += 1
            return EngineWorker(
                self.runner, self.broadcast, self._num_workers, max_num_seqs=config.max_num_seqs,
                num_pages=config.num_pages, page_size=config.page_size, num_host_pages=config.num_host_pages,
            )  # fmt: skip

    def score(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return log-probabilities and last logits on the host, as ModelRunner.score."""
        with self.broadcast("score", {}, [tokens, lengths]):
            logprobs, logits = self.runner.score(tokens, lengths)
        return np.asarray(logprobs), np.asarray(logits)

    def place_experts(self, wanted: ExpertPlacement) -> None:
        """Move experts, as ModelRunner.place_experts."""
        with self.broadcast("place_experts", {"num_ranks": wanted.num_ranks}, wanted.maps()):
            self.runner.place_experts(wanted)

    @property
    def has_followers(self) -> bool:
        """Return whether other processes follow this one."""
        return self._sender is not None

    def send_result(self, call: str, values: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        """Send the result of a call to the processes that follow, which may make the same call."""
        if self._sender is not None:
            self._sender.send("result", {"model": self._model_id, "call": call, **values}, arrays)

    def fault(self, error: Exception) -> StepError:
        """Return the error for the requests of a failed step: a ProcessLostError if another process was lost."""
        if self._group is not None:
            try:
                self._group.settle()
            except ProcessLostError as lost:
                return lost
        return StepError(f"the step that computed this request failed: {error}")


class ModelFollower:
    """Run the operations of one loaded model as process 0 sends them."""

    def __init__(self, runner: ModelRunner, group: ProcessGroup) -> None:
        self._runner, self._group = runner, group
        self._workers: dict[int, EngineWorker] = {}
        self._failed: Exception | None = None
        self._number = 0

    def run(self, message: ControlMessage, number: int) -> None:
        """Run one operation, the number-th of process 0.

        An error is stored until process 0 sends that the operation has failed there, too, or resets the worker.
        Raises: StepError if process 0 goes on as if the operation had not failed.
        """
        op, values, arrays = message
        if self._failed is not None and op not in ("reset", "free", _FAILED):
            raise StepError(f"step {number - 1} failed here and not in process 0: {self._failed}") from self._failed
        self._failed, self._number = None, number
        try:
            self._run(op, values, arrays)
        except Exception as error:  # any error of a device or a compiler
            self._failed = error
        finally:
            self._group.idle(number + 1)

    def _run(self, op: str, values: dict[str, Any], arrays: list[np.ndarray]) -> None:
        match op:
            case "worker":
                worker_id = values["worker"]
                sizes = {name: values[name] for name in ("max_num_seqs", "num_pages", "page_size", "num_host_pages")}
                self._workers[worker_id] = EngineWorker(self._runner, self._broadcast, worker_id, **sizes)
            case "step":
                bucket = StepBucket(**values["bucket"])
                self._workers[values["worker"]].step(
                    arrays[0], tuple(values["features"]), bucket, decode_steps=values["decode_steps"],
                    max_decode_steps=values["max_decode_steps"], traced=values["traced"],
                    token_bitmask=arrays[1] if len(arrays) > 1 else None,
                )  # fmt: skip
            case "copy_page":
                self._workers[values["worker"]].copy_page(values["rank"], PageCopy(**values["copy"]))
            case "clear_host_pages" | "reset":
                getattr(self._workers[values["worker"]], op)()
            case "free":
                self._workers.pop(values["worker"]).free()
            case "failed":
                pass  # the error of the last operation is forgotten
            case "score":
                self._runner.score(*arrays)
            case "place_experts":
                self._runner.place_experts(ExpertPlacement.of(arrays, num_ranks=values["num_ranks"]))
            case _:
                raise StepError(f"process 0 sent {op!r}, which this version does not know")

    @contextmanager
    def _broadcast(self, op: str, values: Any, arrays: Any = (), *, compiles: bool = True) -> Iterator[None]:
        if not compiles:
            self._group.in_step(self._number)
        yield
