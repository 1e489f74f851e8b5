"""jaxmoe generate: complete prompts."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from jaxmoe.cli.options import ModelOptions, console, load_model, model_options, read_id_lines, start_jax
from jaxmoe.errors import RequestError

_DEMO_PROMPT = "def read_lines(path):\n"


@click.command()
@click.argument("model", required=False)
@click.option("--prompt", help="text to go on from")
@click.option("--prompt-ids", metavar="FILE.jsonl", help="prompts as one JSON list of token ids a line")
@click.option("--chat", is_flag=True, help="treat --prompt as a user's message and apply the chat template")
@model_options
@click.option("--max-tokens", type=int, default=128, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy")
@click.option("--top-k", type=int, default=0, help="draw from the k likeliest tokens; 0 for all")
@click.option("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that make up this probability")
@click.option("--min-p", type=float, default=0.0, help="leave out tokens below this share of the likeliest one")
@click.option("--seed", type=int, default=0)
@click.option("--stop", multiple=True, help="end at this text (may be given several times)")
@click.option("--ignore-eos", is_flag=True, help="go on past the model's end token")
@click.option("--json", "as_json", is_flag=True, help="one JSON object a request on standard output, nothing else")
def generate(
    model: str | None, prompt: str | None, prompt_ids: str | None, chat: bool, options: ModelOptions, as_json: bool,
    **sampling: Any,
) -> None:  # fmt: skip
    """Complete prompts with MODEL: a checkpoint directory, a hub id or a preset; without it the embedded default."""
    from jaxmoe.engine.request import SamplingParams

    params = SamplingParams(**sampling)
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
    if as_json:
        for output in llm.generate(prompts, params):
            print(json.dumps(_as_json(output)), flush=True)
        return
    _stream_to_terminal(llm, prompts, params)


def _as_json(output: Any) -> dict[str, Any]:
    return {
        "index": output.index, "text": output.text, "token_ids": output.token_ids, "logprobs": output.logprobs,
        "finish_reason": output.finish_reason, "num_prompt_tokens": len(output.prompt_token_ids),
    }  # fmt: skip


def _stream_to_terminal(llm: Any, prompts: list[Any], params: Any) -> None:
    """One prompt streams as it comes; several are printed each as a whole. Rates go to standard error."""
    from jaxmoe.mesh import describe

    single = len(prompts) == 1
    chunks = llm.stream(prompts, params)
    console.print(f"[dim]{describe(llm.mesh)}, {llm.runner.dtype}; compiling (kept for next time)...[/dim]")
    started = time.perf_counter()
    if single and isinstance(prompts[0], str):
        print(prompts[0], end="", flush=True)
    texts: dict[int, str] = {}
    ids: dict[int, list[int]] = {}
    first_at = last_at = started
    count = 0
    for chunk in chunks:
        last_at = time.perf_counter()
        first_at = last_at if count == 0 else first_at
        count += 1
        texts[chunk.index] = texts.get(chunk.index, "") + chunk.text
        ids.setdefault(chunk.index, []).append(chunk.token_id)
        shown = chunk.text if llm.tokenizer else f"{chunk.token_id} "
        if single:
            print(shown, end="", flush=True)
    if single:
        print()
    else:
        for index in range(len(prompts)):
            print(f"[{index}] {texts[index] if llm.tokenizer else ids[index]}")
    rest = count - len(prompts)
    rate = f", then {rest / (last_at - first_at):.1f} tokens/s" if rest > 0 and last_at > first_at else ""
    console.print(f"[dim]{count} tokens; first after {first_at - started:.1f} s (compiling included){rate}[/dim]")
