"""The coordinator of joined processes: `python -m jaxmoe.parallel.coordinator PORT`, started by process 0.

It hosts the coordination service of jax.distributed (if the processes start JAX), so that the death of process 0 does
not abort the others, and it is where processes meet: it starts them once all have joined, compares and collects values,
and names a process that is missing, doubled, lost or stuck. It runs no model and uses no devices.
"""

# Messages are one JSON object each, {"op": ..., ...}.
#   to the coordinator: hello, beat, agree, failed, suspect, bye
#   to a process:       start, beat, ping, agreed, settled, and the ends: refused, failed, lost
from __future__ import annotations

import json
import select
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from jaxmoe.parallel.timeouts import LAST_SECONDS

BEAT_SECONDS = 0.5
_POLL_MS = 100
_SHORT_SECONDS = 4.0  # a process that is suspected and silent for so long is lost
_BIND_SECONDS = 8.0  # for the coordinator of an earlier run to leave the port


def message(op: str, **values: Any) -> bytes:
    """Return one message of the protocol."""
    return json.dumps({"op": op, **values}).encode()


@dataclass(kw_only=True)
class JoinedProcess:
    """Describe one process as the coordinator knows it. times are of time.monotonic()."""

    process_id: int
    identity: bytes
    host: str
    pid: int
    facts: dict[str, Any]
    heard: float
    status: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"process {self.process_id} ({self.host}, pid {self.pid})"


class ProcessCoordinator:
    """Hold the state of the coordinator: one run of N processes from the first hello to the last goodbye."""

    def __init__(
        self, router: zmq.Socket, *, num_processes: int, lost_after: float, join_timeout: float, owner: str,
        with_jax: bool,
    ) -> None:  # fmt: skip
        """owner: identity of process 0, which has started this coordinator. with_jax: host the service of JAX."""
        self._router, self._num, self._join_timeout = router, num_processes, join_timeout
        self._lost_after = silence_limit(lost_after)
        self._processes: dict[int, JoinedProcess] = {}
        self._agreements: dict[str, dict[int, dict[str, Any]]] = {}
        self._started_at = time.monotonic()
        self._with_jax, self._started = with_jax, False
        self._service: Any = None
        self._suspected_at: float | None = None
        self._settling: list[bytes] = []
        self._ended_at: float | None = None
        self._end_message = b""
        self._owner: bytes | None = bytes.fromhex(owner)  # None once it has joined or ended
        self._beat_at = 0.0

    @property
    def done(self) -> bool:
        """Return whether every process has ended, or has had its time to end."""
        if self._ended_at is not None:
            gone = not self._processes and self._owner is None
            return gone or time.monotonic() - self._ended_at > LAST_SECONDS
        return self._started and not self._processes

    def _send_all(self, text: bytes) -> None:
        for process in self._processes.values():
            self._router.send_multipart([process.identity, text])

    def end(self, op: str, line: str, **values: Any) -> None:
        """Send all processes the message to end, with the line that each of them prints. Only the first end counts."""
        if self._ended_at is None:
            self._ended_at = time.monotonic()
            self._end_message = message(op, line=line, **values)
            self._send_all(self._end_message)

    # --- messages ---

    def receive(self, identity: bytes, text: bytes) -> None:
        """Handle one message of a process."""
        values = json.loads(text)
        op = values.pop("op")
        if op == "hello":
            self._hello(identity, **values)
            return
        process = next((one for one in self._processes.values() if one.identity == identity), None)
        if process is None:  # it has been asked to end
            return
        process.heard = time.monotonic()
        if op == "beat":
            process.status = values
        elif op == "agree":
            self._agree(process, **values)
        elif op == "failed":
            del self._processes[process.process_id]
            self.end("failed", f"process {process.process_id}: {values['line']}", code=values["code"])
        elif op == "suspect":
            self._settling.append(identity)
            self.suspect()
        elif op == "bye":
            del self._processes[process.process_id]

    def _hello(self, identity: bytes, *, process_id: int, host: str, pid: int, facts: dict[str, Any]) -> None:
        now = time.monotonic()
        joined = JoinedProcess(process_id=process_id, identity=identity, host=host, pid=pid, facts=facts, heard=now)
        known = self._processes.get(process_id)
        owned = identity == self._owner
        self._owner = None if owned else self._owner
        if self._ended_at is not None:
            if owned:
                self._router.send_multipart([identity, self._end_message])
            return  # another one asks again, and then the coordinator of the next run
        if known is not None and known.identity == identity:
            known.heard = now
            return
        if known is not None or self._started:
            both = f"{joined} and {known or 'an earlier process'} both have process_id={process_id}: give each its own"
            self._router.send_multipart([identity, message("refused", line=both)])
            self.end("refused", both)
            return
        first = self._processes.get(min(self._processes, default=process_id), joined)
        self._processes[process_id] = joined
        lower, higher = sorted((first, joined), key=lambda one: one.process_id)
        line = difference(lower.facts, lower.process_id, higher.facts, higher.process_id)
        if line is not None:
            self.end("refused", line)
        elif len(self._processes) == self._num:
            self._start()

    def _start(self) -> None:
        self._started, jax_port = True, 0
        if self._with_jax:
            jax_port, self._service = start_jax_service(self._num)
        now = time.monotonic()
        for process in self._processes.values():
            process.heard = now
        self._send_all(message("start", jax_port=jax_port, names=[str(self._processes[i]) for i in range(self._num)]))

    def _agree(
        self, process: JoinedProcess, *, name: str, values: dict[str, Any], compare: bool, collect: bool
    ) -> None:
        """Answer all once the last has sent its values: with the values of process 0, or (collect) to it with all."""
        values_of = self._agreements.setdefault(name, {})
        values_of[process.process_id] = values
        if len(values_of) < self._num:
            return
        del self._agreements[name]
        for other in range(1, self._num) if compare else ():
            line = difference(values_of[0], 0, values_of[other], other)
            if line is not None:
                self.end("refused", line)
                return
        collected = [values_of[index] for index in range(self._num)]
        for index, each in self._processes.items():
            result = values_of[0] if not collect else collected if index == 0 else []
            self._router.send_multipart([each.identity, message("agreed", name=name, values=result)])

    # --- time ---

    def suspect(self) -> None:
        """Ask every process for a sign of life: one that gives none within a few seconds is lost."""
        if self._suspected_at is None:
            self._suspected_at = time.monotonic()
            self._send_all(message("ping"))

    def tick(self) -> None:
        """Send a beat, and look who is missing, lost or stuck."""
        now = time.monotonic()
        if now - self._beat_at >= BEAT_SECONDS:
            self._beat_at = now
            self._send_all(message("beat"))
        if self._ended_at is not None:
            return
        if not self._started:
            if now - self._started_at > self._join_timeout:
                missing = [str(one) for one in range(self._num) if one not in self._processes]
                named = f"process{'es' if len(missing) > 1 else ''} {', '.join(missing)} of {self._num}"
                self.end("refused", f"{named} did not join within {self._join_timeout:g} s: start all with one command")
            return
        self._look_for_lost(now)
        self._look_for_stuck()

    def _look_for_lost(self, now: float) -> None:
        suspected = self._suspected_at
        for process in self._processes.values():
            silent = now - process.heard
            if silent > self._lost_after or (
                suspected is not None and process.heard < suspected and now - suspected > _SHORT_SECONDS
            ):
                self.lose(process.process_id, f"no sign of life for {silent:.0f} s")
                return
        if suspected is not None and now - suspected > _SHORT_SECONDS:
            self._suspected_at = None
            for identity in self._settling:
                self._router.send_multipart([identity, message("settled")])
            self._settling.clear()

    def lose_owner(self) -> None:
        """End all processes because process 0 has ended without a word."""
        self._owner = None
        self.lose(0, "it ended")

    def lose(self, process_id: int, why: str) -> None:
        """End all processes because one was lost."""
        process = self._processes.get(process_id)
        if process is not None:
            self.end("lost", f"{process} was lost: {why}")
            del self._processes[process_id]

    def _look_for_stuck(self) -> None:
        """Find a process that is behind the others in its steps and has been in one of them for too long."""
        steps = {one.process_id: one.status.get("steps", 0) for one in self._processes.values()}
        for process in self._processes.values():
            busy = process.status.get("busy_s", 0.0)
            if busy > self._lost_after and steps[process.process_id] < max(steps.values()):
                self.lose(process.process_id, f"it has hung in step {steps[process.process_id] + 1} for {busy:.0f} s")
                return


