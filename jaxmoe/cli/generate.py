"""jaxmoe generate: complete prompts."""

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
@click.option("--prompt", help="text to go on from")
@click.option("--prompt-ids", metavar="FILE.jsonl", help="prompts as one JSON list of token ids a line")
@click.option("--chat", is_flag=True, help="treat --prompt as a user's message and apply the chat template")
@model_options
@click.option("--max-tokens", type=int, default=128, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy")
@click.option("--top-k", type=int, default=0, help="draw from the k likeliest tokens; 0 or -1 for all")
@click.option("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that make up this probability")
@click.option("--min-p", type=float, default=0.0, help="drop tokens below this fraction of the top probability")
@click.option("--seed", type=int, help="of the draws, 64 bits; drawn anew by default, and printed with --json")
@click.option("--stop", multiple=True, help="end at this text (may be given several times)")
@click.option("--stop-token-id", "stop_token_ids", type=int, multiple=True, help="end at this token (several times)")
@click.option("--min-tokens", type=int, default=0, help="no end before so many tokens")
@click.option("-n", "n", type=int, default=1, help="samples of each prompt")
@click.option("--repetition-penalty", type=float, default=1.0, help="divides the logits of tokens seen before")
@click.option("--presence-penalty", type=float, default=0.0, help="taken from the logits of tokens in the answer")
@click.option("--frequency-penalty", type=float, default=0.0, help="penalty per occurrence in the output")
@click.option("--logit-bias", multiple=True, metavar="ID=BIAS", help="added to a token's logits (several times)")
@click.option("--top-logprobs", type=int, default=0, help="with --json: number of log-probabilities per token")
@click.option("--trace", metavar="FILE.json", help="write what happened, for ui.perfetto.dev, and a page beside it")
@click.option("--ignore-eos", is_flag=True, help="go on past the model's end token")
@click.option("--json", "as_json", is_flag=True, help="one JSON object a request on standard output, nothing else")
def generate(
    model: str | None, prompt: str | None, prompt_ids: str | None, chat: bool, options: ModelOptions, as_json: bool,
    trace: str | None, logit_bias: tuple[str, ...], **sampling: Any,
) -> None:  # fmt: skip
    """Complete prompts with MODEL: a checkpoint directory, a hub id or a preset; without it the embedded default."""
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
        console.print(f"[dim]what happened is in {trace} (for ui.perfetto.dev) and {page}[/dim]")


def _read_biases(pairs: tuple[str, ...]) -> dict[int, float]:
    """Biases from "ID=BIAS". Raises: RequestError naming the one that does not read so."""
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
    """One prompt streams as it comes; several are printed each as a whole. Rates go to standard error."""
    from jaxmoe.parallel.mesh import describe

    single = len(prompts) == 1 and params.n == 1
    events = llm.stream(prompts, params)
    tokens, num_bytes = llm.pool_for(prompts, params)
    pool = f"pages for {tokens} tokens of {num_bytes} bytes ({tokens * num_bytes / 2**20:.1f} MiB)"
    console.print(f"[dim]{describe(llm.mesh)}, {llm.runner.dtype}; {pool}; compiling (kept for next time)...[/dim]")
    if single and isinstance(prompts[0], str):
        print(prompts[0], end="", flush=True)
    texts: dict[tuple[int, int], str] = {}
    ids: dict[tuple[int, int], list[int]] = {}
    seeds: dict[int, int] = {}  # of each prompt's first sample, where tokens are drawn
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
    """Return the seeds that --seed takes to draw these answers again, for people."""
    if not seeds:
        return ""
    shown = ", ".join(map(str, dict.fromkeys(seeds[:4]))) + (", ... (--json gives all)" if len(seeds) > 4 else "")
    return f"; seed{'s' if len(set(seeds)) > 1 else ''} {shown}"


def _rates(timing: StepClock, num_new: int) -> str:
    """Return tokens and tokens/s of prompts and of answers, and how long compiling took, for people."""

    def rate(tok_s: float | None) -> str:
        return "" if tok_s is None else f" at {tok_s:.1f} tokens/s"

    return (
        f"{timing.num_prompt_tokens} prompt tokens{rate(timing.prompt_tok_s)}, {num_new} new tokens"
        f"{rate(timing.decode_tok_s)}; compiling took {timing.compile_s:.1f} s"
    )
