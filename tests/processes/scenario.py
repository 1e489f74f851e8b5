"""What a process of a group runs: the models of a list, one after the other. Process 0 prints a JSON line for each.

python -m tests.processes.scenario PORT NUM_PROCESSES PROCESS_ID DEVICES LIST.json
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmoe import LLM, AsyncEngine, SamplingParams
from jaxmoe.aot.hlo_collectives import collectives
from jaxmoe.errors import ConfigError
from jaxmoe.parallel.eplb import balance
from jaxmoe.weights import safetensors_file

PROMPTS = [[1, 5, 9, 2, 6, 5, 3, 8, 4, 7, 1, 3], [3, 1, 4, 1], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5, 9, 0, 4, 5, 2, 3]]
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True, top_logprobs=2)
SAMPLED = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.8, seed=3, presence_penalty=0.5)


def start_like_the_tests(devices: int) -> None:
    """Configure JAX as tests/conftest.py does, for this number of devices."""
    if "JAXMOE_TESTS_OPTIMIZED" not in os.environ:
        os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path(__file__).parents[2] / ".cache" / "tests")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def is_as_planned(llm: LLM) -> bool:
    """Whether the collectives of every program that ran are those planned, in this process."""
    core, runner = llm._core, llm._runner
    if core is None:  # this process follows
        return True
    checks = []
    for bucket in sorted(core.buckets, key=str):
        steps = 1 if bucket.blocks else core.scheduler_config.decode_steps
        with runner._precisely():
            program = runner.lower(core._worker.state, bucket, max_decode_steps=steps).compile()
        found = collectives(program.as_text(), llm.mesh)
        checks.append(found == runner.traffic.planned_program(bucket, max_decode_steps=steps))
        if not checks[-1]:
            print(found, runner.traffic.planned_program(bucket, max_decode_steps=steps), sep="\n", file=sys.stderr)
    return all(checks)


def refuse_a_wrong_placement(llm: LLM) -> None:
    """A placement of another model is refused in every process, and ends none."""
    wrong = balance(np.ones((1, 2)), num_replicas=2, num_ranks=1)
    try:
        llm.place_experts(wrong)
    except ConfigError:
        return
    raise AssertionError("a wrong placement was taken")


def served(llm: LLM, options: dict[str, Any], *, moves: bool) -> list[list[int]]:
    """Tokens of requests that come one after the other to an engine, which may move experts meanwhile."""

    async def requests(engine: AsyncEngine) -> list[list[int]]:
        async def one(index: int) -> list[int]:
            await asyncio.sleep(0.01 * index)
            prompt = PROMPTS[index % len(PROMPTS)]
            if moves and index in (2, 5):
                await asyncio.to_thread(move_experts, llm, index)
            return [event.token_id async for event in engine.stream(prompt, GREEDY if index % 2 else SAMPLED)]

        return list(await asyncio.gather(*(one(index) for index in range(8))))

    with AsyncEngine(llm, on_compile=lambda done, total: None, **options) as engine:
        return [] if llm.follows else asyncio.run(requests(engine))


def move_experts(llm: LLM, seed: int) -> None:
    own = llm._runner.experts
    loads = np.random.default_rng(seed).random((own.num_layers, own.num_experts))
    llm.place_experts(balance(loads, num_replicas=own.num_physical_experts, num_ranks=own.num_ranks))


def counted_load(run: dict[str, Any]) -> tuple[LLM, int, int]:
    """A loaded model, the bytes of tensors that were read for it, and those of this process's own parts of weights."""
    read, real = 0, safetensors_file.read_into

    def count(descriptor, path, start, out, what):
        nonlocal read
        read += len(out)
        real(descriptor, path, start, out, what)

    safetensors_file.read_into = count
    try:
        llm = LLM.load(run["model"], dtype="float32", **run["options"])
    finally:
        safetensors_file.read_into = real
    own = sum(
        {str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}[index]
        for leaf in llm._runner.leaves
        for index in {str(shard.index) for shard in leaf.addressable_shards}
    )
    return llm, read, own


def results_of(run: dict[str, Any]) -> dict[str, Any]:
    """Load a model, and run what is asked for."""
    engine_options = run.get("engine")
    llm, read, own = counted_load(run)
    if run.get("only_load"):
        return {"read": read, "own": own}
    if run.get("moves"):
        refuse_a_wrong_placement(llm)
    outputs = llm.generate(PROMPTS, GREEDY)
    if run.get("short"):
        logits = llm.last_logits(PROMPTS)
        tokens = [output.token_ids for output in outputs]
        return {"tokens": tokens, "logits": logits.tolist(), "scores": [], "as_planned": is_as_planned(llm)}
    sampled = [event.token_id for event in llm.stream(PROMPTS[:2], SAMPLED)]
    logits = llm.last_logits([prompt + output.token_ids for prompt, output in zip(PROMPTS, outputs, strict=True)])
    result = {
        "tokens": [output.token_ids for output in outputs],
        "tops": [[list(top) for top in output.outputs[0].top_logprobs] for output in outputs],
        "sampled": sampled,
        "logits": logits.tolist(),
        "scores": [scores.tolist() for scores in llm.score(PROMPTS)],
        "as_planned": is_as_planned(llm),
    }
    if llm.config.moe is not None:
        result["loads"] = llm.expert_loads(PROMPTS, GREEDY).by_expert.tolist()
    if engine_options is not None:
        result["served"] = served(llm, engine_options, moves=bool(run.get("moves")))
    return result


def main() -> None:
    port, num_processes, process_id, devices, path = sys.argv[1:]
    start_like_the_tests(int(devices))
    if int(num_processes) > 1:
        from jaxmoe.parallel.processes import join

        join(
            f"localhost:{port}", num_processes=int(num_processes), process_id=int(process_id), devices=int(devices),
            lost_after=60,
        )  # fmt: skip
    for run in json.loads(Path(path).read_text("utf-8")):
        result = results_of(run)
        if process_id == "0" or run.get("everywhere"):
            print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
