"""What a plot is: who a story is about, what goes wrong, what the hero does, and how it ends.

For stories.py, and for the lists of plots in plots_on_land.py, plots_at_sea.py and plots_of_things.py.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Character:
    """Someone in a story: "Ruby", a "fox", who is a "she"."""

    name: str
    kind: str
    pronoun: str


@dataclass(frozen=True)
class Plot:
    """One plot; summary and text are templates (see templates.py) that start after the hero has been introduced.

    Slots: hero, kind, friend, fkind, thing, colour, the pronouns he, him, his, himself of the hero, and the same with
    an f in front (fhe, fhim) of the friend. Where the text names the friend for the first time, the kind comes along.

    A plot has one cast: with a few million training tokens, the model cannot learn to look back for a name in the text,
    but it can learn who belongs to which plot. The variety lies in the wording and in the number of plots.
    """

    theme: str
    hero: Character
    home: str
    friend: Character
    thing: str
    colour: str
    summary: str
    text: str
