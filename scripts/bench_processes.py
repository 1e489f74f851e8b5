"""Benchmark several processes: `python -m scripts.bench_processes CASE`, one JSON object per line. CASE is one of

send    milliseconds that process 0 takes to send a step to followers on this machine
rate    64 staggered requests in one process of 8 emulated devices against 2 of 4, and that all get the same tokens
memory  resident memory of each process after loading a model
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np

NUM_REQUESTS, NEW_TOKENS = 64, 32


def _say(**values: Any) -> None:
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}), flush=True)


def _send(arguments: argparse.Namespace) -> None:
    """Send the steps of an engine of 32 requests to real followers, each a process that receives them."""
    from jaxmoe.engine.control import ControlSender

    address: dict[str, Any] = {}
    followers: list[subprocess.Popen[bytes]] = []

    def share(**values: Any) -> dict[str, Any]:
        address.update(values)
        for index in range(1, arguments.followers + 1):
            command = [sys.executable, "-m", "scripts.bench_processes", "follow", "--address", json.dumps(values)]
            followers.append(subprocess.Popen([*command, "--index", str(index)]))
        return values

    group: Any = SimpleNamespace(num_processes=arguments.followers + 1, host="localhost", share=share)
    sender = ControlSender(group)
    packed = np.zeros((8, 1024), np.int32)
    values = {"features": [True, True, False], "bucket": {"seq_slots": 32, "blocks": 0}, "decode_steps": 8}
    seconds = []
    for _ in range(2000):
        start = time.perf_counter()
        sender.send("step", values, [packed])
        seconds.append(time.perf_counter() - start)
        time.sleep(0.002)
    sender.send("end", {})
    for one in followers:
        one.wait()
    ordered = sorted(seconds)
    _say(
        what="send", followers=arguments.followers, array_bytes=packed.nbytes,
        median_ms=1000 * statistics.median(seconds), p99_ms=1000 * ordered[int(0.99 * len(ordered))],
    )  # fmt: skip


def _follow(arguments: argparse.Namespace) -> None:
    from jaxmoe.engine.control import ControlReceiver

    address = json.loads(arguments.address)
    group: Any = SimpleNamespace(share=lambda: address, host="localhost", process_id=arguments.index)
    receiver = ControlReceiver(group)
    while receiver.receive().op != "end":
        pass


def _requests(model: str, mesh: str) -> dict[str, Any]:
    """Serve requests at random times, and compare the tokens of each with the tokens of the request alone."""
    from jaxmoe import LLM, AsyncEngine, SamplingParams

    rng = random.Random(0)
    llm = LLM(model, mesh=mesh, dtype="float32")
    prompts = [[rng.randrange(llm.config.vocab_size) for _ in range(rng.randrange(4, 64))] for _ in range(NUM_REQUESTS)]
    waits = [rng.uniform(0, 2.0) for _ in prompts]
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)

    async def serve(engine: AsyncEngine) -> tuple[list[list[int]], float]:
        async def one(prompt: list[int], wait: float) -> list[int]:
            await asyncio.sleep(wait)
            return [event.token_id async for event in engine.stream(prompt, params)]

        start = time.perf_counter()
        tokens = await asyncio.gather(*(one(*pair) for pair in zip(prompts, waits, strict=True)))
        return list(tokens), time.perf_counter() - start

    served: list[list[int]] = []
    seconds = []
    with AsyncEngine(llm, max_num_seqs=32, context=256, kv_cache_gib=0.05) as engine:
        if not llm.follows:
            for _ in range(3):
                served, one = asyncio.run(serve(engine))
                seconds.append(one)
    alone = [llm.generate([prompt], params)[0].token_ids for prompt in prompts]
    return {
        "same_as_alone": served == alone, "num_tokens": sum(map(len, alone)),
        "tokens_per_s": NUM_REQUESTS * NEW_TOKENS / statistics.median(seconds) if seconds else 0.0, "tokens": served,
    }  # fmt: skip


def _member(arguments: argparse.Namespace) -> None:
    """Run as one process of `rate`."""
    from jaxmoe.cli.options import start_jax
    from jaxmoe.parallel.processes import join

    if arguments.processes > 1:
        start_jax(None)
        join(
            arguments.coordinator, num_processes=arguments.processes, process_id=arguments.index,
            devices=8 // arguments.processes,
        )  # fmt: skip
    else:
        start_jax(8)
    result = _requests(arguments.model, arguments.mesh)
    if arguments.index == 0:
        print("RESULT " + json.dumps(result), flush=True)


def _rate(arguments: argparse.Namespace) -> None:
    from jaxmoe.parallel.address import free_port

    tokens: list[Any] = []
    rates = []
    for processes in (1, arguments.processes):
        shared = [
            sys.executable, "-m", "scripts.bench_processes", "member", "--model", arguments.model, "--mesh",
            arguments.mesh, "--processes", str(processes), "--coordinator", f"localhost:{free_port()}",
        ]  # fmt: skip
        children = [
            subprocess.Popen([*shared, "--index", str(index)], stdout=subprocess.PIPE, text=True)
            for index in range(processes)
        ]
        outs = [child.communicate()[0] for child in children]
        result = next(json.loads(line[7:]) for line in outs[0].splitlines() if line.startswith("RESULT "))
        tokens.append(result.pop("tokens"))
        rates.append(result["tokens_per_s"])
        _say(what="rate", processes=processes, devices=8 // processes, mesh=arguments.mesh, **result)
    _say(what="rate", same_tokens=tokens[0] == tokens[1], ratio=rates[1] / rates[0])


def _memory(arguments: argparse.Namespace) -> None:
    """Print the peak of resident memory of this process, and the bytes of weights that it holds."""
    from jaxmoe import LLM
    from jaxmoe.cli.options import start_jax
    from jaxmoe.parallel.processes import join

    start_jax(None)
    join(
        arguments.coordinator, num_processes=arguments.processes, process_id=arguments.index,
        devices=8 // arguments.processes,
    )  # fmt: skip
    llm = LLM(arguments.model, mesh=arguments.mesh, dtype="bfloat16")
    own = sum(shard.data.nbytes for leaf in llm._runner.leaves for shard in leaf.addressable_shards)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps({"what": "memory", "process": arguments.index, "weight_gib": own / 2**30, "peak_gib": peak / 2**30})
    )


def main() -> None:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("send", "rate", "memory", "follow", "member"))
    parser.add_argument("--followers", type=int, default=8)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--mesh", default="data=2,tensor=2,expert=2")
    parser.add_argument("--coordinator", default="localhost:29500")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    {"send": _send, "rate": _rate, "memory": _memory, "follow": _follow, "member": _member}[arguments.what](arguments)


if __name__ == "__main__":
    main()
