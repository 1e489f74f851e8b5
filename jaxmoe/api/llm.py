"""The offline Python API: load a checkpoint onto a device mesh, generate text, score tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from jax.sharding import Mesh

from jaxmoe.api.inputs import Prompt, check_inputs, check_prompts, listed
from jaxmoe.api.loader import LoadedModel, load_model
from jaxmoe.api.output_processor import RequestState, request_output
from jaxmoe.api.outputs import RequestOutput, TokenEvent
from jaxmoe.api.process_calls import (
    ResultCodecs,
    in_every_process,
    model_control,
    stream_in_every_process,
)
from jaxmoe.api.request_sizing import size_for_requests
from jaxmoe.api.scoring import score_batches
from jaxmoe.api.shared_core import SharedCore
from jaxmoe.config import EngineConfig, EngineOptions, ModelConfig
from jaxmoe.config.engine import checked_config
from jaxmoe.engine.core import EngineCore, not_finite
from jaxmoe.engine.experts import ExpertLoads
from jaxmoe.engine.limits import SchedulerConfig
from jaxmoe.engine.request import RequestFinished, SamplingParams
from jaxmoe.engine.runner import ModelRunner
from jaxmoe.engine.timing import StepClock
from jaxmoe.engine.trace import EngineTrace, check_trace_path, trace_facts
from jaxmoe.errors import RequestError, StepError
from jaxmoe.parallel.eplb import ExpertPlacement
from jaxmoe.text.tokenizer import CheckpointTokenizer, Message
from jaxmoe.weights.source import DEFAULT_MODEL


class LLM:
    """Load and run one model on a device mesh: generate, stream, chat and score.

    A call allocates a KV cache for its requests, or reuses that of an earlier call if it is large enough. An
    AsyncEngine on the same LLM shares its KV cache and prefix cache.

    Args:
        model: A directory, a preset ("demo") or a Hugging Face Hub id.
        config: Options of loading and serving. By default those of EngineConfig.
        on_progress: Called with (bytes of parameters loaded, total bytes) as files are read.
        **options: Options of EngineConfig by their own names, in place of those of `config`: `mesh="tensor=2"`,
            `dtype="bfloat16"`, `kernels={"grouped": "blocks"}`, `max_num_seqs=16`, ...

    Raises:
        CheckpointError: If the checkpoint is missing, corrupt, or does not match its config.
        ConfigError: If the model config, a dtype, a kernel or another option is not supported.
        LayoutError: If the layout is not valid.
        MeshError: If the mesh is not valid on these devices.
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        config: EngineConfig | None = None,
        *,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        **options: Unpack[EngineOptions],
    ) -> None:
        engine_config = checked_config(config).with_options(options)
        self._adopt(load_model(model, engine_config, on_progress=on_progress), engine_config)

    @classmethod
    def load(
        cls,
        model: str | Path = DEFAULT_MODEL,
        config: EngineConfig | None = None,
        *,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        **options: Unpack[EngineOptions],
    ) -> LLM:
        """Load a checkpoint onto a device mesh: the same as LLM(model, config, ...)."""
        return cls(model, config, on_progress=on_progress, **options)

    @classmethod
    def from_runner(
        cls,
        runner: ModelRunner,
        *,
        tokenizer: CheckpointTokenizer | None,
        eos: frozenset[int],
        config: EngineConfig | None = None,
    ) -> LLM:  # fmt: skip
        """Return an LLM of weights that are on their devices already, with a KV cache of its own.

        Args:
            runner: Weights and compiled steps.
            tokenizer: Tokenizer of the checkpoint; without one (None), prompts must be token ids.
            eos: End tokens of the model.
            config: Options of serving.
        """
        llm = cls.__new__(cls)
        llm._adopt(LoadedModel(runner=runner, tokenizer=tokenizer, eos=eos), config or EngineConfig())
        return llm

    def _adopt(self, loaded: LoadedModel, config: EngineConfig) -> None:
        self._runner, self.tokenizer, self.eos = loaded.runner, loaded.tokenizer, loaded.eos
        self.engine_config = config
        executor, self._followed = model_control(self._runner)
        self._shared = SharedCore(executor, tokenizer=self.tokenizer, eos=self.eos)
        self._trace: EngineTrace | None = None
        self._on_loads: Callable[[np.ndarray], None] | None = None

    @property
    def _core(self) -> EngineCore | None:
        return self._shared.core

    @_core.setter
    def _core(self, core: EngineCore | None) -> None:
        self._shared.core = core

    @property
    def follows(self) -> bool:
        """Return whether this process follows process 0: calls return the results of the same calls there."""
        return self._followed is not None

    def follow(self) -> int:
        """Run the operations of process 0 until it ends, in a process that follows it.

        Without this call, the process does so when it exits.

        Returns:
            The exit code of process 0.
        """
        assert self._followed is not None, "only a process that follows can follow"
        return self._followed.follower.follow()

    @property
    def config(self) -> ModelConfig:
        """Return the configuration of the model."""
        return self._runner.config

    @property
    def mesh(self) -> Mesh:
        """Return the device mesh that holds the weights."""
        return self._runner.placement.mesh

    @property
    def timing(self) -> StepClock | None:
        """Return the step times of generate and stream since the KV cache was allocated; None before the first call."""
        return None if self._core is None else self._core.timing

    @in_every_process(ResultCodecs.OUTPUTS)
    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] = SamplingParams()
    ) -> list[RequestOutput]:
        """Generate completions for a batch of prompts.

        Args:
            prompts: Prompts, each a text or a sequence of token ids.
            params: Sampling parameters of all prompts, or one for each prompt.

        Returns:
            One RequestOutput per prompt, in the order of the prompts.

        Raises:
            RequestError: If a prompt or a parameter is out of range. Nothing runs in that case.
            StepError: If a step that computed one of the requests failed, or the logits of a request are not finite.
        """
        return self._generate(prompts, params)

    def _generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        inputs = self._check_inputs(prompts, params)
        requests: list[list[RequestState]] = []
        for _ in self._events(inputs, requests):
            pass
        return [request_output(samples) for samples in requests]

    @stream_in_every_process
    def stream(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] = SamplingParams()
    ) -> Iterator[TokenEvent]:
        """Generate completions and yield each token as it is sampled.

        The input is checked at the call, not at the first token. Closing the iterator cancels the unfinished requests.

        Args:
            prompts: As in generate.
            params: As in generate.

        Returns:
            An iterator over the token events of all prompts. TokenEvent.index is the index of the prompt.

        Raises:
            RequestError: As in generate.
            StepError: As in generate, while iterating.
        """
        return self._events(self._check_inputs(prompts, params), [])

    def chat(
        self, messages: Sequence[Message], params: SamplingParams = SamplingParams(), *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> RequestOutput:  # fmt: skip
        """Generate the assistant's answer to a conversation with the model's chat template.

        Args:
            messages: The conversation, as in chat_prompt.
            params: Sampling parameters.
            tools: As in chat_prompt.

        Returns:
            The finished request. prompt_token_ids holds the rendered conversation.

        Raises:
            RequestError: If the model has no tokenizer or chat template, the template rejects the messages, or a
                parameter is out of range.
            StepError: As in generate.
        """
        return self.generate([self.chat_prompt(messages, tools=tools)], params)[0]

    def chat_prompt(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Render a conversation with the model's chat template and tokenize it.

        Args:
            messages: Messages with a role and a content, which is a text or a list of text parts.
            tools: JSON schemas of functions that the answer may call.

        Returns:
            The token ids of the prompt, up to the start of the assistant's answer.

        Raises:
            RequestError: If the model has no tokenizer or chat template, or the template rejects the messages.
        """
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer.json: give token ids")
        return self.tokenizer.encode(self.tokenizer.chat(messages, tools), special=False)

    @in_every_process(ResultCodecs.ARRAYS)
    def score(self, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return the log-probability of each token given the tokens before it.

        Args:
            prompts: Token ids of each sequence.

        Returns:
            One float32 array [T - 1] per sequence of T token ids: natural log-probabilities of tokens 1 to T - 1.

        Raises:
            RequestError: If a sequence is empty or longer than the context, or a token id is out of range.
            StepError: If the logits at a position are not finite.
        """
        scores = []
        for index, (logprobs, _) in enumerate(self._scored(prompts)):
            if np.isnan(logprobs).any():
                raise not_finite(self._runner, f"prompt {index}")
            scores.append(logprobs)
        return scores

    @in_every_process(ResultCodecs.ARRAY)
    def last_logits(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the logits of the token that follows each sequence.

        Args:
            prompts: Token ids of each of P sequences.

        Returns:
            A float32 array [P, vocab_size].

        Raises:
            RequestError: As in score.
            StepError: If the logits after a sequence are not finite.
        """
        rows = []
        for index, (_, logits) in enumerate(self._scored(prompts)):
            if not np.isfinite(logits.max()):
                raise not_finite(self._runner, f"the last token of prompt {index}")
            rows.append(logits)
        return np.stack(rows)

    def _scored(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        checked = check_prompts(listed(prompts), self.config, room=0)
        return score_batches(self._shared.executor, checked, max_num_seqs=self.engine_config.max_num_seqs)

    def _events(
        self, inputs: list[tuple[list[int], SamplingParams]], requests: list[list[RequestState]]
    ) -> Iterator[TokenEvent]:
        """Submit the inputs, append the samples of each to `requests`, and yield all of their token events.

        Closing the generator cancels the unfinished requests. Raises: StepError if a step that computed one of the
        requests failed, or its logits are not finite.
        """
        with self._shared.lock:
            core = self._core_for(inputs)
            for ids, p in inputs:  # all, before any is queued
                core.check(len(ids), p)
            for index, (ids, p) in enumerate(inputs):
                requests.append(self._shared.submit(core, index, ids, p, name=f"prompt {index}"))
        unfinished = {id(state): state for samples in requests for state in samples}
        try:
            while unfinished:
                for state in [state for state in unfinished.values() if state.events]:
                    while state.events:
                        event = state.events.popleft()
                        if isinstance(event, RequestFinished):
                            raise event.error or StepError(f"request {event.index} was ended: {event.finish_reason}")
                        if event.finish_reason is not None:
                            del unfinished[id(state)]
                        yield event
                if unfinished:
                    with self._shared.lock:
                        if not any(state.events for state in unfinished.values()):
                            self._shared.run_step(core)
        finally:
            self._shared.cancel(core, unfinished.values())

    @in_every_process(ResultCodecs.LOADS)
    def expert_loads(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] = SamplingParams()
    ) -> ExpertLoads:
        """Generate completions and count the tokens that the router sends to each expert.

        The devices count without an extra collective. The prefix cache is dropped first, so that every prompt token is
        counted; no request may run then. Requests that other threads submit later are counted too. Do not call
        place_experts meanwhile.

        Args:
            prompts: As in generate.
            params: As in generate.

        Returns:
            Token counts of each MoE layer by physical expert, logical expert and rank.

        Raises:
            RequestError: As in generate.
            StepError: As in generate.
        """
        experts = self._runner.experts
        totals = np.zeros((experts.num_layers, experts.num_physical_experts), np.int64)

        def count(loads: np.ndarray) -> None:
            nonlocal totals
            totals += loads

        with self._shared.lock:
            if self._core is not None:
                if self._core.requests:
                    raise RequestError(
                        "expert_loads counts from an empty cache, and requests run on this LLM: wait for them"
                    )
                self._core.reset_prefix_cache()
            self._on_loads = count
        try:
            self._generate(prompts, params)
        finally:
            with self._shared.lock:
                self._on_loads = None
                if self._core is not None:
                    self._core.on_loads = None
        return experts.expert_loads(totals)

    @in_every_process(ResultCodecs.NOTHING)
    def place_experts(self, experts: ExpertPlacement) -> None:
        """Move and replicate experts according to a placement; running requests continue.

        No step is compiled again.

        Args:
            experts: The placement, as from parallel/eplb.py.

        Raises:
            ConfigError: If the placement does not match this model, or the model was loaded without redundant_experts.
        """
        with self._shared.lock:
            self._shared.executor.place_experts(experts)

    @contextmanager
    def trace(self, path: str | Path) -> Iterator[EngineTrace]:
        """Trace the steps and requests of generate and stream inside a with statement.

        Leaving the with statement writes the trace to `path` in Chrome's format (for ui.perfetto.dev), and an HTML page
        to the same path with the suffix .html.

        Args:
            path: The file to write.

        Yields:
            The trace.

        Raises:
            RequestError: If the path cannot be written. Raised on entry.
        """
        check_trace_path(path)
        trace = EngineTrace(trace_facts(self._runner))
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

    def _check_inputs(
        self, prompts: Iterable[Prompt], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[tuple[list[int], SamplingParams]]:
        inputs = check_inputs(prompts, params, tokenizer=self.tokenizer, config=self.config, eos=self.eos)
        core = self._core
        if self._shared.reserved and core is not None:
            for ids, p in inputs:
                core.check(len(ids), p)
        return inputs

    def _pool_for(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] = SamplingParams()
    ) -> tuple[int, int]:
        """Return the size of the KV cache that generate would allocate: its tokens over all ranks, bytes of a token."""
        scheduler_config = self._scheduler_config_for(self._check_inputs(prompts, params))
        return (
            scheduler_config.num_ranks * scheduler_config.num_pages * scheduler_config.page_size,
            self._runner.bytes_per_token,
        )

    def _scheduler_config_for(self, inputs: Sequence[tuple[Sequence[int], SamplingParams]]) -> SchedulerConfig:
        """Return a configuration that fits these requests and is at least as large as that of the current core."""
        fixed = self._fixed_core(inputs)
        if fixed is not None:
            return fixed.scheduler_config
        present = None if self._core is None or self._core.warmed_up else self._core.scheduler_config
        return size_for_requests(self._runner, inputs, max_num_seqs=self.engine_config.max_num_seqs, present=present)

    def _fixed_core(self, inputs: Sequence[tuple[Sequence[int], SamplingParams]]) -> EngineCore | None:
        return self._shared.fixed([(len(ids), p) for ids, p in inputs], max_num_seqs=self.engine_config.max_num_seqs)

    def _core_for(self, inputs: Sequence[tuple[Sequence[int], SamplingParams]]) -> EngineCore:
        """Return an engine core that fits these requests: the current one, or a larger one that replaces it."""
        core = self._fixed_core(inputs)
        if core is None:
            core = self._shared.fit(self._scheduler_config_for(inputs))
        if not self._shared.reserved or self._trace is not None:
            core.trace = self._trace
        core.on_loads = self._on_loads
        return core
