"""Parity check: compare a model on every mesh and layout with one device, by logits and greedy tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import jax
import numpy as np

from jaxmoe.api.llm import LLM
from jaxmoe.engine.request import SamplingParams
from jaxmoe.errors import ConfigError, StepError
from jaxmoe.parallel.layouts import DEFAULT_LAYOUT, LAYOUTS, Axes, ShardingLayout
from jaxmoe.parallel.mesh import build_mesh, nearest_devices
from jaxmoe.parallel.stages import layer_segments

_TEXTS = (
    "def fibonacci(n):\n    ",
    "import os\n\n",
    'class Queue:\n    """A first-in first-out queue."""\n\n    def __init__',
)


@dataclass(frozen=True, kw_only=True)
class ParityCase:
    """Describe a mesh and a layout to compare. also: layouts that shard the model identically on this mesh."""

    mesh: dict[str, int]
    layout: ShardingLayout = DEFAULT_LAYOUT
    also: tuple[ShardingLayout, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ParityResult:
    """Report the comparison of one trial with one device.

    max_logit_error: largest difference of a logit, infinite if logits are not finite. num_tokens, num_equal: greedy
    tokens compared, and equal ones. refused: why the model cannot run on this mesh; empty if it can.
    """

    trial: ParityCase
    max_logit_error: float = 0.0
    num_tokens: int = 0
    num_equal: int = 0
    logit_tolerance: float = 0.0
    refused: str = ""

    @property
    def passed(self) -> bool:
        """Return whether all greedy tokens are equal and all logits are within the tolerance."""
        return not self.refused and self.num_equal == self.num_tokens and self.max_logit_error <= self.logit_tolerance


def all_meshes(num_devices: int) -> list[dict[str, int]]:
    """Return every factorization of num_devices into data x pipeline x tensor x expert."""
    divisors = [d for d in range(1, num_devices + 1) if num_devices % d == 0]
    return [
        {"data": data, "pipeline": pipeline, "tensor": tensor, "expert": num_devices // data // pipeline // tensor}
        for data, pipeline, tensor in product(divisors, repeat=3)
        if num_devices % (data * pipeline * tensor) == 0
    ]


def all_trials(
    meshes: Iterable[dict[str, int]], layouts: Iterable[ShardingLayout] = tuple(LAYOUTS.values()), *, moe: bool = True
) -> list[ParityCase]:
    """Return a trial for every mesh and layout. moe: the model has experts.

    Layouts that shard the model identically on a mesh form one trial, named after the first of them.
    """
    trials = []
    for mesh in meshes:
        alike: dict[tuple[Axes, ...], list[ShardingLayout]] = {}
        for layout in dict.fromkeys(layouts):
            alike.setdefault(layout.used(mesh, moe=moe), []).append(layout)
        trials += [ParityCase(mesh=mesh, layout=first, also=tuple(others)) for first, *others in alike.values()]
    return trials


def sample_prompts(llm: LLM) -> list[list[int]]:
    """Return a few short prompts as token ids: texts if the model has a tokenizer, else random ids of seed 0."""
    if llm.tokenizer is not None:
        return [llm.tokenizer.encode(text) for text in _TEXTS]
    rng = np.random.default_rng(0)
    lengths = (4, 9, 17)
    return [
        rng.integers(0, llm.config.vocab_size, min(n, llm.config.max_position_embeddings // 2)).tolist()
        for n in lengths
    ]


def verify_trials(
    model: str | Path,
    *,
    trials: Iterable[ParityCase],
    max_tokens: int = 32,
    logit_tolerance: float = 1e-4,
    weights_dtype: str | None = None,
    ignore_config_keys: Sequence[str] = (),
) -> Iterator[ParityResult]:
    """Load the model in float32 on one device, then on each mesh and layout, and yield each comparison.

    Raises: the same errors as LLM.load.
    """
    devices = jax.devices()
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)

    def outcome(trial: ParityCase, prompts: list[list[int]] | None):
        count = math.prod(trial.mesh.values())
        here = devices if trial.mesh else jax.local_devices()  # every process compares with one device of its own
        llm = LLM.load(
            model, mesh=build_mesh(trial.mesh, nearest_devices(here, count)), layout=trial.layout, dtype="float32",
            weights_dtype=weights_dtype, ignore_config_keys=ignore_config_keys,
        )  # fmt: skip
        prompts = prompts or sample_prompts(llm)
        tokens = [out.token_ids for out in llm.generate(prompts, params)]
        return llm.config, prompts, llm.last_logits(prompts), tokens

    config, prompts, logits, tokens = outcome(ParityCase(mesh={}), None)
    for trial in trials:
        try:
            layer_segments(config, "scan", stages=trial.mesh.get("pipeline", 1))
        except ConfigError as error:  # more stages than layers; no other reason excludes a mesh
            yield ParityResult(trial=trial, refused=str(error))
            continue
        try:
            *_, mesh_logits, mesh_tokens = outcome(trial, prompts)
        except StepError:  # logits are not finite, although they are on one device
            num_tokens = sum(map(len, tokens))
            yield ParityResult(
                trial=trial, max_logit_error=math.inf, num_tokens=num_tokens, logit_tolerance=logit_tolerance
            )
            continue
        pairs = [pair for a, b in zip(tokens, mesh_tokens, strict=True) for pair in zip(a, b, strict=True)]
        yield ParityResult(
            trial=trial,
            max_logit_error=float(np.abs(mesh_logits - logits).max()),
            num_tokens=len(pairs),
            num_equal=sum(a == b for a, b in pairs),
            logit_tolerance=logit_tolerance,
        )
