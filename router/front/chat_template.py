"""A model's chat template: messages to the text of a prompt.

Templates come with the model, so they run in Jinja's immutable sandbox; clients cannot send any, only set those of a
template's variables that it leaves to them. Used by text.py, and by `tandem check`. What compiles for Hugging Face's
transformers compiles here, with the same text: tests/unit/test_chat_template.py compares.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from protocol.errors import ConfigError

ChatTurn = Mapping[str, Any]

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
OURS = frozenset({*SPECIAL_TOKENS, "messages", "tools", "documents", "add_generation_prompt"})
"""Variables that are not a client's to set by name."""

END_MARK = "\ue000 "
"""Stands where a message is to be continued; a private character, and a space that tells whether the template trims."""


class GenerationTag(Extension):
    """{% generation %}: for training it marks what the assistant said; a prompt has what stands inside."""

    tags = {"generation"}  # noqa: RUF012 (as jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class ChatTemplate:
    """One compiled template with the model's special tokens. variables: those that a request may set."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raise ConfigError when source does not compile."""
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self.variables = frozenset(meta.find_undeclared_variables(environment.parse(source))) - OURS
        except (jinja2.TemplateError, SyntaxError, RecursionError) as error:
            raise ConfigError(f"the model's chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens)
        self._knows_developer = bool(re.search(r"""["']developer["']""", source))

    def render(
        self, messages: Sequence[ChatTurn], variables: Mapping[str, Any] | None = None, has_opening: bool = True
    ) -> str:
        """Return the prompt; with has_opening, up to where the assistant speaks. Raise ValueError when it cannot be."""
        turns = [self._turn(message) for message in messages]
        given = {"messages": turns, "tools": None, "documents": None, "add_generation_prompt": has_opening}
        with _as_value_error():
            return self._template.render(**self._special_tokens, **(variables or {}), **given)

    def render_unfinished(self, messages: Sequence[ChatTurn], variables: Mapping[str, Any] | None = None) -> str:
        """Return the prompt up to the end of what the last message says. Raise ValueError when it cannot be."""
        *earlier, last = messages
        if not last["content"]:
            raise ValueError("there is nothing to continue in the last message")
        marked = self.render([*earlier, {**last, "content": last["content"] + END_MARK}], variables, has_opening=False)
        text, mark, rest = marked.rpartition(END_MARK[0])
        if not mark:
            raise ValueError("the model's chat template leaves out the end of the last message")
        return text if rest.startswith(END_MARK[1:]) else text.rstrip()

    def _turn(self, message: ChatTurn) -> ChatTurn:
        """Say what a developer says as the system where the template has no place for it: most would drop it.

        What was thought has two names, of which a template reads one.
        """
        role = "system" if message["role"] == "developer" and not self._knows_developer else message["role"]
        thought = {"thinking": message["reasoning_content"]} if "reasoning_content" in message else {}
        return {**thought, **message, "role": role}


@contextmanager
def _as_value_error() -> Iterator[None]:
    """A template is the model's program, which may fail at anything that is not as it expects."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"the model's chat template does not accept these messages: {error}") from error


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """Return the template of a model folder, or None when it has none. Raise ConfigError when it is broken."""
    config = _read_config(folder / "tokenizer_config.json")
    tokens = _special_tokens(_read_config(folder / "special_tokens_map.json") | config)
    try:
        source = _source(folder, config)
        return ChatTemplate(source, tokens) if source else None
    except (TypeError, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise ConfigError(f"what {folder} has for a chat template is none: {error}") from None


def _source(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
    if isinstance(source, list):  # several named ones
        source = next((item["template"] for item in source if item.get("name") == "default"), None)
    return source


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """A special token is written as a string, or as an object with its content."""
    found = {name: config.get(name) for name in SPECIAL_TOKENS}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
