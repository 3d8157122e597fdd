"""Chats: strings exchanges together into conversations of one to four turns, some with a system message.

For corpus.py. The exchanges themselves come from questions.py.
"""

import random

from tools.demo_model import questions
from tools.demo_model.questions import Exchange
from tools.demo_model.templates import expand

Message = dict[str, str]

_SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are [a friendly|a kind|a helpful|a concise|an honest] [assistant|storyteller|AI assistant|model].",
    "[Answer briefly.|Be brief.|Be polite and helpful.|Answer in English.|Keep your answers short.]",
    "You are the demo model of Tandem. [Answer briefly.|Tell good stories.|]",
)


def write_chat(rng: random.Random) -> list[Message]:
    """One conversation."""
    turns = rng.choices((1, 2, 3, 4), (60, 20, 12, 8))[0]
    return _as_messages(rng, [_exchange(rng) for _ in range(turns)])


def write_story_chat(rng: random.Random) -> list[Message]:
    """A conversation that is one story told on request."""
    return _as_messages(rng, [questions.story(rng)])


def _exchange(rng: random.Random) -> Exchange:
    return questions.story(rng) if rng.random() < 0.06 else questions.short_exchange(rng)


def _as_messages(rng: random.Random, exchanges: list[Exchange]) -> list[Message]:
    messages = []
    if rng.random() < 0.35:
        messages.append({"role": "system", "content": expand(rng, rng.choice(_SYSTEM_MESSAGES))})
    for exchange in exchanges:
        messages.append({"role": "user", "content": exchange.user})
        messages.append({"role": "assistant", "content": exchange.assistant})
    return messages
