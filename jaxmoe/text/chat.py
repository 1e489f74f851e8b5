"""Chat templates of a checkpoint: reading and rendering them, compatible with transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxmoe.errors import CheckpointError, RequestError
from jaxmoe.weights.checkpoint import read_json
from jaxmoe.weights.manifest import CHAT_TEMPLATES

Message = Mapping[str, Any]
DEFAULT, _WITH_TOOLS = "default", "tool_use"
_BESIDE, _OF_PROCESSOR = "chat_template.jinja", "chat_template.json"


def read_templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates of a checkpoint directory by name. The default template is named "default".

    Template files (chat_template.jinja, additional_chat_templates/NAME.jinja) take precedence over the templates of
    tokenizer_config.json (settings), and these over the template of chat_template.json.
    Raises: CheckpointError if a template is not readable text.
    """
    files = {DEFAULT: directory / _BESIDE} if (directory / _BESIDE).is_file() else {}
    files |= {path.stem: path for path in sorted((directory / CHAT_TEMPLATES).glob("*.jinja")) if path.is_file()}
    if files:
        return {name: _read_text(path) for name, path in files.items()}
    template, where = settings.get("chat_template"), "tokenizer_config.json"
    if template is None:
        template, where = read_json(directory / _OF_PROCESSOR, required=False).get("chat_template"), _OF_PROCESSOR
    if template is None:
        return {}
    pairs: list[tuple[Any, Any]]
    if isinstance(template, list) and all(isinstance(one, Mapping) for one in template):
        pairs = [(one.get("name"), one.get("template")) for one in template]
    else:
        pairs = list(template.items()) if isinstance(template, Mapping) else [(DEFAULT, template)]
    if wrong := [pair for pair in pairs if not all(isinstance(text, str) for text in pair)]:
        raise CheckpointError(
            f"{directory / where} has a chat_template that is not text: {wrong[0][1]!r:.60} named {wrong[0][0]!r:.60}; "
            f"fetch it again"
        )
    return dict(pairs)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not readable text: {error}; fetch it again") from error


def render(
    templates: Mapping[str, str], messages: Sequence[Message], *, variables: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:  # fmt: skip
    """Render a conversation into a prompt that ends where the assistant's answer begins.

    templates: chat templates by name. With tools (JSON schemas), the template "tool_use" is used if it exists.
    variables: further variables of the template, for example bos_token. A message's content is text, or a list of parts
    {"type": "text", "text": ...}. If the template does not support lists, their parts are joined by line breaks.
    Raises: RequestError if there is no template, or the template rejects the messages.
    """
    template = _compiled(_choose(templates, tools))
    messages = _checked(messages)

    def rendered(messages: list[dict[str, Any]]) -> str:
        return template.render(
            messages=messages, add_generation_prompt=True, tools=None if tools is None else list(tools),
            documents=None, **variables,
        )  # fmt: skip

    listed = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    try:
        text = rendered(messages)
        if _has_all(text, listed):
            return text
    except Exception as error:  # the template is third-party code and may raise any exception
        if not listed:
            raise RequestError(f"the chat template refused the messages: {error}") from error
    try:
        return rendered([_with_joined_parts(message) for message in messages])
    except Exception as error:
        raise RequestError(f"the chat template refused the messages: {error}") from error


def _choose(templates: Mapping[str, str], tools: Sequence[Mapping[str, Any]] | None) -> str:
    if not templates:
        raise RequestError("this model has no chat template: pass plain prompts")
    name = _WITH_TOOLS if tools is not None and _WITH_TOOLS in templates else DEFAULT
    if name not in templates:
        raise RequestError(
            f"this model has several chat templates ({', '.join(sorted(templates))}) and no default: render "
            f"one of them and pass the text as a plain prompt"
        )
    return templates[name]


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages without keys whose value is None. Raises: RequestError for an invalid conversation."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise RequestError(f"messages must be a list of at least one message, not {messages!r:.60}")
    for at, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f"message {at} is {message!r:.60}; it must be a mapping with role and content")
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        for part in parts:
            if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise RequestError(
                    f"message {at} has a content part {part!r:.60}; only {{'type': 'text', 'text': ...}} is supported"
                )
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _has_all(text: str, listed: Sequence[list[Mapping[str, str]]]) -> bool:
    """Return whether a rendered prompt contains the text of every content part, and no content as a printed list."""
    texts = all(part["text"].strip() in text for content in listed for part in content)
    return texts and not any(str(content) in text for content in listed if content)


def _with_joined_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return message | {"content": "\n".join(part["text"] for part in content)}


class _GenerationTag(Extension):
    """Render the body of {% generation %} ... {% endgeneration %}, which marks the assistant's text for training."""

    tags = {"generation"}  # noqa: RUF012 (as the base class declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the statements inside the block, in a scope of their own as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [nodes.Scope(body, lineno=line)]


@lru_cache(maxsize=64)
def _compiled(text: str) -> Template:
    """Compile a template. Raises: RequestError if its syntax is invalid."""
    environment: Environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    # Published templates expect these functions and this filter.
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(text)
    except Exception as error:  # the template is third-party code
        raise RequestError(f"the chat template is not readable: {error}") from error


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | str | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    """Serialize a value to JSON without HTML escapes, with arguments that jinja2's own filter does not take."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
