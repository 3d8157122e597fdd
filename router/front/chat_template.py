"""A model's chat template: messages to the text of a prompt.

Templates come with the model, so they run in Jinja's immutable sandbox; clients can neither send nor steer them.
Used by text.py. The names that templates rely on (raise_exception, strftime_now) are Hugging Face's.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from protocol.errors import ConfigError

ChatTurn = Mapping[str, Any]


class ChatTemplate:
    """One compiled template with the model's special tokens."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the model's chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens)
        self._knows_developer = bool(re.search(r"""["']developer["']""", source))

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt up to where the assistant speaks. Raise ValueError when the template refuses messages.

        What a developer says goes in as the system's where the template has no place for it: most would drop it.
        """
        if not self._knows_developer:
            messages = [{**said, "role": "system"} if said["role"] == "developer" else said for said in messages]
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special_tokens)
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"the model's chat template does not accept these messages: {error}") from error


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """Return the template of a model folder, or None when it has none. Raise ConfigError when it is broken."""
    config = _read_config(folder / "tokenizer_config.json")
    try:
        source = _source(folder, config)
        return ChatTemplate(source, _special_tokens(config)) if source else None
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
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """A special token is written as a string, or as an object with its content."""
    found = {name: config.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
