"""Chat templates: where they are found, and what they may use; tests/oracle renders the same with transformers."""

from __future__ import annotations

import json
from datetime import datetime

import pytest

from jaxmoe.errors import CheckpointError, RequestError
from jaxmoe.text.chat import read_templates, render

USER = [{"role": "user", "content": "hi <b> ü"}]
LOOP = "{% for m in messages %}"
# template, and the prompt for USER
RENDERED = {
    "{% generation %}": (
        LOOP + "<{% generation %}{% set x = 1 %}{{ m.content }}{% endgeneration %}{{ x }}>{% endfor %}", "<hi <b> ü>",
    ),
    "{%- generation -%}": (LOOP + "< {%- generation -%} {{ m.role }} {%- endgeneration -%} >{% endfor %}", "<user>"),
    "generation in a condition": (
        "{% if add_generation_prompt %}{% generation %}a{% endgeneration %}{% endif %}{{ tools }}{{ documents }}",
        "aNoneNone",
    ),
    "tojson": ("{{ messages | tojson }}", '[{"role": "user", "content": "hi <b> ü"}]'),
    "tojson, ensure_ascii": ("{{ 'ü' | tojson(ensure_ascii=True) }}{{ 'ü' | tojson(true) }}", r'"\u00fc""\u00fc"'),
    "tojson, indent": ("{{ [1] | tojson(indent=2) }}{{ [1] | tojson(false, 1) }}", "[\n  1\n][\n 1\n]"),
    "tojson, separators": ("{{ {'a': [1, 2]} | tojson(separators=(',', ':')) }}", '{"a":[1,2]}'),
    "tojson, sort_keys": ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=True) }}", '{"a": 2, "b": 1}'),
    "loop controls": ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
    "namespaces": ("{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}{{ dict(a=1).a }}", "21"),
    "special tokens": ("{{ bos_token }}{{ sep_token }}{{ cls_token }}{{ mask_token }}{{ image_token }}", "<s>|CMI"),
}  # fmt: skip
TOKENS = {"bos_token": "<s>", "sep_token": "|", "cls_token": "C", "mask_token": "M", "image_token": "I"}


@pytest.mark.parametrize(("template", "text"), RENDERED.values(), ids=RENDERED)
def test_a_template_renders_as_in_transformers(template, text):
    assert render({"default": template}, USER, variables=TOKENS) == text


def test_the_date_of_today_is_there():
    assert render({"default": "{{ strftime_now('%Y') }}"}, USER, variables={}) in {
        str(datetime.now().year), str(datetime.now().year - 1),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (LOOP + "{{ '<' + m.content + '>' }}{% endfor %}", "<one\ntwo><three>"),
        (LOOP + "<{{ m.content | trim }}>{% endfor %}", "<one\ntwo><three>"),
        (LOOP + "<{% if m.content is string %}{{ m.content }}{% endif %}>{% endfor %}", "<one\ntwo><three>"),
        (
            LOOP + "<{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}[{{ p.text }}]"
            "{% endfor %}{% endif %}>{% endfor %}",
            "<[one][two]><three>",
        ),
    ],
)
def test_content_may_be_a_list_of_text_parts(template, text):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "three", "tool_calls": None}]
    assert render({"default": template}, messages, variables={}) == text


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("hi", "at least one message"),
        (["hi"], "message 0 is 'hi'"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "message 0 has a content part .*only"),
    ],
)
def test_what_is_no_conversation_of_texts_is_refused(messages, message):
    with pytest.raises(RequestError, match=message):
        render({"default": "x"}, messages, variables={})


def test_a_conversation_with_tools_takes_the_template_for_them():
    templates, tools = {"default": "plain", "tool_use": "{{ tools | tojson }}"}, [{"name": "f"}]
    assert render(templates, USER, variables={}) == "plain"
    assert render(templates, USER, variables={}, tools=tools) == '[{"name": "f"}]'
    assert render({"default": "{{ tools[0].name }}"}, USER, variables={}, tools=tools) == "f"
    with pytest.raises(RequestError, match=r"several chat templates \(rag, tool_use\) and no default"):
        render({"tool_use": "x", "rag": "y"}, USER, variables={})


# files besides tokenizer_config.json, its chat_template, and the templates found
NAMED = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
FOUND = {
    "in the config": ({}, "C", {"default": "C"}),
    "several in the config": ({}, NAMED, {"default": "D", "tool_use": "T"}),
    "a file": ({"chat_template.jinja": "F"}, NAMED, {"default": "F"}),
    "files": (
        {"chat_template.jinja": "F", "additional_chat_templates/rag.jinja": "R"}, "C", {"default": "F", "rag": "R"},
    ),
    "files without a default": ({"additional_chat_templates/rag.jinja": "R"}, "C", {"rag": "R"}),
    "of a processor": ({"chat_template.json": json.dumps({"chat_template": "P"})}, None, {"default": "P"}),
    "of a processor, behind the config": (
        {"chat_template.json": json.dumps({"chat_template": "P"})}, "C", {"default": "C"},
    ),
    "none": ({}, None, {}),
}  # fmt: skip


@pytest.mark.parametrize(("files", "template", "found"), FOUND.values(), ids=FOUND)
def test_templates_are_found_in_every_file(files, template, found, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_templates(tmp_path, {} if template is None else {"chat_template": template}) == found


@pytest.mark.parametrize("template", [3, [{"name": "default"}], [NAMED], {"default": 1}])
def test_a_template_that_is_no_text_is_refused(template, tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json has a chat_template that is not text"):
        read_templates(tmp_path, {"chat_template": template})
