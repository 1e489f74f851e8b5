"""jaxmoe generate: complete prompts with a model."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jaxmoe.cli.options import ModelOptions, console, load_model, model_options, read_id_lines, start_jax
from jaxmoe.errors import RequestError
from jaxmoe.jsontext import json_text

if TYPE_CHECKING:
    from jaxmoe.engine.timing import StepClock

_DEMO_PROMPT = "def read_lines(path):\n"


@click.command()
@click.argument("model", required=False)
@click.option("--prompt", help="Text to complete.")
@click.option("--prompt-ids", metavar="FILE.jsonl", help="File of prompts, one JSON list of token ids per line.")
@click.option("--chat", is_flag=True, help="Apply the chat template to --prompt as a user message.")
@model_options
@click.option(
    "--max-tokens", type=int, default=128, show_default=True, help="Maximum number of tokens to generate per sample."
)
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="Sampling temperature. 0 decodes greedily."
)
@click.option("--top-k", type=int, default=0, help="Sample from the k most likely tokens. 0 or -1 means all.")
@click.option(
    "--top-p", type=float, default=1.0, help="Sample from the most likely tokens whose probabilities sum to this value."
)
@click.option(
    "--min-p",
    type=float,
    default=0.0,
    help="Drop tokens whose probability is below this fraction of the top probability.",
)
@click.option(
    "--seed",
    type=int,
    help="Seed of sampling, 64 bits. By default each request gets a random seed, which --json prints.",
)
@click.option("--stop", multiple=True, help="Stop at this text. Can be given several times.")
@click.option(
    "--stop-token-id",
    "stop_token_ids",
    type=int,
    multiple=True,
    help="Stop at this token id. Can be given several times.",
)
@click.option("--min-tokens", type=int, default=0, help="Minimum number of tokens to generate before a stop.")
@click.option("-n", "n", type=int, default=1, help="Number of samples per prompt.")
@click.option(
    "--repetition-penalty",
    type=float,
    default=1.0,
    help="Divide positive logits of tokens in the prompt or output by this value, and multiply negative ones.",
)
@click.option(
    "--presence-penalty",
    type=float,
    default=0.0,
    help="Subtract this value from the logits of tokens that occur in the output.",
)
@click.option(
    "--frequency-penalty",
    type=float,
    default=0.0,
    help="Subtract this value from the logits of a token for each of its occurrences in the output.",
)
@click.option(
    "--logit-bias",
    multiple=True,
    metavar="ID=BIAS",
    help="Add this bias to the logits of this token id. Can be given several times.",
)
@click.option(
    "--top-logprobs", type=int, default=0, help="Number of log-probabilities per token in the output of --json."
)
@click.option(
    "--trace",
    metavar="FILE.json",
    help="Write a trace of requests and steps for ui.perfetto.dev, and an HTML page with the same name.",
)
@click.option("--ignore-eos", is_flag=True, help="Continue past the model's end-of-sequence token.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object per request on standard output and nothing else."
)
def generate(
    model: str | None, prompt: str | None, prompt_ids: str | None, chat: bool, options: ModelOptions, as_json: bool,
    trace: str | None, logit_bias: tuple[str, ...], **sampling: Any,
) -> None:  # fmt: skip
    """Complete prompts with a model.

    MODEL is a checkpoint directory, a Hugging Face Hub id or a preset. It defaults to the model that is part of the
    package.
    """
    from jaxmoe.engine.request import SamplingParams
    from jaxmoe.engine.trace import check_trace_path

    params = SamplingParams(logit_bias=_read_biases(logit_bias), **sampling)
    if trace is not None:
        check_trace_path(trace)
    if prompt is not None and prompt_ids is not None:
        raise RequestError("--prompt and --prompt-ids were both given: give one")
    if chat and prompt is None:
        raise RequestError("--chat needs --prompt")
    if prompt is None and prompt_ids is None:
        if model is not None:
            raise RequestError("no prompt: give --prompt TEXT or --prompt-ids FILE.jsonl")
        prompt = _DEMO_PROMPT
    rows = read_id_lines(prompt_ids) if prompt_ids is not None else None
    if prompt == "":
        raise RequestError("the prompt is empty: give at least one character")
    start_jax(options.devices)
    llm = load_model(model, options, quiet=as_json)
    if chat:
        rows = [llm.chat_prompt([{"role": "user", "content": prompt or ""}])]
    prompts: list[Any] = rows if rows is not None else [prompt]
    with nullcontext() if trace is None else llm.trace(trace):
        if as_json:
            for output in llm.generate(prompts, params):
                print(json_text(_as_json(output)), flush=True)
        else:
            _stream_to_terminal(llm, prompts, params)
    if trace is not None:
        page = Path(trace).with_suffix(".html")
        console.print(f"[dim]the trace is in {trace} (for ui.perfetto.dev) and {page}[/dim]")


def _read_biases(pairs: tuple[str, ...]) -> dict[int, float]:
    """Parse biases from "ID=BIAS" pairs. Raises: RequestError naming the first malformed pair."""
    biases = {}
    for pair in pairs:
        token, _, bias = pair.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise RequestError(f"--logit-bias {pair!r} must read ID=BIAS, as in 42=-5.0") from None
    return biases


def _as_json(output: Any) -> dict[str, Any]:
    outputs = [
        {
            "text": completion.text, "token_ids": completion.token_ids, "logprobs": completion.logprobs,
            "finish_reason": completion.finish_reason, "seed": completion.seed,
        }
        | ({"top_logprobs": completion.top_logprobs} if completion.top_logprobs else {})
        for completion in output.outputs
    ]  # fmt: skip
    first = {"index": output.index, **outputs[0], "num_prompt_tokens": len(output.prompt_token_ids)}
    return first | ({"outputs": outputs} if len(outputs) > 1 else {})


def _stream_to_terminal(llm: Any, prompts: list[Any], params: Any) -> None:
    """Stream the completion of a single prompt, or print several completions in full. Rates go to standard error."""
    from jaxmoe.parallel.mesh import describe

    single = len(prompts) == 1 and params.n == 1
    events = llm.stream(prompts, params)
    tokens, num_bytes = llm._pool_for(prompts, params)
    pool = f"pages for {tokens} tokens of {num_bytes} bytes ({tokens * num_bytes / 2**20:.1f} MiB)"
    console.print(f"[dim]{describe(llm.mesh)}, {llm._runner.dtype}; {pool}; compiling (cached for next time)...[/dim]")
    if single and isinstance(prompts[0], str):
        print(prompts[0], end="", flush=True)
    texts: dict[tuple[int, int], str] = {}
    ids: dict[tuple[int, int], list[int]] = {}
    seeds: dict[int, int] = {}  # seed of each prompt's first sample, if tokens are sampled
    for event in events:
        which = (event.index, event.sample)
        if params.temperature > 0 and event.sample == 0:
            seeds[event.index] = event.seed
        texts[which] = texts.get(which, "") + event.text
        ids.setdefault(which, []).append(event.token_id)
        shown = event.text if llm.tokenizer else f"{event.token_id} "
        if single:
            print(shown, end="", flush=True)
    if single:
        print()
    else:
        for index, sample in sorted(ids):
            name = f"{index}" if params.n == 1 else f"{index}.{sample}"
            print(f"[{name}] {texts[index, sample] if llm.tokenizer else ids[index, sample]}")
    rates = _rates(llm.timing, sum(map(len, ids.values())))
    console.print(f"[dim]{rates}{_seeds(list(seeds.values()))}[/dim]", soft_wrap=True)


def _seeds(seeds: list[int]) -> str:
    """Format the seeds that reproduce these completions with --seed, for the terminal."""
    if not seeds:
        return ""
    shown = ", ".join(map(str, dict.fromkeys(seeds[:4]))) + (", ... (--json gives all)" if len(seeds) > 4 else "")
    return f"; seed{'s' if len(set(seeds)) > 1 else ''} {shown}"


def _rates(timing: StepClock, num_new: int) -> str:
    """Format tokens and tokens/s of prompts and completions, and the compile time, for the terminal."""

    def rate(tok_s: float | None) -> str:
        return "" if tok_s is None else f" at {tok_s:.1f} tokens/s"

    return (
        f"{timing.num_prompt_tokens} prompt tokens{rate(timing.prompt_tok_s)}, {num_new} new tokens"
        f"{rate(timing.decode_tok_s)}; compiling took {timing.compile_s:.1f} s"
    )
