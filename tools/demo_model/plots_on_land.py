"""Plots of the corpus's stories whose heroes walk or fly: people, animals and birds.

Data for stories.py; plot.py says what a plot consists of and which slots its text may use.
"""

from tools.demo_model.plot import Character, Plot

LAND_PLOTS = (
    Plot(
        theme="friendship",
        hero=Character("Ruby", "fox", "she"),
        home="at the edge of a deep forest",
        friend=Character("Otto", "owl", "he"),
        thing="kite",
        colour="red",
        summary="who lost {his} {thing}",
        text="""
        [{hero} had a {colour} {thing} that {he} loved more than anything else|The thing {he} loved most was a {colour}
        {thing}]. One [windy|cloudy|cold] [morning|day|afternoon], the {thing} was gone. {hero} looked under the bed,
        behind the door and along the road, but {he} could not find it. [{he} sat down and began to cry|{he} was so sad
        that {he} could not eat]. Then {friend} the {fkind} came by. "What is wrong?" asked {friend}. "I have lost my
        {thing}," said {hero}. "[Do not worry|Do not be sad]. We will look for it together," said {friend}. They looked
        [all day|until the sun was low]. At last {friend} saw something {colour} [in the branches of a tree|in the tall
        grass|beside the stream]. It was the {thing}! {hero} [jumped for joy|laughed and danced] and thanked {friend}.
        From that day on, the two of them were [the best of friends|good friends].
        """,
    ),
    Plot(
        theme="kindness",
        hero=Character("Ben", "bear", "he"),
        home="in a warm cave in the mountains",
        friend=Character("Tilly", "hedgehog", "she"),
        thing="roof",
        colour="brown",
        summary="who helped a friend after a storm",
        text="""
        One night, a [great|terrible] storm came. The wind blew and the rain fell [until morning|all night long]. When
        the sun came up, {hero} saw that the {thing} of {friend}'s house was broken. {friend} the {fkind} stood outside
        and was [very sad|cold and wet]. "Come and stay with me," said {hero}. "Tomorrow we will mend your {thing}." The
        next day, they [found wood and nails|brought wood and a hammer] and worked together. [It was hard work, but they
        sang as they worked|It took the whole day, but they did not stop]. In the evening, the {thing} was as good as
        new. "How can I thank you?" asked {friend}. "[You would do the same for me|You are my friend, and that is
        enough]," said {hero}. They drank warm [tea|soup|milk] and listened to the wind, and neither of them was afraid
        of the storm any more.
        """,
    ),
    Plot(
        theme="sharing",
        hero=Character("Nora", "girl", "she"),
        home="in a small house by the harbour",
        friend=Character("Leo", "boy", "he"),
        thing="cake",
        colour="white",
        summary="who wanted to make a {thing}",
        text="""
        One day, {hero} wanted to make a [big|fine|special] {thing} for {friend}'s birthday. {he} found flour and
        butter, but there was no [salt|milk|water] left in the house. So {he} went from door to door and asked the
        neighbours. [The first neighbour was not at home, and the second had none|The first two neighbours had none to
        give]. At the last door, a kind old woman gave {him} [a whole jug|all {he} needed]. "Bring me a small piece of
        the {thing}," she said with a smile. {hero} ran home and baked all afternoon. In the evening, {friend} the
        {fkind} came in and saw the {thing} on the table. "[Is this really for me|Did you make this for me]?" {fhe}
        asked. "Yes, happy birthday!" said {hero}. They shared the {thing} with all the neighbours, and [everybody said
        that it was the best they had ever tasted|there was not a crumb left when the moon came up].
        """,
    ),
    Plot(
        theme="courage",
        hero=Character("Pip", "rabbit", "he"),
        home="in a burrow under an old oak",
        friend=Character("Hazel", "squirrel", "she"),
        thing="lantern",
        colour="yellow",
        summary="who was afraid of the dark",
        text="""
        {hero} was afraid of only one thing: the dark. Every night {he} lit a {thing} beside {his} bed. One evening,
        {friend} the {fkind} did not come home, and [everyone was worried|nobody knew where {fhe} was]. "Someone must go
        and look in the forest," the neighbours said. {hero} was [afraid|shaking], but {he} thought of {his} friend.
        {he} took the {thing} and walked into the dark forest. [Branches cracked and shadows moved|The trees were tall
        and black], but {he} did not turn back. "{friend}! Where are you?" {he} called. "Here! I have hurt my foot,"
        said a [small|weak] voice. {hero} helped {friend} to stand, and the {thing} showed them the way home. That
        night, {hero} blew out the light before {he} went to sleep. [The dark did not seem so dark any more|{he} was not
        afraid of the dark any more].
        """,
    ),
    Plot(
        theme="patience",
        hero=Character("Jack", "horse", "he"),
        home="on a farm at the end of a long road",
        friend=Character("Olive", "turtle", "she"),
        thing="golden cup",
        colour="golden",
        summary="who wanted to win a race",
        text="""
        {hero} was the fastest runner for miles around, and {he} told everybody so. One day, {friend} the {fkind} said,
        "I will race you to the [old bridge|tall tree|mill]." Everyone laughed, because {friend} was [very slow|not fast
        at all]. The next morning the race began. {hero} was soon so far ahead that {he} could not see {friend} any
        more. "I have plenty of time," {he} thought, and {he} [lay down under a tree|stopped to eat some berries] and
        fell asleep. But {friend} went on, one step after another. When {hero} woke up, [the sun was low|it was late].
        {he} ran as fast as {he} could, but {friend} was already there and held the {thing} in the air. "You won because
        you did not stop," said {hero}. "I will remember that." And [they walked home together|{he} was never proud
        again].
        """,
    ),
    Plot(
        theme="patience",
        hero=Character("Lily", "princess", "she"),
        home="in a castle on a hill",
        friend=Character("George", "gardener", "he"),
        thing="seed",
        colour="purple",
        summary="who had to wait for a {thing} to grow",
        text="""
        In spring, {friend} the {fkind} gave {him} a [small|tiny|strange] {thing}. "Put it in the ground and wait," said
        {friend}. {hero} dug a hole, put the {thing} in it and gave it water. The next day {he} looked, but nothing had
        grown. The day after, there was still nothing. "[Nothing will ever grow here|It is a bad {thing}]," said {hero}.
        "You must be patient," said {friend}. "Good things take time." So {hero} brought water every morning and waited.
        [One week went by, and then another|The rain came, and then the sun]. One morning there was a little green leaf.
        In summer it was a tall plant with [{colour} flowers|a big {colour} flower]. {hero} called {friend} to come and
        see. "You were right," said {hero}. "It was worth the wait."
        """,
    ),
    Plot(
        theme="sharing",
        hero=Character("Sam", "mouse", "he"),
        home="in a hole beside a wheat field",
        friend=Character("Vera", "sparrow", "she"),
        thing="nuts",
        colour="brown",
        summary="who shared {his} {thing} in winter",
        text="""
        All [summer|autumn] long, {hero} worked hard and filled {his} store with {thing}. Then winter came, and the snow
        was deep. One [cold|icy] evening there was a knock at the door. It was {friend} the {fkind}. "I have nothing
        left to eat," said {friend}. "[Can you help me|Could you give me a little]?" {hero} looked at the {thing}. There
        was just enough for one. But {he} saw how thin {friend} was, and {he} opened the door wide. "Come in," said
        {hero}. "What I have is for both of us." They ate a little every day and told each other stories by the fire.
        [When spring came, the store was empty, but both were well|The winter was long, but it did not feel long to
        them]. {friend} found the first green leaves of the year, and {fhe} brought them straight to {hero}.
        """,
    ),
    Plot(
        theme="honesty",
        hero=Character("Felix", "cat", "he"),
        home="above a little shop in the old town",
        friend=Character("Iris", "hen", "she"),
        thing="cup",
        colour="blue",
        summary="who broke a {thing}",
        text="""
        One day, {hero} was playing in {friend}'s house and knocked over a {colour} {thing}. It fell to the floor and
        broke. Nobody had seen it. {hero} [hid the pieces under the bed|ran home and told no one]. But that night {he}
        could not sleep. "[I must tell the truth|It was wrong to say nothing]," {he} thought. In the morning {he} went
        to {friend} the {fkind} and said, "I broke your {thing}. I am sorry." {friend} was quiet for a moment. Then
        {fhe} smiled. "[Thank you for telling me|It was brave of you to tell me]. A {thing} can be mended, and so can a
        mistake." They sat down together and glued the pieces. The {thing} [had a few cracks now, but {friend} liked it
        even more than before|was not perfect any more, but it still stood in its old place], and {hero} felt light and
        happy again.
        """,
    ),
    Plot(
        theme="cleverness",
        hero=Character("Bella", "beaver", "she"),
        home="beside a wide river",
        friend=Character("Hugo", "badger", "he"),
        thing="raft",
        colour="brown",
        summary="who built a {thing}",
        text="""
        One spring, it rained for [seven days|a whole week], and the river grew wide and wild. {friend} the {fkind}
        lived on the other side and could not come home. "[How shall I cross|How can I get home]?" called {friend}.
        {hero} thought for a long time. Then {he} had an idea. "I will build a {thing}!" {he} said. {he} [gathered
        branches|brought old boards] and tied them with strong rope. The first {thing} was [too small|too weak], and the
        water carried it away. But {hero} did not give up. {he} built a second {thing}, and this one was strong. Slowly
        and carefully, {friend} came across. "You are the cleverest {kind} I know!" said {friend}. [The {thing} is still
        there today, and everybody uses it|After that, everybody in the valley came to {hero} when they needed a good
        idea].
        """,
    ),
    Plot(
        theme="adventure",
        hero=Character("Daisy", "sheep", "she"),
        home="on a green hill above the village",
        friend=Character("Tom", "shepherd", "he"),
        thing="bell",
        colour="silver",
        summary="who was lost in the fog",
        text="""
        One [winter|autumn] afternoon, {hero} went for a walk, and a thick fog came down. Soon {he} could not see the
        path. {he} turned left, then right, and then {he} was lost. "[Is anybody there|Can anybody hear me]?" {he}
        called, but there was no answer. {hero} sat down on a stone and tried to be calm. Then {he} heard the sound of a
        {thing}, far away. {he} stood up and walked towards it. The sound grew louder and louder. At last {he} saw a
        light, and beside it stood {friend} the {fkind} with the {thing}. "I saw the fog and knew that you were out
        there," said {friend}. "So I played until you came." {hero} [hugged {fhim}|thanked {fhim} again and again]. They
        went inside, where a warm fire was burning, and [shut the door on the fog|had hot soup for supper].
        """,
    ),
    Plot(
        theme="hard work",
        hero=Character("Victor", "wolf", "he"),
        home="in a dark valley behind the hills",
        friend=Character("Poppy", "goat", "she"),
        thing="flute",
        colour="silver",
        summary="who learned to play the {thing}",
        text="""
        More than anything, {hero} wanted to make music. One day {he} found an old {thing} at the market and bought it
        with all {his} money. But when {he} played, it sounded terrible. [The neighbours closed their windows|Everybody
        covered their ears]. {hero} was ready to give up. "Nobody can play on the first day," said {friend} the {fkind}.
        "Play a little every morning, and I will listen." So {hero} played every morning, in sun and in rain. [After a
        month, the sound was not so bad|Week by week, the sound grew better]. After a year, it was beautiful. At the
        [summer|harvest] feast, {hero} played the {thing} for the whole village. When the song was over, everyone
        clapped, and {friend} clapped loudest of all.
        """,
    ),
    Plot(
        theme="kindness",
        hero=Character("Anna", "farmer", "she"),
        home="in a village between two hills",
        friend=Character("Ivan", "musician", "he"),
        thing="suitcase",
        colour="brown",
        summary="who was kind to a stranger",
        text="""
        One [rainy|grey] evening, a stranger came down the road with a heavy {thing}. It was {friend} the {fkind}.
        Nobody knew {fhim}, and nobody opened the door. "[{fhe} looks odd|We do not know {fhim}]," they said. But {hero}
        went out into the rain. "You must be tired," said {hero}. "Come in and sit by the fire." {friend} was [very
        thankful|so glad that {fhe} almost cried]. After supper, {fhe} opened the {thing}. It was full of
        [books|puppets|paints and brushes|tools]. "This is all I have," {fhe} said, "but I would like to share it." The
        next day {friend} showed the wonderful things from the {thing} to everyone in the village. Soon all the
        neighbours were sorry that they had been unkind. {friend} stayed, and [the stranger became a friend|nobody ever
        called {fhim} a stranger again].
        """,
    ),
    Plot(
        theme="adventure",
        hero=Character("Finn", "pirate", "he"),
        home="on an old ship in the bay",
        friend=Character("Kira", "parrot", "she"),
        thing="map",
        colour="green",
        summary="who looked for a treasure",
        text="""
        One day, {hero} found a {thing} in [an old book|a bottle|a wooden box]. It showed the way to a treasure [on the
        far hill|under the tallest tree|behind the waterfall]. {hero} ran to {friend} the {fkind}. "Will you come with
        me?" {he} asked. "Of course!" said {friend}. They walked [all morning|for two days], over the bridge and through
        the forest. At last they found the place and began to dig. Under the ground there was a {colour} chest. [Inside
        there was no gold|There was no gold in it], but there were [hundreds of seeds|many old books|warm blankets].
        "This is better than gold," said {friend}. "We can share it with everyone." They carried the chest home, and
        [the whole village was happy|everybody got something from it]. {hero} kept the {thing}, and whenever {he} looked
        at it, {he} thought of that day.
        """,
    ),
    Plot(
        theme="hard work",
        hero=Character("Quinn", "monkey", "he"),
        home="in a tree in the market square",
        friend=Character("Ella", "elephant", "she"),
        thing="town clock",
        colour="golden",
        summary="who mended the {thing}",
        text="""
        One morning the {thing} stopped, and nobody knew why. [Everything in the village went wrong|Nobody knew what to
        do]. The mayor called for help, but no one could mend it. "Let me try," said {hero}. Some people laughed,
        because {he} was only a {kind}. {hero} climbed up and looked at every part. {he} cleaned it and oiled it, but
        still the {thing} did not move. Then {friend} the {fkind} held up a light, and {hero} saw a [small stone|tiny
        nail|bird's nest] between two wheels. Very carefully, {he} took it out. Slowly the {thing} began to move again.
        Everybody cheered. "[Small eyes see small things|Good work needs patience]," said the mayor, and {hero} was
        asked to look after the {thing} from then on.
        """,
    ),
    Plot(
        theme="peace",
        hero=Character("Max", "puppy", "he"),
        home="in a garden full of roses",
        friend=Character("Juno", "kitten", "she"),
        thing="sled",
        colour="blue",
        summary="who quarrelled about a {thing}",
        text="""
        One day, {hero} and {friend} the {fkind} found a {colour} {thing}. "I saw it first!" said {hero}. "No, I did!"
        said {friend}. They pulled and pulled until the {thing} [broke in two|fell into the mud]. Then both of them went
        home and were angry. {hero} tried to play alone, but it was no fun. [The day felt very long|The house was too
        quiet]. In the evening {he} went to {friend}'s door. At the same moment the door opened, because {friend} was on
        {fhis} way to {hero}. "I am sorry," they both said, and then they [laughed|had to smile]. "A friend is worth
        more than a {thing}," said {hero}. The next morning they [mended|cleaned] the {thing} together, and from then on
        they shared it.
        """,
    ),
    Plot(
        theme="adventure",
        hero=Character("Adam", "knight", "he"),
        home="in a tower near the border",
        friend=Character("Sofia", "queen", "she"),
        thing="great waterfall",
        colour="white",
        summary="who wanted to see the {thing}",
        text="""
        {hero} had heard many stories about the {thing}, but {he} had never seen it. One [bright|clear] morning {he}
        packed some bread and an apple and set out with {friend} the {fkind}. [The road was long and dusty|They walked
        for three days], and at night they slept under the stars. "Are we nearly there?" asked {friend}. "Just one more
        hill," said {hero}. [They climbed the hill|Step by step they went on], and suddenly they stood still. There it
        was! The {thing} was [bigger|more beautiful] than they had ever thought. For a long time they said nothing. Then
        {hero} said, "I am glad that I am seeing it with you." When they came home, they told everyone about the
        {thing}, and [the children wanted to hear the story again and again|that night {hero} dreamed of the next
        journey].
        """,
    ),
    Plot(
        theme="fun",
        hero=Character("Oscar", "pig", "he"),
        home="in a sunny yard near a pond",
        friend=Character("Una", "duck", "she"),
        thing="moon",
        colour="yellow",
        summary="who saw a {thing} in the pond",
        text="""
        One night, {hero} looked into the pond and saw a shining {thing}. "[It fell into the water|It is lying in the
        water]!" {he} cried. "I must get it out." {he} fetched a [net|bucket], but each time the water moved, the
        {thing} broke into a hundred pieces. {hero} pulled so hard that {he} fell into the pond with a loud splash.
        {friend} the {fkind} heard the noise and came running. "What are you doing in there?" asked {friend}. "I am
        saving the {thing}!" said {hero}. {friend} laughed and pointed up. "It was only the moonlight on the water,"
        {fhe} said. {hero} looked up at the sky, and then {he} laughed as well. [They laughed until their sides
        hurt|They sat by the pond until late], and {hero} said that it was the best bath {he} had ever had.
        """,
    ),
    Plot(
        theme="courage",
        hero=Character("Charlie", "dog", "he"),
        home="in the house of the village doctor",
        friend=Character("Fern", "goose", "she"),
        thing="medicine",
        colour="white",
        summary="who carried {thing} through the [snow|night|forest]",
        text="""
        One [snowy|stormy] day, the doctor came to {hero} and said, "{friend} the {fkind} is ill and lives far away.
        Somebody must bring {fhim} this {thing}." "I will go," said {hero}. The road was [covered with snow|full of
        mud], and the wind was cold. At the bridge, a branch had fallen across the way, and {hero} climbed over it. In
        the forest {he} heard wolves, and {he} walked faster. [{he} was tired and wanted to sleep|{his} feet hurt], but
        {he} held the {thing} tight and went on. Late at night {he} knocked at {friend}'s door. "You came all this way
        for me?" said {friend}. "Yes," said {hero}, "and now you will get well." In a few days {friend} was well again,
        and {fhe} never forgot [who had walked through the night|what {hero} had done].
        """,
    ),
    Plot(
        theme="modesty",
        hero=Character("Dan", "lion", "he"),
        home="on the wide plains in the south",
        friend=Character("Rosa", "giraffe", "she"),
        thing="mane",
        colour="golden",
        summary="who was proud of {his} {thing}",
        text="""
        {hero} was very proud of {his} {thing}. "Nobody has a {thing} like mine," {he} said every day. [After a while,
        nobody wanted to hear it any more|Soon the others stopped coming to visit]. One day {he} was looking at
        {himself} in the river and [leaned too far|took one step too many]. Splash! {hero} fell into the cold water.
        "Help!" {he} cried. {friend} the {fkind} came at once and pulled {him} out with a long branch. {hero} was wet
        and muddy, and {his} proud looks were gone. "Why did you help me?" asked {hero}. "I was never nice to you."
        "[You needed help, and I was there|That is what friends are for]," said {friend}. {hero} thought about this for
        a long time. After that, {he} spoke less about {his} {thing} and asked the others how they were, and soon {he}
        was never alone.
        """,
    ),
    Plot(
        theme="fun",
        hero=Character("Zeno", "dragon", "he"),
        home="at the top of a tall mountain",
        friend=Character("Clara", "witch", "she"),
        thing="kitten",
        colour="black",
        summary="who heard a strange noise at night",
        text="""
        One night, {hero} heard a strange noise. Scratch, scratch, it went. {he} pulled the blanket over {his} head. "It
        is a monster!" {he} thought. In the morning {he} told {friend} the {fkind} about it. "Tonight we will watch
        together," said {friend}. So they sat in the dark and waited. [The clock struck ten|The moon came up]. Scratch,
        scratch! {hero} held {friend}'s hand and opened the door, very slowly. And there sat a {thing}! It was [cold and
        hungry|lost and very small]. "So you are the monster," said {hero}, and they both laughed. They gave the {thing}
        some [food and a warm place to sleep|bread and warm milk]. From then on, the {thing} stayed with {hero}, and
        [the nights were quiet|{he} was never afraid of noises again].
        """,
    ),
)
