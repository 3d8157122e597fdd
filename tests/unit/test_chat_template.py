"""The model's chat template: the same text as transformers', for many styles, and what becomes of bad ones."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from protocol.errors import ConfigError
from router.front.chat_template import ChatTemplate, load_chat_template
from router.front.errors import ApiError
from router.front.text import load_text
from tests.integration.router_process import MAX_CONTEXT, VOCAB_SIZE, write_model

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
STYLES = {
    "turns": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "training marks": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}\n  A: {{ m['content'] }}{% set x = 1 %}{{ eos_token }}\n{%- endgeneration %}"
    "{% else %}Q: {{ m['content'] | trim }}{% endif %}{{ x is defined }}{% endfor %}",
    "a system before": "{% if messages[0].role == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = messages[0].content %}{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
    "{% for m in loop_messages %}[{{ loop.index0 }}]{{ (system + m.content).strip() if loop.first else m.content }}"
    "{% endfor %}",
    "namespaces": "{% set ns = namespace(last=-1, text='') %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% set ns.text = ns.text ~ m.content[:3] %}{% endfor %}"
    "{{ ns.last }}{{ ns.text }}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}"
    "{{ dict(b=1, a='<é>') | tojson(sort_keys=true) }}"
    "{{ [1, 'é'] | tojson(ensure_ascii=true, separators=(',', ':')) }}",
    "no tools": "{% if tools is not none %}tools{% endif %}{% if documents %}documents{% endif %}"
    "{% if tools is defined and tools %}more{% endif %}{{ messages | length }}",
    "filters": "{{ messages | map(attribute='role') | join(',') }}{{ (messages | selectattr('role', 'equalto', 'user') "
    "| list)[-1].content | upper }}{{ messages[-1]['content'] | replace('a', 'b') | title }}{{ messages[1:] | first }}",
    "macros": "{% macro turn(role, text) %}<{{ role }}>{{ text }}{% endmacro %}{% for m in messages %}"
    "{{- turn(m.role, m.content) -}}  \n {% endfor %}",
    "white space": "  {% for m in messages %}\n    {%- if true %}\n"
    "    {{ m.content }}  \n  {% endif %}\n  {% endfor %}\n x ",
    "methods": "{% for m in messages %}{{ m.content.split('a')[-1].lstrip('\n') }}{{ m.get('name', 'nobody') }}"
    "{% for key, value in m.items() %}{{ key }}{{ value.startswith('H') }}{% endfor %}{% endfor %}",
    "the date": "{{ strftime_now('%Y') }}{{ pad_token }}{{ cls_token is defined }}{{ range(3) | list }}",
    "thinking": "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "{% for m in messages %}{{ m.reasoning_content or '' }}{{ m.content }}{% endfor %}",
}
MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Halló <b>\n"},
    {"role": "assistant", "content": "What a day.", "reasoning_content": "hm"},
    {"role": "user", "content": 'And "now"? '},
]


def theirs(template: str, messages: list[dict[str, str]], **more: Any) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **TOKENS)
    more = {"add_generation_prompt": True} | more
    return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **more))


@pytest.mark.parametrize("style", STYLES)
def test_a_template_gives_the_text_that_transformers_gives(style: str) -> None:
    source = STYLES[style]
    ours = ChatTemplate(source, TOKENS)
    for messages in (MESSAGES, MESSAGES[1:], MESSAGES[1:2]):
        assert ours.render(messages) == theirs(source, messages)
        closed = ours.render(messages, has_opening=False)
        assert closed == theirs(source, messages, add_generation_prompt=False)
    thinking = {"enable_thinking": False}
    assert ours.render(MESSAGES, thinking) == theirs(source, MESSAGES, **thinking)


@pytest.mark.parametrize("style", ["turns", "training marks", "macros", "white space"])
@pytest.mark.parametrize("content", ["Once", "Once upon ", " a\n"])
def test_an_unfinished_message_is_continued_where_transformers_does(style: str, content: str) -> None:
    for role in ("assistant", "user"):
        messages = [*MESSAGES[:2], {"role": role, "content": content}]
        wanted = theirs(STYLES[style], messages, add_generation_prompt=False, continue_final_message=True)
        assert ChatTemplate(STYLES[style], TOKENS).render_unfinished(messages) == wanted


def test_what_cannot_be_continued_is_refused() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    for messages, complaint in (
        ([*MESSAGES[1:2], {"role": "assistant", "content": ""}], "nothing to continue"),
        (MESSAGES[1:3], "leaves out the end"),
    ):
        with pytest.raises(ValueError, match=complaint):
            template.render_unfinished(messages)


def test_a_request_may_set_what_a_template_leaves_open_and_nothing_else() -> None:
    assert ChatTemplate(STYLES["thinking"], TOKENS).variables == {"enable_thinking"}
    assert ChatTemplate(STYLES["turns"] + "{{ strftime_now('%Y') }}{{ tools }}", TOKENS).variables == set()


@pytest.mark.parametrize("source", ["{% for %}", "{{ 1 | nosuchfilter }}", "{% generation %}", "{% nosuchtag %}"])
def test_a_template_that_does_not_compile_costs_chat_and_not_the_router(source: str, tmp_path: Path, caplog) -> None:
    folder = write_model(tmp_path)
    (folder / "chat_template.jinja").write_text(source)
    with pytest.raises(ConfigError, match="does not compile"):
        load_chat_template(folder)
    text = load_text(folder, MAX_CONTEXT, VOCAB_SIZE)
    assert asyncio.run(text.encode("one", "prompt"))
    with pytest.raises(ApiError, match="template does not compile") as caught:
        asyncio.run(text.render(MESSAGES, {}))
    assert caught.value.status == 400
    assert "chat is not served" in caplog.text


def test_special_tokens_come_from_either_file(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<a>", "eos_token": {"content": "<b>"}}))
    config = {"eos_token": "<c>", "chat_template": "{{ bos_token }}{{ eos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = load_chat_template(tmp_path)
    assert template is not None
    assert template.render(MESSAGES) == "<a><c>"


def test_chat_templates_run_in_a_sandbox_and_their_complaints_are_errors() -> None:
    assert (
        ChatTemplate("{{ bos_token }}{{ messages[0].content }}", {"bos_token": "<s>"}).render(
            [{"role": "user", "content": "hi"}]
        )
        == "<s>hi"
    )
    for source in (
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].content.no.such }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content }}",
        "{{ range(10 ** 9) | list }}",
    ):
        with pytest.raises(ValueError, match="does not accept these messages"):
            ChatTemplate(source, {}).render([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("test", ["message.role == 'system'", "message['role'] in ['system']"])
def test_what_a_developer_says_is_the_systems_where_the_template_has_no_developer(test: str) -> None:
    body = "{% for message in messages %}{% if TEST %}<{{ message.role }}>{{ message.content }}{% endif %}{% endfor %}"
    messages = [{"role": "developer", "content": "Be brief."}]
    assert ChatTemplate(body.replace("TEST", test), {}).render(messages) == "<system>Be brief."
    own = ChatTemplate(body.replace("TEST", test + ' or message.role == "developer"'), {})
    assert own.render(messages) == "<developer>Be brief."


@pytest.mark.parametrize("template", [7, {"a": 1}, ["x"], [{"name": "default"}], [{"name": "default", "template": 7}]])
def test_what_is_no_chat_template_is_refused_in_a_sentence(template: object, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(ConfigError, match="has for a chat template is none"):
        load_chat_template(tmp_path)


def test_a_chat_template_that_is_no_text_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="has for a chat template is none"):
        load_chat_template(tmp_path)
