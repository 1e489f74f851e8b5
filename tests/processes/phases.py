"""A process of a group that passes all phases, again and again, and tells which one it is in.

python -m tests.processes.phases PORT NUM_PROCESSES PROCESS_ID DEVICES MODEL LOG.txt ROUNDS
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from jaxmoe import LLM, AsyncEngine, SamplingParams
from jaxmoe.parallel.eplb import balance
from jaxmoe.parallel.processes import join

from .scenario import PROMPTS, start_like_the_tests

LOST_AFTER = 6.0
PHASES = ("joining", "loading", "compiling", "prefill", "decode", "move")


def main() -> None:
    port, num_processes, process_id, devices, model, log, rounds = sys.argv[1:]

    def enter(phase: str) -> None:
        with Path(log).open("a", encoding="utf-8") as file:
            print(phase, file=file)

    enter("joining")
    start_like_the_tests(int(devices))
    join(
        f"localhost:{port}", num_processes=int(num_processes), process_id=int(process_id), devices=int(devices),
        lost_after=LOST_AFTER,
    )  # fmt: skip
    enter("loading")
    llm = LLM.load(
        model, dtype="float32", mesh="data=2,tensor=2,expert=2", redundant_experts=2,
        on_progress=lambda done, total: enter("loading"),
    )  # fmt: skip
    greedy = SamplingParams(max_tokens=24, ignore_eos=True)
    enter("compiling")
    with AsyncEngine(llm, max_num_seqs=4, context=64, kv_cache_gib=0.001, chunk_tokens=32):
        own = llm._runner.experts
        for number in range(int(rounds)):
            enter("prefill")
            tokens = []
            for event in llm.stream(PROMPTS[:2], greedy):
                if not tokens:
                    enter("decode")
                tokens.append(event.token_id)
            enter("move")
            loads = np.random.default_rng(number).random((own.num_layers, own.num_experts))
            llm.place_experts(balance(loads, num_replicas=own.num_physical_experts, num_ranks=own.num_ranks))
    print("TOKENS", tokens, flush=True)


if __name__ == "__main__":
    main()
