"""Benchmark conversion against cp: its time, its memory, and how it resumes after kills.

python -m scripts.bench_convert DIRECTORY [--gb 6] [--ram-gib 1] [--repeats 3] [--kills 20] [--seed 0]

DIRECTORY needs room for three times the checkpoint; the script removes everything that it writes there. It prints a
table and, at the end, one JSON object.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

CONVERT = [sys.executable, "-m", "jaxmoe", "convert"]
D, F, V, C = 2048, 4096, 32000, 128  # width, expert width, vocabulary, head dim


def shapes(num_layers: int) -> dict[str, tuple[int, ...]]:
    """Return the tensor shapes of a Mixtral with 8 experts per layer, by name."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{name}_proj.weight": (D, D) for name in "qo"}
        found |= {f"{prefix}self_attn.{name}_proj.weight": (4 * C, D) for name in "kv"}
        found |= {f"{prefix}{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
        found[f"{prefix}block_sparse_moe.gate.weight"] = (8, D)
        for expert in range(8):
            for name, shape in (("w1", (F, D)), ("w2", (D, F)), ("w3", (F, D))):
                found[f"{prefix}block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    return found | {"model.norm.weight": (D,), "lm_head.weight": (V, D)}


def write_checkpoint(directory: Path, num_bytes: int, seed: int) -> int:
    """Write a Mixtral checkpoint of random bits of at least num_bytes, and return its size in bytes.

    It has one file for every 2 GB.
    """

    def size(layers: int) -> int:
        return sum(2 * math.prod(shape) for shape in shapes(layers).values())

    layers = next(count for count in range(1, 10_000) if size(count) >= num_bytes)
    directory.mkdir(parents=True)
    config = {
        "model_type": "mixtral", "vocab_size": V, "hidden_size": D, "intermediate_size": F, "torch_dtype": "bfloat16",
        "num_hidden_layers": layers, "num_attention_heads": D // C, "num_key_value_heads": 4, "num_local_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 4096,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    rng, weight_map, left = np.random.default_rng(seed), {}, list(shapes(layers).items())
    count = -(-size(layers) // 2_000_000_000)
    for number in range(count):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = left[number * len(left) // count : (number + 1) * len(left) // count]
        header, end = {}, 0
        for key, shape in part:
            start, end = end, end + 2 * math.prod(shape)
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            weight_map[key] = name
        text = json.dumps(header).encode()
        with (directory / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, shape in part:
                file.write(rng.bytes(2 * math.prod(shape)))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    os.sync()
    return size(layers)


def children_cpu_s() -> float:
    """Return the CPU seconds of all child processes that have ended so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(command: list[str]) -> float:
    """Run a command and return its seconds."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def converted(source: Path, destination: Path, ram_gib: float, *more: str) -> tuple[float, dict[str, Any]]:
    """Run jaxmoe convert; return its seconds from start to end, and its report."""
    started = time.perf_counter()
    command = [*CONVERT, str(source), str(destination), "--ram-gib", str(ram_gib), "--json", *more]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - started, json.loads(done.stdout)


def interpreter_bytes() -> int:
    """Return the peak resident memory in bytes of an idle interpreter."""
    code = "print(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])"
    return 1024 * int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def kill_and_resume(
    source: Path, destination: Path, ram_gib: float, seconds: float, kills: int, seed: int
) -> list[float]:
    """Restart the conversion until `kills` runs were killed (SIGKILL); return the seconds that each killed run took.

    Each kill happens after a random part of `seconds`.
    """
    rng, moments = random.Random(seed), []
    while len(moments) < kills:
        moment = rng.uniform(0, seconds)
        command = [*CONVERT, str(source), str(destination), "--ram-gib", str(ram_gib)]
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            running.wait(moment)
            assert running.returncode == 0, "the conversion failed before the kill"
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGKILL)
            running.wait()
            moments.append(moment)
        if destination.exists():  # the run ended before the kill: start over
            shutil.rmtree(destination)
    return moments


def differing(a: Path, b: Path) -> Iterator[str]:
    """Yield the files that are not in both trees with the same bytes."""
    names = [{str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} for root in (a, b)]
    yield from sorted(names[0] ^ names[1])
    yield from (name for name in sorted(names[0] & names[1]) if not filecmp.cmp(a / name, b / name, shallow=False))


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description="Benchmark conversion against cp: time, memory, kills.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--gb", type=float, default=6.0, help="size of the checkpoint, in 1e9 bytes")
    parser.add_argument("--ram-gib", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3, help="runs of cp and of both conversions, in alternation")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    root = asked.directory / "bench_convert"
    shutil.rmtree(root, ignore_errors=True)
    source, copy, store, back = (root / name for name in ("source", "copy", "store", "back"))
    try:
        num_bytes = write_checkpoint(source, int(asked.gb * 1e9), asked.seed)
        print(f"checkpoint: {num_bytes / 1e9:.2f} GB", flush=True)
        rows: dict[str, float] = {}
        cpu_s = children_cpu_s()

        def row(name: str, seconds: float, note: str = "") -> None:
            nonlocal cpu_s
            rows[name], rows[f"{name}, CPU"] = seconds, children_cpu_s() - cpu_s
            cpu_s = children_cpu_s()
            used = rows[f"{name}, CPU"]
            rate = num_bytes / 1e6 / seconds
            print(f"{name:26} {seconds:6.1f} s {rate:6.0f} MB/s, CPU {used:5.1f} s  {note}", flush=True)

        floor = interpreter_bytes()
        for repeat in range(1, asked.repeats + 1):
            os.sync()
            row(f"cp, {repeat}", timed(["cp", "-r", str(source), str(copy)]))
            row(f"sync after it, {repeat}", timed(["sync"]))
            shutil.rmtree(copy)
            for name, start, end in (("hf -> orbax", source, store), ("orbax -> hf", store, back)):
                seconds, report = converted(start, end, asked.ram_gib)
                over = (report["peak_rss_bytes"] - floor) / 2**20
                rows[f"{name}, MiB over the interpreter, {repeat}"] = over
                buffers = report["buffer_bytes"] / 2**20
                row(
                    f"{name}, {repeat}",
                    seconds,
                    f"peak RSS {over:.0f} MiB over the interpreter's, buffers {buffers:.0f}",
                )
            row(f"verify orbax, {repeat}", timed([*CONVERT, str(store), "--verify"]))
            shutil.rmtree(back)
            if repeat < asked.repeats:
                shutil.rmtree(store)
        if asked.kills:
            seconds = rows[f"hf -> orbax, {asked.repeats}"]
            moments = kill_and_resume(source, back, asked.ram_gib, seconds, asked.kills, asked.seed)
            cpu_s = children_cpu_s()
            last, report = converted(source, back, asked.ram_gib)
            wrong = list(differing(store, back))
            row("last run after the kills", last, f"{report['resumed_tensors']} of {report['num_tensors']} resumed")
            when = ", ".join(f"{moment:.1f}" for moment in moments)
            print(f"{len(moments)} kills after s: {when}; files that differ from an undisturbed run: {wrong or 'none'}")
            rows["kills"], rows["differing"] = len(moments), len(wrong)
        print(json.dumps({"num_bytes": num_bytes, **rows}))
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
