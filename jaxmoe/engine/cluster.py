"""One model over several processes: process 0 controls, the others follow.

All processes load the same models in the same order. Then process 0 runs requests, and the others run what it tells
them. A call of the API in a process that follows waits for the same call of process 0, and returns its result.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from typing import Any

from jaxmoe.engine.control import ControlReceiver, ControlSender
from jaxmoe.engine.runner import ModelRunner
from jaxmoe.engine.worker import ModelExecutor, ModelFollower
from jaxmoe.errors import StepError
from jaxmoe.parallel.processes import LOST_CODE, ProcessGroup, joined

_END, _RESULT = "end", "result"


class ClusterController:
    """Represent the control of all models in process 0."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.sender = group, ControlSender(group)
        self._num_models = 0
        group.at_exit.append(self._end)

    def executor(self, runner: ModelRunner) -> ModelExecutor:
        """Return the executor of a model that all processes have loaded."""
        model_id = self._num_models
        self._num_models += 1
        return ModelExecutor(runner, sender=self.sender, group=self.group, model_id=model_id)

    def _end(self) -> None:
        self.sender.send(_END, {"code": self.group.exit_code})


class ClusterFollower:
    """Run what process 0 tells, in a process that follows it."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._receiver = ControlReceiver(group)
        self._models: dict[int, ModelFollower] = {}
        self._results: dict[int, deque[Any]] = defaultdict(deque)
        self._num_models = 0
        self._lock = threading.RLock()
        self.exit_code: int | None = None  # once process 0 has ended
        group.at_exit.append(self.follow)

    def register(self, runner: ModelRunner) -> int:
        """Follow a model that all processes have loaded. Returns its id."""
        model_id = self._num_models
        self._num_models += 1
        self._models[model_id] = ModelFollower(runner, self.group)
        return model_id

    def result(self, model_id: int) -> Any:
        """Follow until process 0 has finished its next call of a model, and return the result of that call."""
        with self._lock:
            results = self._results[model_id]
            while not results:
                if self.exit_code is not None:
                    raise StepError("process 0 has ended without this call: make the same calls in every process")
                self._run_next()
            return results.popleft()

    def follow(self) -> int:
        """Follow until process 0 ends, and return its exit code."""
        with self._lock:
            while self.exit_code is None:
                self._run_next()
            return self.exit_code

    def _run_next(self) -> None:
        message = self._receiver.receive()
        if message.op == _END:
            self.exit_code = message.values["code"]
        elif message.op == _RESULT:
            self._results[message.values["model"]].append(message)
        else:
            model_id = message.values["model"]
            try:
                self._models[model_id].run(message, self._receiver.received - 1)
            except StepError as error:  # process 0 cannot go on without this process
                self.group.fail(str(error), LOST_CODE)


_control: ClusterController | ClusterFollower | None = None


def cluster_control() -> ClusterController | ClusterFollower:
    """Return the control of this process, which is connected at the first call. Call it in all processes."""
    global _control
    group = joined()
    assert group is not None
    if _control is None:
        _control = ClusterController(group) if group.is_controller else ClusterFollower(group)
    return _control
