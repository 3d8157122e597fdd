"""Questions and answers: builds one exchange between a user and the demo model.

For chats.py, which strings exchanges together. Stories come from stories.py, facts from facts.py.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from tools.demo_model import facts, stories, world
from tools.demo_model.plot import Plot
from tools.demo_model.templates import expand, fill, polish


class Exchange(NamedTuple):
    """What the user says and what the model answers."""

    user: str
    assistant: str


_GREETINGS = (
    "[Hello|Hi|Hey|Good morning|Good evening|Hello there|Hi there|hello|hi|Greetings][!|.||]",
    "[Hello|Hi|Hey]! [How are you?|Nice to meet you.|I am new here.]",
)
_GREETING_ANSWER = "[Hello|Hi|Good day]! [How can I help you?|What can I do for you?|Would you like to hear a story?]"
_FAREWELLS = "[Thank you|Thanks|Thank you very much|Thanks a lot|Great|Goodbye|Bye|Good night|See you later][!|.|]"
_FAREWELL_ANSWER = "[You are welcome!|It was a pleasure.|Come back soon!|I was glad to help.] [Have a good day.|]"
_STORY_REQUESTS = (
    "[Tell me|Write|Write me|Please tell me|Can you tell me|Could you write|Tell us|I would like to hear|Give me] "
    "[a|a|a short|a little|a bedtime] story about {subject}[.|.||!|?]"
)
_OPEN_STORY_REQUESTS = (
    "[Tell me|Write|Write me|Please tell me|Can you tell me|I want] [a story|a short story|a bedtime story|another "
    "story][.|.||!|?]"
)
# fmt: off
_SUBJECTS = (
    "a {kind}", "a {kind}", "a {kind}", "a {kind}", "a {kind}", "a {trait} {kind}", "the {kind}",
    "a {kind} [named|called] {hero}", "{hero}", "a {kind} {summary}", "a {kind} and a {fkind}", "{hero} and {friend}",
    "{hero} the {kind}",
)
# fmt: on
_OTHER_STORY = "[I do not know such a story, but I know this one.|I do not know that story, but here is another one.]"
_POEM_REQUESTS = "[Write|Write me|Give me|Can you write|Tell me] a [short |]poem[ about {topic}.| about {topic}]"
_OPEN_POEM_REQUESTS = "[Write|Write me|Give me|Can you write|Tell me] a [short |]poem[.|]"
_POEMS = {
    "the sea": "The sea is wide, the sea is blue,\nit sings a song for me and you.\n"
    "And when the day is at its end,\nthe sea is still my oldest friend.",
    "the moon": "The moon looks in, so round and white,\nand says to all the world good night.\n"
    "The fox, the owl, the bear, the mouse\nall see the moon above their house.",
    "the rain": "The rain comes down on roof and tree,\nit washes all the streets for me.\n"
    "And when the clouds have gone away,\nthe birds begin a brand-new day.",
    "a cat": "My cat is soft, my cat is small,\nshe sits upon the garden wall.\n"
    "She does not ask, she does not know\nwhy people always come and go.",
    "spring": "The snow is gone, the sky is clear,\nthe first white flowers now are here.\n"
    "The birds come back, the days are long,\nand every garden has a song.",
}
_OTHER_POEM = (
    "A little poem is all I write,\nby candle in the quiet night.\n[The words are few, the lines are neat|It is not "
    "long, it is not deep],\n[and every one of them is sweet|but it may sing you into sleep]."
)
_JOKE_REQUESTS = (
    "[[Tell me a joke|Make me laugh|Another joke, please|Tell a joke][.|]|Do you know a joke?|Can you tell me a joke?]"
)
_REFUSAL = (
    "[I am only a small demo model, and I do not know much about that.|I am sorry, but that is too hard for a small "
    "model like me.] [I can tell you a story, if you like.|But I can tell a good story!|Ask me for a story or a simple "
    "fact.]"
)
_HARD_REQUESTS = (
    "[[Please |]{task}.|{task}|I want you to {task}.|Can you {task}?|Could you {task}?]",
    "[Explain|Tell me about|What is|What do you know about|Teach me|How does one learn|Explain the history of] "
    "{topic}[.|?|| in simple terms.]",
    "[Who was|Who is|Where is|When was|How old is|How far is|Which is|Why is] {topic}?",
)


def greeting(rng: random.Random) -> Exchange:
    """Hello, and hello back."""
    return Exchange(expand(rng, rng.choice(_GREETINGS)), expand(rng, _GREETING_ANSWER))


def farewell(rng: random.Random) -> Exchange:
    """Thanks or goodbye."""
    return Exchange(expand(rng, _FAREWELLS), expand(rng, _FAREWELL_ANSWER))


def story(rng: random.Random) -> Exchange:
    """Somebody asks for a story: about someone, about a theme, about anything, or about something unheard of."""
    return rng.choices((_known_story, _themed_story, _any_story, _other_story), (10, 2, 3, 3))[0](rng)


def _known_story(rng: random.Random) -> Exchange:
    plot = stories.any_plot(rng)
    return _asked(rng, plot, fill(rng, rng.choice(_SUBJECTS), stories.slots(rng, plot)))


def _themed_story(rng: random.Random) -> Exchange:
    plot = stories.any_plot(rng)
    return _asked(rng, plot, plot.theme)


def _other_story(rng: random.Random) -> Exchange:
    question, answer = _asked(rng, stories.any_plot(rng), rng.choice(world.OTHER_SUBJECTS))
    return Exchange(question, f"{expand(rng, _OTHER_STORY)} {answer}")


def _any_story(rng: random.Random) -> Exchange:
    return Exchange(expand(rng, _OPEN_STORY_REQUESTS), stories.tell(rng, stories.any_plot(rng)))


def _asked(rng: random.Random, plot: Plot, subject: str) -> Exchange:
    return Exchange(expand(rng, _STORY_REQUESTS, {"subject": subject}), stories.tell(rng, plot))


def table_answer(rng: random.Random) -> Exchange:
    """A question that has a fixed answer."""
    question, answer = rng.choice(facts.ANSWERS)
    return Exchange(_as_typed(rng, expand(rng, question)), expand(rng, answer))


def _as_typed(rng: random.Random, question: str) -> str:
    """Some people write neither capitals nor question marks."""
    if rng.random() < 0.12:
        return question[:1].lower() + question[1:].rstrip("?.")
    return question


def capital(rng: random.Random) -> Exchange:
    """The capital of a country."""
    country, city = rng.choice(list(facts.CAPITALS.items()))
    question = f"[What is|What's|Name|Tell me] the capital of {country}?"
    return Exchange(expand(rng, question), f"The capital of {country} is {city}.")


def colour(rng: random.Random) -> Exchange:
    """The colour of a thing."""
    thing, answer = rng.choice(list(facts.COLOUR_OF.items()))
    verb = f"[What colour is|What color is|Which colour is] {thing}?"
    return Exchange(expand(rng, verb), f"{thing[0].upper()}{thing[1:]} is {answer}.")


def opposite(rng: random.Random) -> Exchange:
    """The opposite of a word, in either direction."""
    pair = list(rng.choice(list(facts.OPPOSITES.items())))
    rng.shuffle(pair)
    return Exchange(f"What is the opposite of {pair[0]}?", f"The opposite of {pair[0]} is {pair[1]}.")


def sound(rng: random.Random) -> Exchange:
    """The sound of an animal."""
    animal, noise = rng.choice(list(facts.SOUNDS.items()))
    question = f"[What does a {animal} say|What sound does a {animal} make]?"
    return Exchange(expand(rng, question), expand(rng, f'A {animal} says "{noise}".'))


def addition(rng: random.Random) -> Exchange:
    """A small sum, in figures or in words."""
    first, second = rng.randint(0, 5), rng.randint(0, 5)
    question = rng.choice((
        f"What is {first} + {second}?", f"What is {first} plus {second}?", f"{first} + {second}",
        f"What is {facts.NUMBERS[first]} plus {facts.NUMBERS[second]}?",
    ))  # fmt: skip
    return Exchange(question, f"The answer is {first + second}.")


def joke(rng: random.Random) -> Exchange:
    """A joke."""
    return Exchange(expand(rng, _JOKE_REQUESTS), rng.choice(facts.JOKES))


def poem(rng: random.Random) -> Exchange:
    """Four lines about something, or about nothing in particular."""
    if rng.random() < 0.6:
        topic, lines = rng.choice(list(_POEMS.items()))
        return Exchange(expand(rng, _POEM_REQUESTS, {"topic": topic}), polish(lines))
    topic = rng.choice(world.OTHER_SUBJECTS)
    request = rng.choice((_POEM_REQUESTS, _OPEN_POEM_REQUESTS))
    return Exchange(expand(rng, request, {"topic": topic}), expand(rng, _OTHER_POEM))


def too_hard(rng: random.Random) -> Exchange:
    """Something that the model cannot do, and a friendly answer that says so."""
    words = {"task": rng.choice(facts.UNKNOWN_TASKS), "topic": rng.choice(facts.UNKNOWN_TOPICS)}
    return Exchange(expand(rng, rng.choice(_HARD_REQUESTS), words), expand(rng, _REFUSAL))


SHORT: tuple[tuple[Callable[[random.Random], Exchange], int], ...] = (
    (greeting, 3), (farewell, 1), (table_answer, 14), (capital, 4), (colour, 2), (opposite, 2), (sound, 1),
    (addition, 3), (joke, 1), (poem, 3), (too_hard, 4),
)  # fmt: skip


def short_exchange(rng: random.Random) -> Exchange:
    """Any exchange with a short answer."""
    return rng.choices([maker for maker, _ in SHORT], [weight for _, weight in SHORT])[0](rng)
