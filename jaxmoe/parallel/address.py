"""The address at which processes meet: given, from the cluster manager, or a free port."""

from __future__ import annotations

import re
import socket

from jaxmoe.errors import MeshError

_ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^:\s]+):(?P<port>[0-9]{1,5})")


def coordinator_address(
    coordinator: str, num_processes: int | None, process_id: int | None, timeout: float
) -> tuple[str, int, int, int]:
    """Return host, port, num_processes and process_id. Raises: MeshError if a value is missing or out of range."""
    if coordinator == "auto":
        if num_processes is not None or process_id is not None:
            raise MeshError("num_processes and process_id need a coordinator HOST:PORT: auto detects all three")
        from jax._src.clusters import ClusterEnv

        try:
            detected = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(timeout))
        except (RuntimeError, ValueError, OSError) as error:
            raise MeshError(f"coordinator auto: the cluster manager does not name one: {error}") from error
        address, num_processes, process_id = detected[:3]
        coordinator = address or ""
        if not coordinator or num_processes is None or process_id is None:
            raise MeshError("coordinator auto finds no cluster manager: give HOST:PORT, num_processes and process_id")
    matched = _ADDRESS.fullmatch(coordinator)
    if matched is None or not 1 <= int(matched["port"]) <= 65535:
        raise MeshError(f"coordinator {coordinator!r} must be HOST:PORT or auto")
    if num_processes is None or process_id is None or not 0 <= process_id < num_processes:
        raise MeshError(f"process_id={process_id} must lie in [0, num_processes={num_processes})")
    return matched["host"], int(matched["port"]), num_processes, process_id


def free_port() -> int:
    """Return a port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


def is_this_host(host: str) -> bool:
    """Return whether a host name is one of this machine's own names."""
    return host in ("localhost", "127.0.0.1", "[::1]", socket.gethostname(), socket.getfqdn())
