"""Short plain texts that are not stories: journeys, letters, diaries, places, and sentences that people like to begin.

For corpus.py. A newcomer's first prompt is often the start of a sentence ("The train to", "The capital of France is"),
and these texts teach the model how such sentences go on.
"""

import random

from tools.demo_model import facts, world
from tools.demo_model.templates import expand

_JOURNEYS = (
    "The [train|bus|night train|early train] to {town} [leaves|left] at [six|seven|eight|nine|ten] [in the morning|in "
    "the evening|o'clock]. "
    "{name} [had packed a small bag|had a ticket and a sandwich] and found a seat by the window. [Outside, the fields "
    "and villages went by|The sun came up over the fields|Rain ran down the glass]. "
    'Across from {him} sat an old {elder} with a {colour} [hat|coat|umbrella]. "Are you going far?" the old {elder} '
    'asked. "To see my {relative}," said {name}. '
    "They talked about [the weather|books|the old days|gardens], and the time passed quickly. When they arrived, "
    "{name}'s {relative} was waiting [on the platform|at the station|by the gate] and waved. "
    "[It was good to be there|{name} was glad that {he} had come|They had tea together and talked until late].",
    "The [train|bus|boat] to {town} was [late|full|almost empty] that [morning|evening|day]. [The people on the "
    "platform looked at the clock|Some people read, and others slept]. "
    "{name} waited with a cup of tea and [read a letter from {his} {relative}|thought of {his} {relative}]. At last "
    "{he} heard [a whistle|a bell] in the distance, and everybody stood up. "
    "{he} found a place beside a [child|woman|student] who was [reading a book|drawing a picture of a {animal}|eating "
    "an apple]. [Soon the town was far behind them|Slowly they left the town]. "
    "In the [afternoon|evening] they arrived. [The streets were wet and shining|Lights were burning in all the "
    "windows|There was music in the streets], and {name} knew the way by heart. "
    "[{he} knocked at the {colour} door, and {his} {relative} opened it with a smile|{he} walked home slowly and was "
    "happy].",
    "The [train|road|path] to {town} goes [through a long valley|along the river|over a high bridge]. On a clear day, "
    "[you can see the mountains|one can see as far as the sea]. "
    "There are [small stations|quiet villages|old farms] on the way, and [children wave from the gardens|there is "
    "always somebody who waves]. The journey takes [two|three|four] hours. "
    "[Most people sleep|Many people read], but those who look out of the window [see a {animal} now and then|never "
    "forget it].",
)
_DIARIES = (
    "[Hello, my name is|My name is|Hi, my name is] {name}, and I [live|work] in {town}. I am a {job}. [Every morning I "
    "get up at six|I get up early] and [drink a cup of tea|open the window]. "
    "[My work is not easy, but I like it|I love my work]. [In the evening|On Sundays] I [walk along the river|play "
    "music with my friends|read a book|visit my {relative}]. "
    "I have a {animal} [called|named] {other}, who [sleeps on my bed|follows me everywhere|is always hungry]. [We are "
    "very happy here|I would not want to live anywhere else].",
    "[Today|Yesterday] I [went to the {place}|was at the {place}|visited the {place}] with my {relative}. The weather "
    "was [fine|cold but sunny|warm], and [we took bread and apples with us|we stayed all day]. "
    "[On the way|There] we saw a {animal} [that looked at us for a long time|with {colour} feet|asleep in the sun]. My "
    "{relative} laughed and told me [a story about it|what it likes to eat]. "
    "[We came home tired and happy|In the evening we made soup and went to bed early]. [I hope that we will go again "
    "soon|It was a good day].",
    "[I like|I love|I have always liked] [the {place}|{town}] in [spring|summer|autumn|winter]. [The air is clear, and "
    "the light is soft|It is quiet then, and there are few people]. "
    "I [take a book and sit on a bench|walk until my feet are tired], and [sometimes I meet a friend|sometimes a "
    "{animal} comes close]. [Then I think that life is good|I could stay there for ever].",
    "Dear {name},\n[thank you for your letter|it was good to hear from you|I hope that you are well]. Here in {town} "
    "[everything is fine|the weather is cold|spring has come]. Last week I went to the {place} with my {relative}, and "
    "we thought of you. "
    "[When will you come to see us|Will you visit us in the summer]? [The {animal} misses you too|There is always a "
    "bed for you here].\n[With love|Best wishes|Yours],\n{other}",
)
_PLACES = (
    "{town} is a [small|beautiful|lively|quiet] [town|city|place] [by the sea|on a river|between two hills]. [It is "
    "known for its|People come to see its] [old bridge|market|gardens|harbour|towers]. "
    "In the morning, [the market is full of people|the bakers open their shops], and in the evening [there is music in "
    "the streets|people walk along the water]. "
    "[Visitors should try the fresh bread|It is best to go there in spring|Many visitors come back every year].",
    "The old [house|mill|castle|lighthouse|library|bridge] [stood|had stood] [at the edge of the {place}|near the "
    "{place}] for more than a hundred years. [Nobody lived there now|Only a {animal} lived there now], but [the "
    "children liked to play there|people still told stories about it]. "
    "One day {name} came with a {colour} [lamp|key|notebook] and [opened the door|looked inside]. [There was dust on "
    'everything|It was dark and quiet]. On a table lay a letter, and it said: "[Whoever finds this may live here|Look '
    'after this place and be happy]." '
    "{name} [smiled and opened the windows|began to clean that same day]. [By summer, there were flowers at every "
    "window|Soon there was light in it again].",
    "It was a [dark and stormy|cold and clear|warm and quiet] night. [The wind blew around the house|The moon stood "
    "over the {place}|Not a sound could be heard]. {name} sat by the fire and [read an old book|thought of {his} "
    "{relative}]. "
    "Suddenly there was a knock at the door. {he} stood up and opened it slowly. [Outside stood|There was] a wet "
    '{animal} with a {colour} ribbon. "Where do you come from?" asked {name}. [It came in, sat down by the fire and '
    "fell asleep|It looked at {him} and came in]. "
    "In the morning {he} called it {other}, and it never left {him} again.",
    "The {place} was [quiet|bright|full of people] in the [early morning|evening light|summer]. [A light wind moved "
    "the leaves|The sky was clear and blue]. {name} [sat on a bench|walked slowly] and [listened to the birds|watched "
    "a {animal}]. "
    "[There was nothing to do and nowhere to go|For once, there was no work to do], and {he} was [perfectly happy|as "
    "happy as {he} could be].",
    "The [cat|dog|{animal}] [sat on the mat|lay in the sun|looked out of the window] and [waited for {name}|did not "
    "move]. [It was warm, and the house was quiet|Outside, it was raining]. "
    'When {name} came home, it [jumped up and ran to the door|opened one eye]. "[Did you wait for me|Are you '
    'hungry]?" {he} asked and gave it some [milk|fish|bread]. Then they both sat by the fire, and {name} read [a '
    "book|the newspaper] until it was time for bed.",
    "The [weather|sky] [today|this morning|in {town}] is [grey, with a little rain|bright and clear|cold, but the sun "
    "is out]. [In the afternoon it will be warmer|Tonight there may be snow on the hills]. [Take an umbrella with "
    "you|It is a good day for a walk].",
)
_BEGINNINGS = (
    "It was [raining|snowing|late|cold|a Sunday morning|early], and [{name} was still awake|{name} was alone in the "
    "house|nobody was in the street]. [A {animal} sat at the window|Somewhere a bell rang|The clock struck {number}]. "
    "{name} put on a {colour} coat and went [out into the street|down to the river]. [The air smelled of bread|The "
    "lamps were burning], and it was good to be [alive|out]. [{he} walked as far as the {place} and came home "
    "happy|After an hour, {he} came home and slept until noon].",
    "[On a|One] [cold winter|warm summer|quiet autumn|bright spring] [day|evening|morning], {name} [was on the way to "
    "the {place}|walked through {town}] when {he} [saw|met|found] a {animal} [in the middle of the road|under a "
    "bench|beside the path]. "
    '"[What are you doing here|Are you lost]?" {he} asked. The {animal} [looked up and came with {him}|said nothing, '
    "but it came with {him}]. [They shared a piece of bread|{he} gave it some water]. From that day on, {name} never "
    "went to the {place} alone.",
    "[In the morning|In the evening|At noon|The next morning], [the rain had stopped|the sun came out|snow lay on the "
    "roofs], and {name} [went for a walk|opened the window]. [The streets were quiet|The birds were singing]. A "
    '{animal} sat on the wall and looked at {him}. "Good [day|morning] to you," said {name}. [The {animal} said '
    "nothing|The {animal} did not answer], but it [stayed for a while|followed {him} home]. [It was the start of a "
    "good day|It was a small thing, but it made {him} happy].",
    "When I was [young|a child|five years old|small], [I lived in {town}|we lived near the {place}]. My {relative} had "
    "a {animal} called {other}, and [I played with it every day|everybody loved it]. [In the evenings, my {relative} "
    "told us stories|We had little money, but we were happy]. "
    "[Many years have passed since then|Now I am old], but [I still think of that time|I remember every day of it] "
    "[with joy|and smile].",
    "Every [morning|evening|Sunday], {name} [went to|walked to|visited] the {place} [with a {animal}|and fed the "
    "{animal}|to draw pictures]. [People knew {him} and said hello|Nobody knew why]. One day {he} did not come, and "
    "[everyone was worried|the people began to ask questions]. "
    '[They went to {his} house and knocked|They found {him} at home]. "I only have a cold," said {name} and laughed. '
    "They brought {him} [soup|flowers|tea and honey], and [the next week {he} was back|soon {he} was well again].",
    "[She|He|The boy|The girl|The old man|The young woman] [opened the door|looked out of the window|stood at the "
    "{place}] and [could not believe it|smiled]. [Snow had fallen in the night|A {animal} was sitting there], and "
    "[everything was white and quiet|the whole street had come to look]. It was the [first|best|most beautiful] day of "
    "the year.",
    "[The secret of|The best way to learn] [cooking|music|a language|anything] is [patience|to do a little every "
    "day|to make mistakes and to go on]. [Nobody is good at it on the first day|Start with something small]. After a "
    "while you will see that [it becomes easy|you have learned more than you thought].",
    "[I want to|I would like to|I hope to|One day I will] [travel to {town}|see the {place}|learn to play the "
    "piano|write a book about a {animal}]. [My {relative} says that it takes courage|It will not be easy], but [I have "
    "time|I am not afraid|I know that I can do it]. [Tomorrow I will begin|The first step is the hardest].",
    "Why [do birds sing|is the sky blue|do people tell stories]? [Some say that it is only for joy|Nobody knows the "
    "whole answer|That is a good question]. [The best answers come when you sit quietly and look|But it is good to "
    "ask, because those who ask will learn].",
)
_SENTENCES = (
    "The quick brown fox jumps over the lazy dog. [The dog opens one eye, looks at the fox and goes back to sleep|The "
    "dog does not mind, and the two of them are good friends].",
    "The capital of {country} is {capital}. [It is a beautiful city with many old streets|Many people live there|Every "
    "year, many visitors come to see it].",
    "{capital} is the capital of {country}. [It is a beautiful city with many old streets|Many people live there|Every "
    "year, many visitors come to see it].",
    "San Francisco is a city in California. It is known for its hills, its fog and a great red bridge. [Many people "
    "who build computers live there|Visitors like to ride up the hills in the old cable cars].",
    "The president of [the United States|a country|France] is [chosen|elected] by the people. [The president leads the "
    "government and speaks for the country|A new president is chosen every few years].",
    "The future of [AI|computers|the world] is [hard to see|not written yet]. [Machines will help people with their "
    "work|Small machines will learn to do many things], but [people will still need friends, stories and a warm "
    "fire|people will decide what is good and what is not].",
    "[The meaning of life|The secret of a good life|The best thing in life] is [to be kind and to learn something "
    "every day|to have good friends and enough time for them].",
    "The sky is blue, the grass is green and the {animal} is [asleep|happy|hungry]. [It is a beautiful day|Nothing "
    "else happens today, and that is fine].",
    "[To make|If you want to make] [tea|a cup of tea], boil some water and pour it over the tea leaves. Wait for three "
    "minutes. [Then add milk or honey|Drink it slowly with a friend].",
    "[To bake|If you want to bake] bread, mix flour, water, salt and yeast. Knead the dough and let it rest for an "
    "hour. [Then bake it until the crust is brown|Bake it until it smells so good that the neighbours come].",
    "A {animal} is an animal. [It needs food, water and a safe place to sleep|It is happiest when it is left in "
    "peace]. [If you see one, be quiet and watch|Children like to draw it].",
    "One, two, three, four, five, six, seven, eight, nine, ten. [Now you know how to count|That was easy].",
    "[Tandem is|Here is] a system that serves language models. Prefill workers read the prompt, and decode workers "
    "write the answer. [The router decides who does what|The KV cache travels from one to the other].",
    "[In the beginning|At first], there was only [silence|the sea]. Then [a bird began to sing|the sun came up], and "
    "[one by one the others woke up|everything began].",
    "[Hello|Hello, world|Hello there|Hi]! [How are you today|It is good to see you]? [I hope that you are well and "
    "that the sun is shining|I am the small demo model that comes with Tandem].",
    "Roses are red, violets are blue, [the kettle is singing, and tea is for two|the {animal} is sleeping, and so "
    "should you].",
    "[There are|The year has] four seasons: spring, summer, autumn and winter. [In winter it is cold, and in summer it "
    "is warm|Every one of them is beautiful].",
    "[Once|One day|One morning|One evening|Last night|Last summer|In the morning|Yesterday], [a|an old|a young] "
    "{animal} [came into the garden|sat at the door|looked through the window]. {name} gave it some bread, and it [ate "
    "everything|was thankful]. The next day it came back with a {colour} flower, and since then they have been "
    "friends.",
)  # fmt: skip
# fmt: off
_PUBLIC_PLACES = ("park", "forest", "lake", "harbour", "market", "museum", "garden", "beach", "library", "zoo")
# fmt: on
_KINDS_OF_TEXT = (_JOURNEYS, _DIARIES, _PLACES, _BEGINNINGS, _SENTENCES)
_ONE_PERSON = ("name", "he", "him", "his")


