"""Plots of the corpus's stories whose heroes are things: robots, clocks, teapots.

Data for stories.py; plot.py says what a plot consists of and which slots its text may use.
"""

from tools.demo_model.plot import Character, Plot

THING_PLOTS = (
    Plot(
        theme="hope",
        hero=Character("Henry", "train", "he"),
        home="in a shed behind the station",
        friend=Character("Alice", "teacher", "she"),
        thing="coat of paint",
        colour="green",
        summary="[who|that] nobody needed any more",
        text="""
        Long ago, everybody had used {hero} every day. But now {he} was old, and [nobody needed {him} any more|dust lay
        thick upon {him}]. "Nobody remembers me," thought {hero}. One day, {friend} the {fkind} came in and looked
        around. "[What a beautiful old {kind}|Look at this fine {kind}]!" said {friend}. "All it needs is a {thing}."
        {friend} took {hero} home and worked all [evening|afternoon]. When the work was done, {hero} shone like new.
        {friend} tried {him} out at once, and everything worked. ["I knew it!" said {friend}|{friend} laughed with joy].
        From that day on, {hero} was used every day, and {he} was [the happiest {kind} in the world|never lonely again].
        """,
    ),
    Plot(
        theme="courage",
        hero=Character("Lumi", "lamp", "she"),
        home="in a window by the sea",
        friend=Character("Peter", "sailor", "he"),
        thing="storm",
        colour="yellow",
        summary="[who|that] helped somebody in a {thing}",
        text="""
        {hero} was not [big|new] and not very strong, and the others often laughed at {him}. Then one evening a terrible
        {thing} came, and all the lights in the town went out. {friend} the {fkind} was outside and could not find the
        way home. "I must do something," thought {hero}. {he} made as much light and noise as {he} could. [The others
        told {him} to be quiet, but {he} did not stop|{he} shook and rattled, but {he} did not stop]. Far away, {friend}
        heard it and walked towards the sound. When {fhe} came in at last, {fhe} was cold but safe. "You brought me
        home," said {friend} and put a hand on {hero}. Nobody laughed at the little {kind} after that. [They had learned
        that even a small {kind} can do great things|They were all proud of {him}].
        """,
    ),
    Plot(
        theme="fun",
        hero=Character("Tik", "robot", "he"),
        home="in a workshop near the park",
        friend=Character("Emma", "student", "she"),
        thing="painting",
        colour="blue",
        summary="[who|that] wanted to make a {thing}",
        text="""
        All day long {hero} did what a {kind} has to do, but in secret {he} had a dream: {he} wanted to make a {thing}.
        "A {kind} cannot do that," said the others. But {hero} tried it every night, when everyone was asleep. The first
        {thing} was [funny|strange], and the second was not much better. One night {friend} the {fkind} woke up and saw
        {him}. {hero} was [very ashamed|ready to hide]. "Please do not stop," said {friend}. "[I have never seen
        anything like it|It is wonderful]." The next day {friend} invited the whole street, and {hero} showed {his}
        {thing} to everybody. There was a long silence, and then they all clapped. "A {kind} can do that after all,"
        said the others. And {hero} was so happy that {he} began a new {thing} the same night.
        """,
    ),
    Plot(
        theme="friendship",
        hero=Character("Greta", "clock", "she"),
        home="in the hall of an old school",
        friend=Character("Karl", "carpenter", "he"),
        thing="spring",
        colour="golden",
        summary="[who|that] lost a {thing}",
        text="""
        One day, {hero} lost a small {thing}, and after that {he} did not work any more. "We will have to throw it
        away," somebody said. {hero} was [afraid|very sad]. But {friend} the {fkind} said, "Give me one day." {fhe}
        looked on the floor and under the table and behind the cupboard. [There was no {thing} to be found|{fhe} found a
        pencil and a coin, but no {thing}]. So {friend} went to the workshop and made a new one from {colour} metal. It
        took many hours. Late in the evening {fhe} put it in, and {hero} began to move again. "There you are," said
        {friend}. "I would never throw away a friend." The new {thing} was [a little brighter than the rest|the only
        {colour} part of {him}], and {hero} was proud of it all {his} life.
        """,
    ),
)
