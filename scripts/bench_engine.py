"""Benchmark serving: `python -m scripts.bench_engine WHAT MODEL`, one JSON object per line. WHAT is one of

staggered   64 requests at random times against the same ones at once; --alone also compares tokens with single requests
emulation   the same requests on 8 emulated devices against one device, by mesh axis
pool        a decode step with 1 and 8 times the pages
startup     from the start of the process to the first token, with an empty compilation cache and with a full one
soak        20,000 small requests: memory and pages at the end
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

AXES = ("data=8", "tensor=8", "expert=8", "data=2,tensor=2,expert=2")


def _say(**values: Any) -> None:
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
    print(json.dumps(rounded), flush=True)


def _jaxmoe(*arguments: str, env: dict[str, str] | None = None) -> str:
    command = [sys.executable, "-m", "jaxmoe", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout


def _start(arguments: argparse.Namespace):
    """Load the model, with emulated devices if requested."""
    from jaxmoe.cli.options import start_jax

    start_jax(arguments.devices)
    from jaxmoe import LLM

    return LLM.load(arguments.model, mesh=arguments.mesh, dtype=arguments.dtype)


def _random_requests(vocab: int, count: int, *, longest: int, max_new: int) -> list[tuple[list[int], Any]]:
    from jaxmoe import SamplingParams

    rng = random.Random(0)
    made = []
    for _ in range(count):
        prompt = [rng.randrange(vocab) for _ in range(rng.randint(min(16, longest), longest))]
        new = rng.randint(min(16, max_new), max_new)
        made.append((prompt, SamplingParams(max_tokens=new, ignore_eos=True)))
    return made


def _staggered(arguments: argparse.Namespace) -> None:
    """Compare requests that arrive by a Poisson process with the same requests as one static batch.

    The arrivals take half as long as the static batch, so that they do not dominate the measurement.
    """
    from jaxmoe import AsyncEngine

    llm = _start(arguments)
    requests = _random_requests(
        llm.config.vocab_size, arguments.requests, longest=arguments.prompt, max_new=arguments.new
    )
    total = sum(params.max_tokens for _, params in requests)

    async def ask(engine: AsyncEngine, after: float, prompt: list[int], params: Any) -> list[int]:
        await asyncio.sleep(after)
        return [chunk.token_id async for chunk in engine.stream(prompt, params)]

    async def run(engine: AsyncEngine, times: list[float]) -> tuple[float, list[list[int]]]:
        begin = time.perf_counter()
        asked = (ask(engine, after, *request) for after, request in zip(times, requests, strict=True))
        tokens = await asyncio.gather(*asked)
        return time.perf_counter() - begin, tokens

    context = min(llm.config.max_position_embeddings, arguments.prompt + arguments.new)
    with AsyncEngine(llm, max_num_seqs=arguments.rows, context=context) as engine:
        # Cached prompts would shorten later runs.
        fresh = lambda: engine._core.scheduler.reset_prefix_cache()  # noqa: E731
        static, expected = asyncio.run(run(engine, [0.0] * len(requests)))
        rng = random.Random(1)
        gaps = [rng.expovariate(1.0) for _ in requests]
        times = [sum(gaps[:i]) / sum(gaps) * static / 2 for i in range(len(requests))]
        fresh()
        seconds, found = asyncio.run(run(engine, times))
        fresh()
        again, _ = asyncio.run(run(engine, [0.0] * len(requests)))
    static = (static + again) / 2
    _say(
        what="staggered", mesh=str(dict(llm.mesh.shape)), dtype=llm._runner.dtype, requests=len(requests),
        new_tokens=total, static_tok_s=total / static, staggered_tok_s=total / seconds, ratio=static / seconds,
        equal_to_static=found == expected,
    )  # fmt: skip
    if arguments.alone:
        alone = [llm.generate([prompt], params)[0].token_ids for prompt, params in requests]
        equal = sum(a == b for a, b in zip(alone, found, strict=True))
        _say(what="staggered", equal_to_alone=equal, requests=len(requests))


def _emulation(arguments: argparse.Namespace) -> None:
    base = ["bench", arguments.model, "--cases", arguments.cases, "--json"]
    base += ["--dtype", arguments.dtype] if arguments.dtype else []
    one = [json.loads(line) for line in _jaxmoe(*base, "--mesh", "data=1").splitlines()]
    for mesh in AXES:
        for alone, line in zip(one, _jaxmoe(*base, "--devices", "8", "--mesh", mesh).splitlines(), strict=True):
            found = json.loads(line)
            tax = found["seconds"] / alone["seconds"]
            times = {"one_device_s": alone["seconds"], "eight_s": found["seconds"]}
            _say(what="emulation", mesh=mesh, case=found["case"], **times, tax=tax)


def _pool(arguments: argparse.Namespace) -> None:
    import statistics

    import numpy as np

    from jaxmoe.engine.batch import StepBucket
    from jaxmoe.engine.core import EngineCore
    from jaxmoe.engine.limits import SchedulerConfig

    llm = _start(arguments)
    pages = 16 * arguments.rows
    sizes = {1: [], 8: []}
    scheduler_config = SchedulerConfig(
        num_ranks=llm._runner.num_ranks, max_num_seqs=arguments.rows, chunk_tokens=128, block_tokens=32,
        num_pages=pages, page_size=16, context=256,
    )  # fmt: skip
    for _ in range(3):
        for times, found in sizes.items():
            core = EngineCore(llm._runner, scheduler_config.joined(SchedulerConfig(**{**vars(scheduler_config),
            "num_pages": pages * times})))  # fmt: skip
            bucket = StepBucket(seq_slots=arguments.rows, blocks=0, block_tokens=32, pages=16)
            metadata = np.zeros((scheduler_config.num_ranks, bucket.length), np.int32)
            parts = bucket.split(metadata)
            parts["positions"][:], parts["query_lens"][:] = 200, 1
            parts["block_table"][:] = np.arange(pages).reshape(arguments.rows, 16)
            for _ in range(12):
                begin = time.perf_counter()
                core._worker.state, output = llm._runner.step(
                    core._worker.state, metadata, (False,) * 3, bucket, decode_steps=1, max_decode_steps=1
                )
                np.asarray(output.sampled.tokens)
                found.append(time.perf_counter() - begin)
            del core
    medians = {times: statistics.median(found[2:]) for times, found in sizes.items()}
    _say(what="pool", rows=arguments.rows, ms=1e3 * medians[1], ms_with_8_times_the_pages=1e3 * medians[8],
        ratio=medians[8] / medians[1])  # fmt: skip


def _startup(arguments: argparse.Namespace) -> None:
    import os

    folder = tempfile.mkdtemp()
    program = (
        "import sys, time; begin = float(sys.argv[2]); import jaxmoe; from jaxmoe.cli.options import start_jax; "
        "start_jax(None); llm = jaxmoe.LLM.load(sys.argv[1]); loaded = time.time() - begin; "
        "next(iter(llm.stream([list(range(100, 228))], jaxmoe.SamplingParams(max_tokens=2)))); "
        "print(loaded, time.time() - begin)"
    )
    env = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    for name in ("cold", "warm", "warm"):
        command = [sys.executable, "-c", program, arguments.model, str(time.time())]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=env | {"XDG_CACHE_HOME": folder})
        loaded, first = map(float, done.stdout.split())
        _say(what="startup", cache=name, loaded_s=loaded, first_token_s=first)
    shutil.rmtree(folder)


def _soak(arguments: argparse.Namespace) -> None:
    from jaxmoe import AsyncEngine, SamplingParams

    llm = _start(arguments)
    rng, vocab = random.Random(0), llm.config.vocab_size
    begin = time.perf_counter()
    memory: list[int] = []

    async def one(engine: AsyncEngine, gate: asyncio.Semaphore) -> int:
        async with gate:
            prompt = [rng.randrange(vocab) for _ in range(rng.randint(1, 40))]
            params = SamplingParams(
                max_tokens=rng.randint(1, 24), temperature=rng.choice([0.0, 1.0]), seed=rng.randrange(99)
            )
            stream, heard = engine.stream(prompt, params), 0
            leaves = rng.random() < 0.05
            async for _ in stream:
                heard += 1
                if leaves and heard == 3:
                    break
            return heard

    async def run(engine: AsyncEngine) -> int:
        gate, done, heard = asyncio.Semaphore(64), 0, 0
        while done < arguments.requests:
            batch = min(1000, arguments.requests - done)
            heard += sum(await asyncio.gather(*(one(engine, gate) for _ in range(batch))))
            done += batch
            memory.append(_resident())
            print(f"{done} requests, {memory[-1] / 2**20:.0f} MiB", file=sys.stderr)
        return heard

    with AsyncEngine(llm, max_num_seqs=32, context=64, host_cache_gib=0.01) as engine:
        tokens = asyncio.run(run(engine))
        stats = engine.stats()
    half = memory[len(memory) // 2]
    _say(what="soak", requests=arguments.requests, tokens=tokens, seconds=time.perf_counter() - begin,
        mib_halfway=half / 2**20, mib_at_the_end=memory[-1] / 2**20, pages_in_use=stats["pages_in_use"],
        running=stats["running"], waiting=stats["waiting"], preemptions=stats["preemptions"],
    )  # fmt: skip


def _resident() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["staggered", "emulation", "pool", "startup", "soak"])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--mesh", default=None)
    parser.add_argument("--devices", type=int, default=None)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--cases", default="8x128x64,8x512x1")
    parser.add_argument("--requests", type=int, default=None)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--alone", action="store_true", help="staggered: also compare with each request run alone")
    asked = parser.parse_args()
    if asked.requests is None:
        asked.requests = 20_000 if asked.what == "soak" else 64
    globals()[f"_{asked.what}"](asked)
