"""Stories: writes a plot down in one of its many wordings, from "Once upon a time" to the ending.

For corpus.py (stories on their own) and questions.py (stories that somebody asked for).
"""

import random

from tools.demo_model import world
from tools.demo_model.plot import Character, Plot
from tools.demo_model.plots_at_sea import SEA_PLOTS
from tools.demo_model.plots_of_things import THING_PLOTS
from tools.demo_model.plots_on_land import LAND_PLOTS
from tools.demo_model.templates import expand, fill

PLOTS = (*LAND_PLOTS, *SEA_PLOTS, *THING_PLOTS)
_OPENINGS = (
    "[Once upon a time|Once upon a time|Once upon a time|Long ago|Many years ago], there was a {trait} {kind} [named|"
    "called] {hero}. {he} lived {home}.",
    "[Once upon a time|Long ago|A long time ago], a {trait} {kind} named {hero} lived {home}.",
    "[Once upon a time,|Once,|Long ago,] there lived a {trait} {kind} [named|called] {hero} {home}.",
    "[There once was|There was once|There was] a {trait} {kind} [named|called] {hero} who lived {home}.",
    "{hero} was a {trait} {kind} who lived {home}.",
    "[The|A] {trait} {kind} lived {home}. {his} name was {hero}.",
    "[There was once|Once there was|There was|This is the story of] a {trait} {kind} {summary}. {his} name was {hero}, "
    "and {he} lived {home}.",
    "This is [the|a] story of {hero}, a {trait} {kind} who lived {home}.",
)
_ENDINGS = {
    "friendship": "[A good friend is the best thing to have|With a friend at your side, everything is easier]",
    "kindness": "[A little kindness goes a long way|Kindness always finds its way back]",
    "sharing": "[Joy grows when it is shared|What you share is never lost]",
    "courage": "[To be brave is to be afraid and to go on|Courage begins with one small step]",
    "patience": "[Good things take time|Those who keep going arrive]",
    "honesty": "[The truth makes the heart light|It is never too late to tell the truth]",
    "cleverness": "[A good idea is worth more than strength|Those who think will find a way]",
    "adventure": "[The best journeys are made together|The world is large and full of wonders]",
    "hard work": "[Practice makes perfect|Those who keep trying will learn]",
    "peace": "[It takes courage to say sorry|It is better to share than to fight]",
    "fun": "[It is good to laugh at yourself|A good laugh makes every day better]",
    "modesty": "[True friends do not care how you look|It is better to be kind than to be proud]",
    "hope": "[Nothing is ever too old to be loved|Never give up hope]",
}


def any_plot(rng: random.Random) -> Plot:
    """Choose a plot."""
    return rng.choice(PLOTS)


def tell(rng: random.Random, plot: Plot) -> str:
    """Write a story down."""
    template = f"{rng.choice(_OPENINGS)} {plot.text} {_ending(rng, plot.theme)}"
    one_line = " ".join(template.split())
    return expand(rng, one_line, slots(rng, plot))


def tell_from_the_middle(rng: random.Random, plot: Plot) -> str:
    """A story without its first sentences, so that the model can go on from any beginning."""
    sentences = tell(rng, plot).split(". ")
    return ". ".join(sentences[rng.randint(1, 3) :])


def slots(rng: random.Random, plot: Plot) -> dict[str, str]:
    """What the words of a story depend on; "summary" says in one clause what happens to the hero."""
    known = {
        "hero": plot.hero.name, "kind": plot.hero.kind, "home": plot.home, "trait": rng.choice(world.TRAITS),
        "friend": plot.friend.name, "fkind": plot.friend.kind, "thing": plot.thing, "colour": plot.colour,
        **_pronouns(plot.hero, ""), **_pronouns(plot.friend, "f"),
    }  # fmt: skip
    return {**known, "summary": fill(rng, plot.summary, known)}


def _ending(rng: random.Random, theme: str) -> str:
    return rng.choice(("", "", f"{_ENDINGS[theme]}.", "The end."))


def _pronouns(character: Character, prefix: str) -> dict[str, str]:
    if character.pronoun == "she":
        return {f"{prefix}he": "she", f"{prefix}him": "her", f"{prefix}his": "her", f"{prefix}himself": "herself"}
    return {f"{prefix}he": "he", f"{prefix}him": "him", f"{prefix}his": "his", f"{prefix}himself": "himself"}
