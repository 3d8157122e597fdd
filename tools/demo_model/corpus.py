"""The corpus: an endless, seeded stream of documents for the demo model, plain texts and chats mixed.

For tokenizer.py and train.py; run as a program, it prints a few documents for the eye.
The same seed gives the same documents. Nothing is read from disk or from the network.
"""

import random
import sys
from collections.abc import Callable, Iterator

from tools.demo_model import articles, chats, questions, stories
from tools.demo_model.chats import Message

Document = str | list[Message]


def _story(rng: random.Random) -> Document:
    return stories.tell(rng, stories.any_plot(rng))


def _story_from_the_middle(rng: random.Random) -> Document:
    return stories.tell_from_the_middle(rng, stories.any_plot(rng))


def _exchange_as_plain_text(rng: random.Random) -> Document:
    """Some people send a question where a text to continue is expected; they should get an answer too."""
    exchange = questions.story(rng) if rng.random() < 0.4 else questions.short_exchange(rng)
    form = rng.choice(("{0}\n{1}", "{0}\n\n{1}", "Question: {0}\nAnswer: {1}", "Q: {0}\nA: {1}"))
    return form.format(*exchange)


_WRITERS: tuple[tuple[Callable[[random.Random], Document], int], ...] = (
    (_story, 20), (_story_from_the_middle, 5), (articles.write_article, 20),
    (chats.write_story_chat, 24), (chats.write_chat, 40), (_exchange_as_plain_text, 4),
)  # fmt: skip


def documents(seed: int) -> Iterator[Document]:
    """Yield documents for ever."""
    rng = random.Random(seed)
    writers, weights = zip(*_WRITERS, strict=True)
    while True:
        yield rng.choices(writers, weights)[0](rng)


def plain_text(document: Document) -> str:
    """The words of a document without the marks of a chat."""
    if isinstance(document, str):
        return document
    return "\n".join(message["content"] for message in document)


def main() -> None:
    """Print twenty documents."""
    stream = documents(seed=int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    for _ in range(20):
        print(plain_text(next(stream)), end="\n\n")


if __name__ == "__main__":
    main()
