"""Measure the idle share of pipeline stages: `python -m scripts.bench_pipeline [--json]`, on 8 emulated devices.

A stack of matrices runs through jaxmoe.model.pipeline for P stages, M micro-batches and v virtual stages. The devices
count ticks: a stage adds one for each valid unit of work. Each line has the measured idle share, the formula
(P - 1) / (v M + P - 1), and the median time of a whole pass. With --decode-steps N, tokens are decoded one after
another. Then idle is a share of the ticks that N more decode steps take once the pipeline is full, and the formula is
1 - min(1, M / P).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

WIDTH, ROWS = 256, 8


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Hold the result of one pipeline.

    idle and formula are shares of all stages' ticks; seconds is the time of one pass.
    """

    stages: int
    micro_batches: int
    virtual_stages: int
    ticks: int
    busy: int
    idle: float
    formula: float
    seconds: float


def count_ticks(
    stages: int, micro_batches: int, virtual_stages: int, *, decode_steps: int = 1, repeats: int = 0
) -> Measured:
    """Run a stack of matrices through the stages, and count the ticks and the units that the stages computed."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxmoe.model.pipeline import empty_buffers, run_ticks, tick_stages
    from jaxmoe.model.rows import HIDDEN
    from jaxmoe.parallel.mesh import build_mesh
    from jaxmoe.parallel.sharding import MeshPlacement
    from jaxmoe.parallel.stages import LayerSegment, PipelineSchedule

    placement = MeshPlacement(
        mesh=build_mesh({"pipeline": stages}, jax.devices()[:stages]), virtual_stages=virtual_stages
    )
    segment = LayerSegment(
        first=0, period=1, repeats=stages * virtual_stages, stages=stages, virtual_stages=virtual_stages
    )
    schedule = PipelineSchedule(stages=stages, virtual_stages=virtual_stages, micro_batches=micro_batches)
    ticks = schedule.ticks(decode_steps)

    def through(weights, slot, layer_slots, filled, x, counts, step_inputs):
        x = jnp.where(slot.valid, jnp.tanh(x @ weights[layer_slots[0]]), x)
        return x, counts.at[layer_slots[0]].add(jnp.where(slot.valid, 1, 0))

    @jax.jit
    def run(weights, x):
        counts = placement.constrain(jnp.zeros(segment.slots, jnp.int32), "layer")

        def tick(number, carry):
            return tick_stages(
                through,
                weights,
                carry[0],
                x,
                carry[1],
                (),
                number,
                decode_steps,
                segment=segment,
                schedule=schedule,
                placement=placement,
            )

        buffers = empty_buffers(schedule, x.shape, x.dtype, placement, HIDDEN)
        return run_ticks(tick, ticks, (buffers, counts), alone=True)[1]

    weights = jax.device_put(
        np.eye(WIDTH, dtype=np.float32)[None].repeat(segment.slots, 0), placement.sharding("layer")
    )
    x = jnp.ones((ROWS, 1, WIDTH))
    counts = np.asarray(run(weights, x))
    assert (counts == micro_batches * decode_steps).all(), counts
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(weights, x))
        seconds.append(time.perf_counter() - start)
    busy = int(counts.sum())
    return Measured(
        stages=stages, micro_batches=micro_batches, virtual_stages=virtual_stages, ticks=ticks, busy=busy,
        idle=1 - busy / (stages * ticks),
        formula=(stages - 1) / (virtual_stages * micro_batches * decode_steps + stages - 1),
        seconds=statistics.median(seconds) if seconds else 0.0,
    )  # fmt: skip


def count_steady_ticks(stages: int, micro_batches: int, virtual_stages: int, *, decode_steps: int) -> Measured:
    """Count the ticks and units of `decode_steps` more decode steps, after as many have filled the pipeline."""
    first, both = (
        count_ticks(stages, micro_batches, virtual_stages, decode_steps=times * decode_steps) for times in (1, 2)
    )
    ticks, busy = both.ticks - first.ticks, both.busy - first.busy
    return Measured(
        stages=stages, micro_batches=micro_batches, virtual_stages=virtual_stages, ticks=ticks, busy=busy,
        idle=1 - busy / (stages * ticks), formula=1 - min(1.0, micro_batches / stages), seconds=0.0,
    )  # fmt: skip


def main() -> None:
    """Print a line for every pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=list(range(1, 17)))
    parser.add_argument("--virtual-stages", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--decode-steps", type=int, help="decode this many tokens one after another")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    from jaxmoe.parallel.mesh import emulate_devices

    emulate_devices(max(arguments.stages))
    if not arguments.json:
        print(f"{'P':>3} {'M':>3} {'v':>3} {'ticks':>6} {'idle':>7} {'formula':>8} {'ms':>8}")
    for stages in arguments.stages:
        for virtual_stages in arguments.virtual_stages:
            for micro_batches in arguments.micro_batches:
                of = stages, micro_batches, virtual_stages
                decode_steps = arguments.decode_steps
                one = (
                    count_steady_ticks(*of, decode_steps=decode_steps) if decode_steps else count_ticks(*of, repeats=5)
                )
                _say(one, arguments.json)


def _say(one: Measured, as_json: bool) -> None:
    values: dict[str, Any] = asdict(one)
    if as_json:
        print(json.dumps(values), flush=True)
        return
    facts = f"{one.stages:>3} {one.micro_batches:>3} {one.virtual_stages:>3} {one.ticks:>6}"
    print(f"{facts} {one.idle:>7.4f} {one.formula:>8.4f} {one.seconds * 1e3:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
