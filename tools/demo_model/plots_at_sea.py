"""Plots of the corpus's stories whose heroes live in the sea.

Data for stories.py; plot.py says what a plot consists of and which slots its text may use.
"""

from tools.demo_model.plot import Character, Plot

SEA_PLOTS = (
    Plot(
        theme="friendship",
        hero=Character("Mei", "dolphin", "she"),
        home="in a bay with clear water",
        friend=Character("Carlo", "crab", "he"),
        thing="pearl",
        colour="white",
        summary="who found a {thing}",
        text="""
        One day, {hero} found a {colour} {thing} on the sand. It was so beautiful that {he} took it home. But soon {he}
        saw {friend} the {fkind} looking everywhere. "What are you looking for?" asked {hero}. "I have lost my {thing},"
        said {friend}. "My mother gave it to me." {hero} [wanted to keep the {thing}|was quiet for a moment], but {he}
        saw how sad {friend} was. "I found it yesterday," {he} said. "Here it is." {friend} was so happy that {fhe} swam
        in circles. "Come," said {friend}, "I will show you something." {fhe} led {hero} to a cave [full of shining
        stones|where the water glowed green and blue]. They played there [all day|until evening], and {hero} knew that a
        friend is better than any {thing}.
        """,
    ),
    Plot(
        theme="courage",
        hero=Character("Noah", "shark", "he"),
        home="in the deep blue sea",
        friend=Character("Priya", "seal", "she"),
        thing="net",
        colour="green",
        summary="who saved a friend from a {thing}",
        text="""
        One morning, {hero} heard a cry. {friend} the {fkind} was caught in a {thing} and could not get free. "Swim
        away!" called {friend}. "It is dangerous here." But {hero} did not swim away. {he} pulled at the {thing} as hard
        as {he} could. [It did not move|The knots were tight]. Then {he} had an idea. {he} found a sharp shell and began
        to cut, one knot after another. [A boat came nearer and nearer|The tide was going out], but {hero} went on. At
        last the {thing} tore, and {friend} was free. Together they swam to the deep water, where they were safe. "You
        are the bravest {kind} in the sea," said {friend}. "I was afraid the whole time," said {hero}, "but I could not
        leave you."
        """,
    ),
    Plot(
        theme="kindness",
        hero=Character("Luna", "whale", "she"),
        home="in the cold northern sea",
        friend=Character("Paul", "penguin", "he"),
        thing="ship",
        colour="white",
        summary="who helped a {thing} in a storm",
        text="""
        One night there was a [great|wild] storm, and the waves were as high as hills. {hero} saw a small {thing} that
        had lost its way. It was coming too close to the rocks! {hero} called {friend} the {fkind}, and together they
        swam in front of the {thing}. They [jumped and splashed|made as much noise as they could], and the sailors saw
        them. "Follow them!" cried the captain. "They know the way." Slowly the {thing} turned, and {hero} and {friend}
        led it to the quiet harbour. In the morning the sea was calm. The sailors stood on the shore and waved. ["Thank
        you!" they called|They never forgot that night], and every time their {thing} came by, {hero} and {friend} swam
        beside it.
        """,
    ),
    Plot(
        theme="adventure",
        hero=Character("Tim", "octopus", "he"),
        home="near a coral reef",
        friend=Character("Stella", "starfish", "she"),
        thing="cave",
        colour="black",
        summary="who went to look for a ghost",
        text="""
        Everyone said that there was a ghost in the {thing}, and nobody dared to go there. But {hero} wanted to know the
        truth. "Will you come with me?" {he} asked {friend} the {fkind}. They swam down and down, until the water was
        dark and cold. In the {thing} something was moaning. "Ooooh," it said. {friend} wanted to turn back, but {hero}
        went on. [Behind a rock|In a dark corner] sat a very old turtle. "I am not a ghost," said the turtle. "I am only
        [lonely|stuck], and nobody hears me." "[We hear you|We are here now]," said {hero}. They took the old turtle
        home with them. In the evenings the turtle told stories from long ago, and [nobody was afraid of the {thing} any
        more|all the young ones came to listen].
        """,
    ),
)