def silence_limit(lost_after: float) -> float:
    """Return the seconds of silence after which a process is lost, so that all have ended within lost_after."""
    return lost_after - min(3.0, 0.4 * lost_after)


def difference(values: dict[str, Any], process_id: int, others: dict[str, Any], other_id: int) -> str | None:
    """Return the line that names the first value that two processes have differently, or None."""
    for name in dict.fromkeys((*values, *others)):
        one, two = values.get(name), others.get(name)
        if one != two:
            return f"{name} is {one} in process {process_id} and {two} in process {other_id}: start both alike"
    return None


def start_jax_service(num_processes: int) -> tuple[int, Any]:
    """Start the coordination service of jax.distributed on a free port, and return the port and the service.

    Its own heartbeats are as good as off, since a lost process would make it abort the others without a word.
    """
    from jaxlib import _jax

    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    day = 24 * 3600
    service = _jax.get_distributed_runtime_service(
        f"[::]:{port}", num_processes, heartbeat_timeout=day, shutdown_timeout=60, cluster_register_timeout=day
    )
    return port, service


def _bind(router: zmq.Socket, port: int) -> bool:
    deadline = time.monotonic() + _BIND_SECONDS
    while True:
        try:
            router.bind(f"tcp://*:{port}")
        except zmq.ZMQError:
            if time.monotonic() > deadline or select.select([sys.stdin], [], [], 0.2)[0]:  # process 0 has ended
                return False
        else:
            return True


def main() -> None:
    """Serve one run: read its values from standard input, and end with the processes.

    The end of standard input is the end of process 0.
    """
    values = json.loads(sys.stdin.readline())
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 1000)
    router.setsockopt(zmq.IPV6, 1)
    if not _bind(router, values["port"]):  # another program has the port
        return
    monitor = router.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    coordinator = ProcessCoordinator(
        router, num_processes=values["num_processes"], lost_after=values["lost_after"],
        join_timeout=values["join_timeout"], owner=values["owner"], with_jax=values["with_jax"],
    )  # fmt: skip
    poller = zmq.Poller()
    for one in (router, monitor, sys.stdin.fileno()):
        poller.register(one, zmq.POLLIN)
    while not coordinator.done:
        ready = dict(poller.poll(_POLL_MS))
        if monitor in ready:
            recv_monitor_message(monitor)
            coordinator.suspect()
        while router.poll(0):
            coordinator.receive(*router.recv_multipart())
        if sys.stdin.fileno() in ready:
            poller.unregister(sys.stdin.fileno())
            coordinator.lose_owner()
        coordinator.tick()
    router.disable_monitor()
    context.destroy(linger=1000)


if __name__ == "__main__":
    main()
