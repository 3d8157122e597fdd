"""The words of the corpus's small world: names, creatures, places.

For stories.py, articles.py and questions.py, which draw from these lists; the lists hold words and no sentences.
"""

# fmt: off
WOMEN = ("Mary", "Susan", "Helen", "Julia", "Laura", "Zoë", "Ingrid", "Maria")
MEN = ("John", "Peter", "David", "Martin", "José", "Robert", "Erik", "Ali")
ANIMALS = ("fox", "rabbit", "cat", "dog", "horse", "deer", "hedgehog", "squirrel", "goat", "duck", "crow", "donkey")
OTHER_SUBJECTS = (
    "a zebra", "a hamster", "a king", "a prince", "a giant", "a snail", "a bee", "an ant", "a spider", "a camel",
    "a tiger", "a panda", "a koala", "an eagle", "a swan", "a raven", "a car", "a computer", "a teapot", "a tree",
    "a cloud", "a ghost", "a vampire", "an alien", "a dinosaur", "a unicorn", "a mermaid", "a wizard", "a doctor",
    "a cook", "my brother", "my sister", "two friends", "a spaceship", "a football team", "the future", "love", "war",
    "a city", "the ocean", "Christmas", "winter", "school", "a kangaroo", "a lizard", "a rat", "a tailor", "a banker",
)
TRAITS = (
    "small", "young", "curious", "brave", "clever", "gentle", "shy", "cheerful", "kind", "quiet", "friendly", "old",
    "lively", "patient", "happy", "careful", "merry", "honest", "funny", "polite",
)
COLOURS = ("red", "blue", "green", "yellow", "white", "brown", "black")
TOWNS = (
    "Millbrook", "Ashford", "Greenhill", "Oakham", "Westbury", "Seaview", "Paris", "London", "Berlin", "Malmö",
    "Zürich", "Rome", "Boston", "Lisbon", "Oslo", "Vienna",
)
RELATIVES = ("mother", "father", "sister", "brother", "aunt", "uncle", "grandmother", "grandfather")
JOBS = ("baker", "farmer", "sailor", "teacher", "painter", "carpenter", "gardener", "doctor", "cook", "tailor")
# fmt: on
