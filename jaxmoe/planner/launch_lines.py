"""Write the command of every host that starts a model as it was planned: `jaxmoe generate` in one process a host."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from jaxmoe.config import EngineConfig
from jaxmoe.parallel.mesh import AXES
from jaxmoe.planner.hardware import HardwareSpec
from jaxmoe.weights.source import checkpoint_of

NO_CHECKPOINT, ADDRESS = "CHECKPOINT", "HOST0:PORT"
_FLAGS = ("layout", "virtual_stages", "dtype", "weights_dtype", "kv_dtype", "max_num_seqs", "revision")


def launch_lines(model: str, options: str, *, devices: int, hardware: HardwareSpec | None) -> list[str]:
    """Return one command for each host, in the order of the process ids.

    model: as the plan names it; one without weights is written as CHECKPOINT. options: of `jaxmoe generate`, such as
    its mesh. hardware: None means one host. With several hosts the address of the first is written as HOST0:PORT.
    """
    hosts = 1 if hardware is None else -(-devices // hardware.devices_per_node)
    name = checkpoint_of(model)
    command = f"jaxmoe generate {NO_CHECKPOINT if name is None else shlex.quote(name)} --prompt Hello {options}"
    if hardware is not None and hardware.platform == "cpu":
        command += f" --devices {devices if hosts == 1 else hardware.devices_per_node}"
    if hosts == 1:
        return [command]
    joined = f"{command} --coordinator {ADDRESS} --num-processes {hosts}"
    return [f"{joined} --process-id {index}" for index in range(hosts)]


def placeholders(lines: list[str], model: str) -> list[str]:
    """Return the meaning of each placeholder in launch lines."""
    checkpoint = f"{NO_CHECKPOINT} is a directory or hub id with the weights of {model}"
    address = f"{ADDRESS} is the address of the first host and a free port there"
    return [text for name, text in ((NO_CHECKPOINT, checkpoint), (ADDRESS, address)) if name in lines[0].split()]


def generate_options(engine: EngineConfig, axes: Mapping[str, int], kernels: Mapping[str, Any]) -> str:
    """Return the options of `jaxmoe generate` for the options of an engine that differ from their defaults.

    axes: sizes of the mesh. kernels: the backends that were chosen, by op.
    """
    mesh = ",".join(f"{axis}={axes[axis]}" for axis in AXES if axes[axis] > 1) or "data=1"
    options, defaults = engine.options(), EngineConfig().options()
    words = ["--mesh", mesh]
    for name in _FLAGS:
        value = options[name]
        if value != defaults[name] or name == "max_num_seqs":
            words += [f"--{name.replace('_', '-')}", str(value)]
    for op, backend in kernels.items():
        words += [f"--{op}", str(backend)]
    for key in engine.ignore_config_keys:
        words += ["--ignore-config-key", key]
    return shlex.join(words)
