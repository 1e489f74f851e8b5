"""Run as a process of its own: loads a checkpoint and prints what that cost in memory, as one JSON object.

python -m tests.weights.memory_probe DIRECTORY NUM_DEVICES MESH
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def _status_bytes(field: str) -> int:
    """VmRSS (resident now) or VmHWM (resident at most) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def main(directory: str, num_devices: str, mesh: str) -> None:
    """Load DIRECTORY in bfloat16 and print bytes resident before, at most, and on the devices."""
    from jaxmoe import LLM
    from jaxmoe.parallel.mesh import emulate_devices

    emulate_devices(int(num_devices))
    before = _status_bytes("VmRSS")
    llm = LLM.load(directory, mesh=mesh, dtype="bfloat16")
    most = _status_bytes("VmHWM")
    # Emulated devices may share a buffer; it is counted once.
    shards = [shard.data for leaf in llm._runner.leaves for shard in leaf.addressable_shards]
    buffers = {data.unsafe_buffer_pointer(): data.nbytes for data in shards}
    print(json.dumps({"before": before, "most": most, "on_devices": sum(buffers.values())}))


if __name__ == "__main__":
    main(*sys.argv[1:])
