"""The Python API: load a checkpoint on a mesh, generate, score."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxmoe.api.shared_core import SharedCore
from jaxmoe.config import ModelConfig
from jaxmoe.engine.batch import MAX_DECODE_STEPS, PAGE_SIZE, whole_blocks
from jaxmoe.engine.core import EngineCore, Request, RequestFinished, not_finite
from jaxmoe.engine.eos import eos_ids, special_stop_ids
from jaxmoe.engine.experts import ExpertLoads
from jaxmoe.engine.limits import SchedulerConfig
from jaxmoe.engine.request import RequestOutput, SamplingParams, TokenEvent, check_prompt
from jaxmoe.engine.runner import Runner, bucket
from jaxmoe.engine.timing import StepClock
from jaxmoe.engine.tokenizer import Message, Tokenizer
from jaxmoe.engine.trace import Trace, check_trace_path
from jaxmoe.errors import ConfigError, MeshError, RequestError, StepError
from jaxmoe.families import read_config
from jaxmoe.families.dtypes import choose_dtypes, kv_array_dtype
from jaxmoe.model.kernels import KernelOverrides, choose_kernels, prepare_kernels
from jaxmoe.model.transformer import abstract_model
from jaxmoe.parallel.eplb import ExpertPlacement, balance
from jaxmoe.parallel.layouts import DEFAULT_LAYOUT, Layout, parse_layout
from jaxmoe.parallel.mesh import build_mesh, check_axes, conform_mesh, default_axes, describe, parse_mesh
from jaxmoe.parallel.sharding import Placement, segment_sizes
from jaxmoe.parallel.stages import check_virtual_stages
from jaxmoe.weights.checkpoint import open_tensors, read_json
from jaxmoe.weights.load import assign_weight_slices, load_params
from jaxmoe.weights.params import parameter_table, state_of
from jaxmoe.weights.source import DEFAULT_MODEL, find_model
from jaxmoe.weights.stored import as_stored
from jaxmoe.weights.verify import check_whole

Prompt = str | Sequence[int]
_MAX_PREFILL_TOKENS = 65536  # scored at once
_CHUNK_TOKENS = (128, 512, 2048)  # prompt tokens of a step and rank
_OPEN_TOKENS = 1024  # new ones that there are pages for, of each request that may go on to the end of the context


class LLM:
    """A model on a mesh. Make one with LLM.load."""

    def __init__(
        self, runner: Runner, *, tokenizer: Tokenizer | None, eos: frozenset[int], max_num_seqs: int = 64
    ) -> None:
        self.runner, self.tokenizer, self.eos, self.max_num_seqs = runner, tokenizer, eos, max_num_seqs
        self._shared = SharedCore(runner, tokenizer=tokenizer, eos=eos)
        self._trace: Trace | None = None
        self._on_loads: Callable[[np.ndarray], None] | None = None

    @classmethod
    def load(
        cls,
        model: str | Path = DEFAULT_MODEL,
        *,
        mesh: str | Mapping[str, int] | Mesh | None = None,
        dtype: str | None = None,
        weights_dtype: str | None = None,
        kv_dtype: str | None = None,
        revision: str | None = None,
        kernels: KernelOverrides = MappingProxyType({}),
        ignore_config_keys: Iterable[str] = (),
        max_num_seqs: int = 64,
        virtual_stages: int = 1,
        layout: str | Layout = DEFAULT_LAYOUT,
        redundant_experts: int | None = None,
        verify: bool = False,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> LLM:
        """Read a checkpoint, as Hugging Face publishes it or as jaxmoe convert wrote it, onto a device mesh.

        model: a directory, a preset ("demo") or a hub id. mesh: axes ("data=2,tensor=2,expert=2"), a preset, or a Mesh
        over some of these axes, whose devices keep their coordinates; axes that need fewer devices than there are take
        the nearest ones and log a warning; None puts all devices on expert (MoE) or tensor (dense). dtype: of weights
        and activations; None keeps the checkpoint's. weights_dtype: how matrices of attention, MLPs and experts are
        kept: None as in the checkpoint, quantized ones too, as their own format's name does; int8, fp8 (a scale for
        each output), int8-block, fp8-block (for 128x128) quantizes plain ones; float32, bfloat16 or float16, which is
        dtype's own, dequantizes. kv_dtype: of cached keys and values: float32, bfloat16, fp8, int8, or dtype's own
        (None). kernels: KernelConfig, or a mapping such as {"grouped": "blocks"}; what it does not name is what runs
        fastest here: on a CPU the native kernels where there is a C++ compiler. max_num_seqs: requests run together,
        rounded up to a power of two a rank. layout: which axes share out tokens, layers and experts (parallel/layouts).
        virtual_stages: of each pipeline stage: more make stages wait less and send more. redundant_experts: places for
        experts beyond their number in each MoE layer, 0 or more (rounded up so that all ranks have as many), to move
        experts among by place_experts; None keeps them in order. verify: hold a converted checkpoint against its
        checksums first (reads it once more). on_progress is told (bytes of parameters filled, bytes in all) as files
        are read.
        Raises: CheckpointError, ConfigError, LayoutError, MeshError; nothing is read before input is checked.
        """
        directory = find_model(model, revision=revision)
        raw = read_json(directory / "config.json")
        config = read_config(raw, ignore=ignore_config_keys)
        choose_dtypes(config, dtype=dtype, weights_dtype=weights_dtype, kv_dtype=kv_dtype)  # refused before files open
        if type(max_num_seqs) is not int or max_num_seqs < 1:
            raise RequestError(f"max_num_seqs={max_num_seqs!r} must be a whole number of at least 1")
        layout = parse_layout(layout) if isinstance(layout, str) else layout
        placement = Placement(
            mesh=_as_mesh(mesh, config), layout=layout, virtual_stages=virtual_stages,
            redundant_experts=_check_redundant(redundant_experts, config),
        )  # fmt: skip
        check_virtual_stages(virtual_stages, stages=placement.num_stages)
        settings = read_json(directory / "tokenizer_config.json", required=False)
        tokenizer = Tokenizer.load(directory, settings)
        eos = eos_ids(directory, tokenizer, vocab_size=config.vocab_size)
        tensors = open_tensors(directory)
        config = as_stored(config, tensors, raw)
        config, dtype = choose_dtypes(config, dtype=dtype, weights_dtype=weights_dtype, kv_dtype=kv_dtype)
        chosen = choose_kernels(
            dtype, kernels, shared_pages=placement.num_shards("page_token") > 1, quantization=config.quantization
        )
        if verify:
            check_whole(directory)

        shapes = abstract_model(config, placement, dtype=dtype, kernels=chosen)
        abstract = nnx.state(shapes)
        table = parameter_table(abstract, placement)
        sizes = segment_sizes(config, placement, shapes.layer_segments)
        parts = assign_weight_slices(directory, tensors, config, sizes, shapes.layer_segments)

        with ThreadPoolExecutor(1) as beside:  # after all input is checked: compiling writes to the cache
            ready = beside.submit(prepare_kernels, dtype, kernels, chosen)
            arrays = load_params(tensors, table, parts, config, on_progress=on_progress)
        if ready.result() != chosen:  # the native kernels do not compile here: others want other arrays
            del arrays
            return cls.load(
                directory, mesh=placement.mesh, dtype=dtype, weights_dtype=weights_dtype, kv_dtype=kv_dtype,
                kernels=ready.result(),
                ignore_config_keys=ignore_config_keys, max_num_seqs=max_num_seqs, virtual_stages=virtual_stages,
                layout=layout, redundant_experts=redundant_experts, on_progress=on_progress,
            )  # fmt: skip
        whole = nnx.merge(nnx.graphdef(shapes), state_of(abstract, arrays))
        runner = Runner(whole, dtype=dtype, kv_dtype=kv_array_dtype(kv_dtype))
        if redundant_experts is not None:
            own = runner.experts
            even = np.ones((own.num_layers, own.num_experts))
            runner.place_experts(balance(even, num_replicas=own.num_physical_experts, num_ranks=own.num_ranks))
        return cls(runner, tokenizer=tokenizer, eos=eos, max_num_seqs=max_num_seqs)

    @property
    def _core(self) -> EngineCore | None:
        return self._shared.core

    @_core.setter
    def _core(self, core: EngineCore | None) -> None:
        self._shared.core = core

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.runner.config

    @property
    def mesh(self) -> Mesh:
        """The device mesh the weights lie on."""
        return self.runner.placement.mesh

    @property
    def timing(self) -> StepClock | None:
        """How long the steps of generate and stream took since their pages were laid out; None before any."""
        return None if self._core is None else self._core.timing

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] = SamplingParams()
    ) -> list[RequestOutput]:
        """Complete each prompt (text, or token ids); results in the order of the prompts.

        Raises: RequestError before anything runs if any prompt or value is out of range; StepError if a step that held
        one of them failed, or the logits of one are not finite.
        """
        inputs = self._checked_inputs(_listed(prompts), params)
        requests: list[list[Request]] = []
        for _ in self._events(inputs, requests):
            pass
        return [
            RequestOutput(index=index, prompt_token_ids=ids, outputs=[sample.output() for sample in samples])
            for index, ((ids, _), samples) in enumerate(zip(inputs, requests, strict=True))
        ]

    def stream(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] = SamplingParams()
    ) -> Iterator[TokenEvent]:
        """As generate, giving each token as it comes. Input is checked at the call, not at the first token."""
        return self._events(self._checked_inputs(_listed(prompts), params), [])

    def chat(
        self, messages: Sequence[Message], params: SamplingParams = SamplingParams(), *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> RequestOutput:  # fmt: skip
        """The assistant's answer to a conversation, by the model's chat template. tools: as in chat_prompt.

        Raises: RequestError without a template.
        """
        return self.generate([self.chat_prompt(messages, tools=tools)], params)[0]

    def chat_prompt(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of a conversation by the model's chat template. tools: JSON schemas of functions that the answer
        may call.

        Raises: RequestError without a template.
        """
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer.json: give token ids")
        return self.tokenizer.encode(self.tokenizer.chat(messages, tools), special=False)

    def score(self, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probability of each token given those before it: float32 [T - 1] for each list of T ids.

        Raises: RequestError for an empty list, one longer than the context, or an id out of range; StepError where the
        logits of a place are not finite.
        """
        scores = []
        for index, (logprobs, _) in enumerate(self._scored(prompts)):
            if np.isnan(logprobs).any():
                raise not_finite(self.runner, f"prompt {index}")
            scores.append(logprobs)
        return scores

    def last_logits(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Logits [P, vocab_size] of the token after each of P lists of ids, float32. Raises: as score."""
        rows = []
        for index, (_, logits) in enumerate(self._scored(prompts)):
            if not np.isfinite(logits.max()):
                raise not_finite(self.runner, f"the last token of prompt {index}")
            rows.append(logits)
        return np.stack(rows)

    def _scored(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        checked = self._checked(_listed(prompts), room=0)
        size = self._batch_size(checked)
        for first in range(0, len(checked), size):
            group = checked[first : first + size]
            tokens, lengths = pad_prompts(group, self.runner.padded_num_seqs(len(group)))
            logprobs, logits = (np.asarray(part) for part in self.runner.score(tokens, lengths))
            for row, ids in enumerate(group):
                yield logprobs[row, : len(ids) - 1], logits[row]

    def _checked(self, prompts: Sequence[Sequence[int]], *, room: int) -> list[list[int]]:
        context = self.config.max_position_embeddings - room
        if not prompts:
            raise RequestError("no prompts were given: give at least one")
        return [
            check_prompt(ids, index=index, vocab_size=self.config.vocab_size, context=context)
            for index, ids in enumerate(prompts)
        ]

    def _batch_size(self, prompts: Sequence[Sequence[int]]) -> int:
        """How many prompts run together: no more than max_num_seqs, nor than a prefill's tokens allow."""
        longest = max(len(ids) for ids in prompts)
        return max(1, min(self.max_num_seqs, _MAX_PREFILL_TOKENS // longest))

    def _ids(self, prompt: Prompt) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer.json: give token ids")
        return self.tokenizer.encode(prompt)

    def _checked_inputs(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[tuple[list[int], SamplingParams]]:
        """Token ids and sampling values of each request, checked."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        if not isinstance(each, Sequence) or not all(isinstance(p, SamplingParams) for p in each):
            raise RequestError(
                f"params must be SamplingParams, one or a list with one for each prompt, not {params!r:.60}"
            )
        if len(each) != len(prompts):
            raise RequestError(f"{len(each)} SamplingParams for {len(prompts)} prompts: give one, or one for each")
        if self.tokenizer is None and any(p.stop for p in each):
            raise RequestError("stop strings need a tokenizer.json, and this model has none: leave stop empty")
        for p in each:
            special = special_stop_ids(self.tokenizer, p.stop, vocab_size=self.config.vocab_size)
            p.check_token_ids(vocab_size=self.config.vocab_size, num_eos=len(self.eos.union(special)))
        checked = self._checked([self._ids(prompt) for prompt in prompts], room=1)
        return list(zip(checked, each, strict=True))

    def _events(
        self, inputs: list[tuple[list[int], SamplingParams]], requests: list[list[Request]]
    ) -> Iterator[TokenEvent]:
        """Yield the token events of these requests, to the last; `requests` receives them.

        Whoever stops listening ends the requests. Raises: StepError if a step that held one of them failed, or
        its logits are not finite.
        """
        with self._shared.lock:
            core = self._core_for(inputs)
            for ids, p in inputs:  # all, before any is queued
                core.check(len(ids), p)
            requests += [core.submit(index, ids, p, name=f"prompt {index}") for index, (ids, p) in enumerate(inputs)]
        unfinished = {id(request): request for samples in requests for request in samples}
        try:
            while unfinished:
                for request in [r for r in unfinished.values() if r.events]:
                    while request.events:
                        event = request.events.popleft()
                        if isinstance(event, RequestFinished):
                            raise event.error or StepError(f"request {event.index} was ended: {event.finish_reason}")
                        if event.finish_reason is not None:
                            del unfinished[id(request)]
                        yield event
                if unfinished:
                    with self._shared.lock:
                        core.step()
        finally:
            with self._shared.lock:
                for request in unfinished.values():
                    core.cancel(request)

    def expert_loads(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] = SamplingParams()
    ) -> ExpertLoads:
        """Complete each prompt, and count the tokens that went to each expert, on the devices without a collective.

        What earlier prompts left on pages is forgotten, so that every token is counted; so are those of requests that
        other threads have on this LLM meanwhile, and experts must stay where they are. Raises: as generate.
        """
        experts = self.runner.experts
        totals = np.zeros((experts.num_layers, experts.num_physical_experts), np.int64)

        def count(loads: np.ndarray) -> None:
            nonlocal totals
            totals += loads

        with self._shared.lock:
            if self._core is not None:
                if self._core.busy:
                    raise RequestError(
                        "expert_loads counts from an empty cache, and requests run on this LLM: wait for them"
                    )
                self._core.scheduler.reset_prefix_cache()
            self._on_loads = count
        try:
            self.generate(prompts, params)
        finally:
            with self._shared.lock:
                self._on_loads = None
                if self._core is not None:
                    self._core.on_loads = None
        return experts.expert_loads(totals)

    def place_experts(self, experts: ExpertPlacement) -> None:
        """Move experts, and copies of them, to where they are to stand (parallel/eplb.py); no step is compiled anew.

        Requests that run go on. Raises: ConfigError if the placement is not of this model, or it was loaded without
        redundant_experts.
        """
        with self._shared.lock:
            self.runner.place_experts(experts)

    @contextmanager
    def trace(self, path: str | Path) -> Iterator[Trace]:
        """Record what generate and stream do inside the with-statement; writes PATH (Chrome's format, for
        ui.perfetto.dev) and a page beside it (.html) at its end.

        Raises: RequestError at once if the path cannot be written.
        """
        check_trace_path(path)
        trace = Trace(self.trace_facts())
        with self._shared.lock:
            if self._shared.reserved and self._core is not None and self._core.trace is not None:
                raise RequestError("the AsyncEngine on this LLM writes a trace already: close it first")
            self._trace = trace
        try:
            yield trace
        finally:
            with self._shared.lock:
                self._trace = None
                if self._core is not None:
                    self._core.trace = None
            trace.write(path)

    def trace_facts(self) -> dict[str, Any]:
        """What a trace says of the model and where it runs."""
        config = self.config
        facts = {"family": config.family, "layers": config.num_hidden_layers, "dtype": self.runner.dtype}
        if config.moe is not None:
            facts |= {"experts": config.moe.num_experts, "experts_per_token": config.moe.num_experts_per_tok}
        return facts | {"mesh": describe(self.mesh), "kv_bytes_per_token": self.runner.bytes_per_token}

    def checked_prompt(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        """The token ids of one prompt. Raises: RequestError if it or params cannot be run by this model."""
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params must be SamplingParams, not {params!r:.60}")
        ((ids, _),) = self._checked_inputs([prompt], params)
        return ids

    def pool_for(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] = SamplingParams()
    ) -> tuple[int, int]:
        """(tokens whose keys and values generate would have room for, bytes of one) over all devices.

        Raises: as generate.
        """
        scheduler_config = self._scheduler_config_for(self._checked_inputs(_listed(prompts), params))
        return (
            scheduler_config.num_ranks * scheduler_config.num_pages * scheduler_config.page_size,
            self.runner.bytes_per_token,
        )

    def _scheduler_config_for(self, inputs: Sequence[tuple[Sequence[int], SamplingParams]]) -> SchedulerConfig:
        """Room for these requests, and for what there is room for already."""
        fixed = self._shared.fixed([(len(ids), p) for ids, p in inputs])
        if fixed is not None:
            return fixed.scheduler_config
        context, ranks = self.config.max_position_embeddings, self.runner.num_ranks
        longest = max(context if p.max_tokens is None else min(context, len(ids) + p.max_tokens) for ids, p in inputs)
        expected = max(min(context, len(ids) + (p.max_tokens or _OPEN_TOKENS)) for ids, p in inputs)
        seq_slots = self.runner.padded_num_seqs(min(sum(p.n for _, p in inputs), self.max_num_seqs)) // ranks
        length = min(bucket(longest), context)
        share = -(-sum(len(ids) for ids, _ in inputs) // ranks)
        page_size = PAGE_SIZE * self.runner.context_ranks
        chunk_tokens = next((n for n in _CHUNK_TOKENS if n >= share), _CHUNK_TOKENS[-1])
        chunk_tokens, block_tokens = whole_blocks(chunk_tokens, self.runner.block_shares)
        needed = SchedulerConfig(
            num_ranks=ranks,
            max_num_seqs=seq_slots,
            block_tokens=block_tokens,
            context=length,
            page_size=page_size,
            decode_steps=MAX_DECODE_STEPS,
            chunk_tokens=chunk_tokens,
            num_pages=1,
            window=self.config.visible_span[0],
            attention_chunk=self.config.visible_span[1],
        )
        keeps_all = any(p.reads_history for _, p in inputs)
        whole = (
            needed if self._core is None or self._core.warmed_up else needed.joined(self._core.scheduler_config)
        )  # larger chunks need more pages
        usual, most = (whole.max_pages(n, keeps_all=keeps_all) for n in (min(bucket(expected), length), length))
        return replace(whole, num_pages=max(whole.num_pages, seq_slots * usual, most))

    def _core_for(self, inputs: Sequence[tuple[Sequence[int], SamplingParams]]) -> EngineCore:
        """An engine core with room for these requests: the one there is, or a larger one in its place."""
        core = self._shared.fixed([(len(ids), p) for ids, p in inputs])
        if core is None:
            core = self._shared.fit(self._scheduler_config_for(inputs))
        if not self._shared.reserved or self._trace is not None:
            core.trace = self._trace
        core.on_loads = self._on_loads
        return core


def _check_redundant(redundant_experts: int | None, config: ModelConfig) -> int | None:
    if redundant_experts is None:
        return None
    if config.moe is None:
        raise ConfigError(f"redundant_experts={redundant_experts!r}: the model has no experts; leave it out")
    most = 15 * config.moe.num_experts
    if type(redundant_experts) is not int or not 0 <= redundant_experts <= most:
        raise ConfigError(f"redundant_experts={redundant_experts!r} must be a whole number in [0, {most}]")
    return redundant_experts


def pad_prompts(prompts: Sequence[list[int]], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens [rows, bucket] right-padded with 0, lengths [rows]."""
    lengths = np.zeros(rows, np.int32)
    lengths[: len(prompts)] = [len(ids) for ids in prompts]
    tokens = np.zeros((rows, bucket(max(len(ids) for ids in prompts))), np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = ids
    return tokens, lengths


def _listed(prompts: Iterable[Any]) -> list[Any]:
    """The prompts as a list. Raises: RequestError for one text, or what is no list at all."""
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise RequestError(f"prompts must be a list of texts or of lists of token ids, not {prompts!r:.60}")
    return list(prompts)


def _as_mesh(mesh: str | Mapping[str, int] | Mesh | None, config: ModelConfig) -> Mesh:
    if isinstance(mesh, Mesh):
        return conform_mesh(mesh)
    if mesh is None:
        axes = default_axes(jax.device_count(), num_experts=config.moe.num_experts if config.moe else 0)
    else:
        if not isinstance(mesh, str | Mapping):
            raise MeshError(
                f"mesh={mesh!r} must be text such as data=2,tensor=4, a mapping of axis sizes, or a jax Mesh"
            )
        axes = parse_mesh(mesh) if isinstance(mesh, str) else check_axes(mesh)
    return build_mesh(axes)