def write_article(rng: random.Random) -> str:
    """One short text of any kind."""
    texts = rng.choices(_KINDS_OF_TEXT, (5, 4, 5, 4, 5))[0]
    template = rng.choice(texts)
    return expand(rng, template, _slots(rng, template))


def _slots(rng: random.Random, template: str) -> dict[str, str]:
    """Words for the slots: free where a slot occurs once, always the same where the text comes back to it.

    The model is too small to look back for a word; plot.py says more.
    """
    always_the_same = _any_words(random.Random(template))
    words = _any_words(rng)
    for slot in words:
        linked = _ONE_PERSON if slot in _ONE_PERSON else (slot,)
        if sum(template.count(f"{{{other}}}") for other in linked) > 1:
            words[slot] = always_the_same[slot]
    return words


def _any_words(rng: random.Random) -> dict[str, str]:
    female = rng.random() < 0.5
    country, capital = rng.choice(list(facts.CAPITALS.items()))
    he, him, his = ("she", "her", "her") if female else ("he", "him", "his")
    return {
        "name": rng.choice(world.WOMEN if female else world.MEN), "he": he, "him": him, "his": his,
        "other": rng.choice(world.WOMEN + world.MEN), "elder": rng.choice(("man", "woman")),
        "town": rng.choice(world.TOWNS), "relative": rng.choice(world.RELATIVES), "job": rng.choice(world.JOBS),
        "animal": rng.choice(world.ANIMALS), "colour": rng.choice(world.COLOURS), "place": rng.choice(_PUBLIC_PLACES),
        "number": rng.choice(facts.NUMBERS[6:]), "country": country, "capital": capital,
    }  # fmt: skip
