"""Processes that act as one: joining, comparing values that have to be equal, and ending together.

Each process holds some devices of the mesh. `join` connects all of them through jax.distributed and through a
coordinator (parallel/coordinator.py), a child of process 0.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import platform
import queue
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jaxlib
import zmq
from jax._src.xla_bridge import backends_are_initialized

from jaxmoe.errors import MeshError, ProcessLostError
from jaxmoe.parallel.address import coordinator_address, is_this_host
from jaxmoe.parallel.coordinator import BEAT_SECONDS, message, silence_limit
from jaxmoe.parallel.timeouts import JOIN_TIMEOUT_SECONDS, LOST_AFTER_SECONDS, LOST_CODE

_GRACE_SECONDS = 0.5  # from telling requests that they are lost to the end of this process
_MAX_DEVICES = 512

_group: ProcessGroup | None = None


class ProcessGroup:
    """Represent the joined processes, as seen by one of them. A thread of its own exchanges signs of life.

    Use `join` to make one, and `joined` to get it.
    """

    def __init__(
        self, host: str, port: int, *, process_id: int, num_processes: int, facts: Mapping[str, Any],
        lost_after: float, join_timeout: float, identity: bytes, with_jax: bool,
    ) -> None:  # fmt: skip
        self.host, self.process_id, self.num_processes, self.lost_after = host, process_id, num_processes, lost_after
        self.lost: str | None = None  # the line with the name of the lost process
        self.names: list[str] = []
        self.exit_code = 0  # of this process, and of all that follow it
        self.with_jax = with_jax
        self.jax_port = 0
        self.on_lost: list[Callable[[str], None]] = []  # called by the thread before this process ends
        self.at_exit: list[Callable[[], object]] = []  # called before the processes separate
        self._status: tuple[int, float | None] = (0, None)
        self._address = f"tcp://{host}:{port}"
        self._facts, self._join_timeout = dict(facts), join_timeout
        self._started, self._settled = threading.Event(), threading.Event()
        self._agreed: dict[str, queue.SimpleQueue[Any]] = {}
        self._agreements = 0
        self._ending, self._running, self._identity = threading.Lock(), True, identity
        self._context = zmq.Context()
        self._outbox = self._context.socket(zmq.PUSH)
        self._outbox_lock = threading.Lock()
        name = f"inproc://{uuid.uuid4()}"
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.bind(name)
        self._outbox.connect(name)
        self._refused: str | None = None
        self._thread = threading.Thread(target=self._exchange, name="jaxmoe-processes", daemon=True)
        self._thread.start()

    # --- called by other threads ---

    @property
    def is_controller(self) -> bool:
        """Return whether this is process 0, which schedules the steps of all processes."""
        return self.process_id == 0

    def wait_for_start(self) -> None:
        """Wait until all processes have joined. Raises: MeshError with the reason why they could not."""
        self._started.wait()
        if self._refused is not None:
            self._outbox.close(linger=0)
            self._thread.join(timeout=2)
            raise MeshError(self._refused)

    def agree(self, **values: Any) -> None:
        """Wait until all processes have called this as often, and compare their values.

        If a value differs, all processes end with one line that names both values.
        """
        self._exchanged(values, compare=True)

    def share(self, **values: Any) -> dict[str, Any]:
        """Return the values of process 0. Waits until all processes have called this as often."""
        result: dict[str, Any] = self._exchanged(values)
        return result

    def collect(self, **values: Any) -> list[dict[str, Any]]:
        """Return the values of all processes in process 0, an empty list in others. Waits as `share` does."""
        result: list[dict[str, Any]] = self._exchanged(values, collect=True)
        return result

    def barrier(self) -> None:
        """Wait until all processes have called this as often."""
        self._exchanged({})

    def _exchanged(self, values: dict[str, Any], *, compare: bool = False, collect: bool = False) -> Any:
        name = f"agreement-{self._agreements}"
        self._agreements += 1
        reply = self._agreed[name] = queue.SimpleQueue[Any]()
        self._send(message("agree", name=name, values=values, compare=compare, collect=collect))
        return reply.get()

    def in_step(self, steps: int) -> None:
        """Report that this process begins a step after `steps` others."""
        self._status = steps, time.monotonic()

    def idle(self, steps: int) -> None:
        """Report that this process has dispatched `steps` steps, and waits or compiles."""
        self._status = steps, None

    def settle(self) -> None:
        """After an error that a lost process can have caused, wait until it is known whether one was lost.

        Raises: ProcessLostError if one was. This process ends shortly after.
        """
        self._settled.clear()
        self._send(message("suspect"))
        self._settled.wait()
        if self.lost is not None:
            raise ProcessLostError(self.lost)

    def claims_end(self) -> bool:
        """Return whether the caller is the first to end this process, and so prints the line with the reason."""
        return self._ending.acquire(blocking=False)

    def fail(self, line: str, code: int) -> None:
        """End this process, and all others with its line."""
        self.claims_end()
        self._send(message("failed", line=line, code=code))
        self._leave(code)

    def wait_for_end(self) -> None:
        """Wait for the thread to end this process, once another was lost."""
        self._thread.join()

    def leave(self) -> None:
        """Separate from the other processes. Waits until all of them do."""
        for function in self.at_exit:
            function()
        self.barrier()
        if self.with_jax:
            jax.distributed.shutdown()
        self._send(message("bye"))
        self._outbox.close()
        self._thread.join(timeout=5)

    def _send(self, text: bytes) -> None:
        with self._outbox_lock:
            self._outbox.send(text)

    @staticmethod
    def _leave(code: int) -> None:
        time.sleep(0.2)  # for the thread to send what is queued
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

    # --- the thread ---

    def _exchange(self) -> None:
        dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.IPV6, 1)
        dealer.setsockopt(zmq.LINGER, 500)
        dealer.setsockopt(zmq.IDENTITY, self._identity)
        dealer.connect(self._address)
        hello = message(
            "hello", process_id=self.process_id, host=socket.gethostname(), pid=os.getpid(), facts=self._facts
        )
        self._dealer = dealer
        poller = zmq.Poller()
        poller.register(dealer, zmq.POLLIN)
        poller.register(self._inbox, zmq.POLLIN)
        heard, beat_at = time.monotonic(), 0.0
        while self._running:
            ready = dict(poller.poll(int(BEAT_SECONDS * 1000)))
            while self._inbox in ready and self._inbox.poll(0):
                text = self._inbox.recv()
                dealer.send(text)
                self._running = self._running and json.loads(text)["op"] not in ("bye", "failed")
            now = time.monotonic()
            if dealer in ready:
                heard = now
                while dealer.poll(0):
                    self._receive(json.loads(dealer.recv()))
            if now - beat_at >= BEAT_SECONDS and self._running:
                beat_at = now
                dealer.send(self._beat() if self._started.is_set() else hello)
            self._look_for_coordinator(now - heard)
        dealer.close(linger=200)
        self._inbox.close(linger=0)
        self._context.term()

    def _beat(self) -> bytes:
        steps, since = self._status
        return message("beat", steps=steps, busy_s=0.0 if since is None else time.monotonic() - since)

    def _look_for_coordinator(self, silent: float) -> None:
        address = self._address.removeprefix("tcp://")
        if not self._started.is_set():
            if silent > self._join_timeout + 2 * BEAT_SECONDS:
                self._refuse(f"no coordinator answers at {address} for {silent:.0f} s: start process 0 there")
        elif silent > silence_limit(self.lost_after):
            self._lose(f"the coordinator of process 0 at {address} was lost: no sign of life for {silent:.0f} s")

    def _receive(self, values: dict[str, Any]) -> None:
        match values["op"]:
            case "start":
                self.jax_port, self.names = values["jax_port"], values["names"]
                self._started.set()
            case "ping":
                self._dealer.send(self._beat())
            case "agreed":
                self._agreed.pop(values["name"]).put(values["values"])
            case "settled":
                self._settled.set()
            case "refused" if not self._started.is_set():
                self._refuse(values["line"])
            case "refused" | "failed":
                self._end(values["line"], values.get("code", 2))
            case "lost":
                self._lose(values["line"])

    def _refuse(self, line: str) -> None:
        self._refused, self._running = line, False
        self._dealer.send(message("bye"))
        self._started.set()

    def _lose(self, line: str) -> None:
        self.lost = line
        for function in self.on_lost:
            with contextlib.suppress(Exception):
                function(line)
        self._settled.set()
        time.sleep(_GRACE_SECONDS)
        self._end(line, LOST_CODE)

    def _end(self, line: str, code: int) -> None:
        if not self.claims_end():
            return
        print(f"jaxmoe: error: {' '.join(line.split())}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            self._dealer.send(message("bye"))
            self._dealer.close(linger=200)
            time.sleep(0.1)
        os._exit(code)


def joined() -> ProcessGroup | None:
    """Return the group of joined processes, or None in a process by itself."""
    return _group


def join(
    coordinator: str = "auto",
    *,
    num_processes: int | None = None,
    process_id: int | None = None,
    devices: int | None = None,
    lost_after: float = LOST_AFTER_SECONDS,
    join_timeout: float = JOIN_TIMEOUT_SECONDS,
    arguments: Mapping[str, str] | None = None,
    with_jax: bool = True,
) -> ProcessGroup:
    """Join this process and others, so that their devices form one mesh. Call it in every process, before JAX starts.

    Args:
        coordinator: HOST:PORT of process 0, on which it listens. "auto" takes it, num_processes and process_id from the
            cluster manager: Slurm, Open MPI, Kubernetes, GKE.
        num_processes: Number of processes.
        process_id: Index of this process, in [0, num_processes).
        devices: Number of CPU devices to emulate in this process.
        lost_after: Seconds without a sign of life after which a process is lost, and all others end with exit code 3.
        join_timeout: Seconds to wait for all processes.
        arguments: Arguments of this process by name. They have to be equal in all processes.
        with_jax: Start jax.distributed. False for work without devices.

    Returns:
        The group of the joined processes.

    Raises:
        MeshError: If a value is out of range, a process is missing, two have one process_id, or they differ in their
            versions or arguments.
    """
    global _group
    if _group is not None:
        raise MeshError("this process has joined already: call join once")
    _check_values(devices, lost_after=lost_after, join_timeout=join_timeout)
    host, port, num_processes, process_id = coordinator_address(coordinator, num_processes, process_id, join_timeout)
    if with_jax and backends_are_initialized():
        raise MeshError(f"processes cannot join at {coordinator}: JAX has started its devices; join before it does")
    identity = uuid.uuid4().bytes
    if process_id == 0:
        values = {"num_processes": num_processes, "lost_after": lost_after, "join_timeout": join_timeout}
        _start_coordinator(values | {"port": port, "owner": identity.hex(), "with_jax": with_jax})
        host = "localhost" if is_this_host(host) else host
    facts = {"num_processes": num_processes, **versions(), **(arguments or {})}
    group = ProcessGroup(
        host, port, process_id=process_id, num_processes=num_processes, facts=facts,
        lost_after=lost_after, join_timeout=join_timeout, identity=identity, with_jax=with_jax,
    )  # fmt: skip
    group.wait_for_start()
    try:
        if with_jax:
            _start_jax(group, devices)
            jax.devices()
    except (RuntimeError, ValueError) as error:
        raise MeshError(f"processes cannot join at {coordinator}: {error}") from error
    group.barrier()  # before a process can end, all have read the topology of its devices
    _group = group
    _end_together()
    return group


def _check_values(devices: int | None, **seconds: float) -> None:
    if devices is not None and not 1 <= devices <= _MAX_DEVICES:
        raise MeshError(f"devices={devices} must lie in [1, {_MAX_DEVICES}]")
    for name, value in seconds.items():
        if not 1 <= value <= 24 * 3600:
            raise MeshError(f"{name}={value:g} must lie in [1, 86400] seconds")


def _end_together() -> None:
    atexit.register(_at_exit)
    shown = sys.excepthook
    sys.excepthook = lambda kind, error, trace: (
        None if isinstance(error, ProcessLostError) else shown(kind, error, trace)  # reported in one line already
    )


def versions() -> dict[str, str]:
    """Return the versions that have to be equal in all processes."""
    return {
        "jaxmoe": sys.modules["jaxmoe"].__version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
    }  # fmt: skip


def _start_coordinator(values: dict[str, Any]) -> None:
    """Start the coordinator as a child of this process; it ends with it.

    If another one has the port, this process asks that one too: it ends soon, or knows another process 0.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "jaxmoe.parallel.coordinator", str(values["port"])], stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    assert child.stdin is not None
    print(json.dumps(values), file=child.stdin, flush=True)
    _children.append(child)  # its standard input stays open until this process ends


_children: list[subprocess.Popen[str]] = []


def _start_jax(group: ProcessGroup, devices: int | None) -> None:
    """Start jax.distributed with the service of the coordinator."""
    from jax._src import distributed

    if devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    if jax.config.jax_cpu_collectives_implementation in (None, "none"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    real, distributed._jax = distributed._jax, _WithoutService(distributed._jax)
    try:
        jax.distributed.initialize(
            f"{group.host}:{group.jax_port}", group.num_processes, group.process_id,
            cluster_detection_method="deactivate",
            initialization_timeout=int(JOIN_TIMEOUT_SECONDS), heartbeat_timeout_seconds=24 * 3600,
        )  # fmt: skip
    finally:
        distributed._jax = real


class _WithoutService:
    """Replace jaxlib's module while jax.distributed starts: the service runs in the coordinator."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    @staticmethod
    def get_distributed_runtime_service(*_: Any, **__: Any) -> None:
        """Start no service."""


def _at_exit() -> None:
    group = _group
    if group is None:
        return
    if group.lost is not None:
        group.wait_for_end()
    error = getattr(sys, "last_value", None)
    if error is not None:
        group.fail(f"{type(error).__name__}: {error}", 1)
    group.leave()
