"""One model over several processes: process 0 controls, the others follow.

All processes load the same models in the same order. Then process 0 runs requests, and the others run the operations
that it sends. A call of the API in a process that follows waits for the same call of process 0, and returns its result.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque

from jaxmoe.engine.control import ControlMessage, ControlReceiver, ControlSender
from jaxmoe.engine.runner import ModelRunner
from jaxmoe.engine.worker import ModelExecutor, ModelFollower
from jaxmoe.errors import StepError
from jaxmoe.parallel.processes import ProcessGroup, joined
from jaxmoe.parallel.timeouts import LOST_CODE

_END, _RESULT = "end", "result"
_MAX_RESULTS = 1024  # of calls that process 0 alone makes


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
    """Run the operations of process 0, in a process that follows it."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._receiver = ControlReceiver(group)
        self._models: dict[int, ModelFollower] = {}
        self._results: dict[tuple[int, str], deque[ControlMessage]] = defaultdict(lambda: deque(maxlen=_MAX_RESULTS))
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

    def result(self, model_id: int, call: str) -> ControlMessage:
        """Follow until process 0 has finished its next call of this name of a model, and return its result.

        Raises: StepError if process 0 ends before.
        """
        with self._lock:
            results = self._results[model_id, call]
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
            self._results[message.values["model"], message.values["call"]].append(message)
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
