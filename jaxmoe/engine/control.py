"""The control channel of joined processes: process 0 sends operations to the processes that follow it.

A message is a header, one JSON object with the operation and its values, and arrays. Process 0 sends it before it runs
the operation itself, so that all processes run the same operations in the same order.
"""

from __future__ import annotations

import json
import secrets
import struct
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import zmq

from jaxmoe.parallel.processes import ProcessGroup

_POLL_MS = 1000


class ControlMessage(NamedTuple):
    """Hold one operation: its name, its values and its arrays."""

    op: str
    values: dict[str, Any]
    arrays: list[np.ndarray]


class ControlSender:
    """Send operations to all other processes. One per group, in process 0."""

    def __init__(self, group: ProcessGroup) -> None:
        self._lock = threading.Lock()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 2000)
        port, token = self._socket.bind_to_random_port("tcp://*"), secrets.token_hex(16)
        group.share(port=port, token=token)
        self._followers: list[bytes] = []
        while len(self._followers) < group.num_processes - 1:
            identity, said = self._socket.recv_multipart()
            if secrets.compare_digest(said, token.encode()):
                self._followers.append(identity)
        self.sent = 0

    def send(self, op: str, values: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        """Send an operation. Values may be dataclasses. Arrays are copied, and may change afterwards."""
        shapes = [(array.dtype.str, array.shape) for array in arrays]
        contents = [array.tobytes() for array in arrays]
        with self._lock:  # also for the number: several threads send
            frames = [json.dumps([self.sent, op, values, shapes], default=asdict).encode(), *contents]
            for identity in self._followers:
                self._socket.send(identity, zmq.SNDMORE)
                self._socket.send_multipart(frames)
            self.sent += 1


class ControlReceiver:
    """Receive operations in a process that follows."""

    def __init__(self, group: ProcessGroup) -> None:
        address = group.share()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IDENTITY, struct.pack(">I", group.process_id))
        self._socket.connect(f"tcp://{group.host}:{address['port']}")
        self._socket.send(address["token"].encode())
        self.received = 0

    def receive(self) -> ControlMessage:
        """Wait for the next operation."""
        while not self._socket.poll(_POLL_MS):  # the interpreter handles signals between two polls
            pass
        header, *frames = self._socket.recv_multipart()
        number, op, values, shapes = json.loads(header)
        assert number == self.received, f"operation {self.received} of process 0 is missing"
        self.received += 1
        arrays = [
            np.frombuffer(frame, dtype).reshape(shape) for frame, (dtype, shape) in zip(frames, shapes, strict=True)
        ]
        return ControlMessage(op, values, arrays)
