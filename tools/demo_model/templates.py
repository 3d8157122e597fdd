"""Templates: turns "[Long ago|Once], {hero} slept." into one English sentence.

For the writers of the demo model's corpus. Square brackets hold alternatives (they may nest), braces hold slots.
It mends the two things a template cannot know: "a" or "an", and capitals at the start of a sentence.
"""

import random
import re
from collections.abc import Mapping

_ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU]|hon|hour)(?!uni|use|one)")
_SENTENCE_START = re.compile(r'(^\W*|[.!?] |\." |\n)([a-z])')


def fill(rng: random.Random, template: str, slots: Mapping[str, str]) -> str:
    """Choose among the alternatives and fill the slots."""
    text = template
    while _ALTERNATIVES.search(text):
        text = _ALTERNATIVES.sub(lambda match: rng.choice(match.group(1).split("|")), text)
    return text.format_map(slots)


def expand(rng: random.Random, template: str, slots: Mapping[str, str] | None = None) -> str:
    """Fill a template and mend articles and capitals."""
    return polish(fill(rng, template, slots or {}))


def polish(text: str) -> str:
    """Mend articles and capitals, and drop the doubled spaces that an empty alternative leaves."""
    text = re.sub(r" {2,}", " ", text).strip()
    text = _ARTICLE.sub(r"\1n ", text)
    return _SENTENCE_START.sub(lambda match: match.group(1) + match.group(2).upper(), text)
