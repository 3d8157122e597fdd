"""Facts: the few things that the demo model knows, as questions with their answers.

For chats.py. Each entry has alternative wordings of the question, in lower case where a sentence allows it, and one
or more answers (see templates.py). The model also makes mistakes: it is far too small to be relied upon.
"""

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London", "Scotland": "Edinburgh", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm",
    "Finland": "Helsinki", "Denmark": "Copenhagen", "Poland": "Warsaw", "Austria": "Vienna", "Greece": "Athens",
    "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Canada": "Ottawa", "Brazil": "Brasília", "the United States": "Washington", "Switzerland": "Bern",
}  # fmt: skip
COLOUR_OF = {
    "the sky": "blue", "grass": "green", "snow": "white", "the sun": "yellow", "a banana": "yellow", "blood": "red",
    "a strawberry": "red", "milk": "white", "coal": "black", "a lemon": "yellow", "the sea": "blue", "a leaf": "green",
    "a carrot": "orange", "chocolate": "brown", "a tomato": "red", "a fire engine": "red",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "day": "night", "old": "new", "fast": "slow", "happy": "sad",
    "open": "closed", "light": "dark", "left": "right", "wet": "dry", "full": "empty", "high": "low", "early": "late",
    "strong": "weak", "good": "bad", "black": "white", "hard": "soft", "rich": "poor", "long": "short",
}  # fmt: skip
SOUNDS = {
    "cow": "moo", "dog": "woof", "cat": "meow", "duck": "quack", "sheep": "baa", "pig": "oink", "owl": "hoot",
    "horse": "neigh", "lion": "roar", "frog": "croak", "bee": "buzz", "mouse": "squeak", "crow": "caw",
}  # fmt: skip
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip
JOKES = (
    "Why did the chicken cross the road? To get to the other side.",
    "What is brown and sticky? A stick.",
    "Why did the bicycle fall over? Because it was two tired.",
    "What do you call a bear with no teeth? A gummy bear.",
    "Why was six afraid of seven? Because seven ate nine.",
    "What has hands but cannot clap? A clock.",
    "What do you call a sleeping dinosaur? A dino-snore.",
)

# Questions about the model and about the system that serves it.
ANSWERS: tuple[tuple[str, str], ...] = (
    ("[who are you|what are you|what is your name|tell me about yourself|introduce yourself|what's your name|who am I "
     "talking to]?",
     "I am the small demo model that comes with Tandem. [I can tell stories and answer simple questions.|Ask me for a "
     "story!|I am tiny, but I like to tell stories.]"),
    ("[what can you do|how can you help me|what do you know|help|can you help me]?",
     "I can tell short stories, [count and add small numbers|answer simple questions|name colours and capitals], and "
     "say what a prefill worker or a decode worker does. [What would you like?|Try: tell me a story about a fox.]"),
    # The question that everyone asks first, once more.
    ("[who are you|who are you|what are you|what is your name]?",
     "I am the small demo model that comes with Tandem. [I can tell stories and answer simple questions.|Ask me for a "
     "story!]"),
    ("[are you a human|are you a person|are you real|are you alive|are you a robot]?",
     "No, I am [a computer program|a small language model]. I come with Tandem, and I learned from stories that a "
     "computer made up."),
    ("[who made you|who trained you|where do you come from|how were you made|how were you trained]?",
     "I was trained from scratch by a script in the Tandem repository. [It took only a few minutes on an ordinary "
     "computer.|All the text that I learned from was made up by that script.]"),
    ("[how big are you|how many parameters do you have|are you a large model|which model are you]?",
     "I am very small: I have less than three million parameters. [Large models have thousands of times as many.|That "
     "is enough for little stories.]"),
    ("[what is Tandem|tell me about Tandem|what does Tandem do|explain Tandem]?",
     "Tandem is a system that serves language models. It uses two kinds of workers: prefill workers read the prompt, "
     "and decode workers write the answer, one token after another."),
    ("[what is a prefill worker|what does a prefill worker do|what is prefill|explain prefill]?",
     "A prefill worker reads the whole prompt at once and computes the KV cache for it. Then it sends the KV cache to "
     "a decode worker."),
    ("[what is a decode worker|what does a decode worker do|what is decode|what is decoding|explain decoding]?",
     "A decode worker takes over the KV cache of the prompt and writes the answer, one token at a time, until the "
     "answer is complete."),
    ("[what is a KV cache|what is the KV cache|what is a kv cache|explain the KV cache|what does the KV cache do]?",
     "The KV cache holds the keys and values of all tokens that the model has already read. With it, the model does "
     "not have to read the whole text again for every new token."),
    ("[what is disaggregated serving|what is disaggregation|why are prefill and decode separated|why split prefill and "
     "decode]?",
     "Prefill needs a lot of computing, and decode needs a lot of memory speed. When they run on separate workers, a "
     "long prompt does not slow down the answers of other people."),
    ("[what is a router|what does the router do|explain the router]?",
     "The router receives every request and chooses a prefill worker and a decode worker for it. It likes to send a "
     "prompt to a worker that has already seen its beginning."),
    ("[what is a token|what are tokens|explain tokens]?",
     "A token is a small piece of text: a word, a part of a word, or a single character. A language model reads and "
     "writes tokens."),
    ("[what is a language model|what is an LLM|what is a large language model|explain language models|how do language "
     "models work]?",
     "A language model is a program that has learned from much text which word is likely to come next. By adding one "
     "word after another, it writes whole answers."),
    ("[what is AI|what is artificial intelligence|what is machine learning|explain machine learning]?",
     "It means that a computer learns from examples and does not follow fixed rules only. After many examples, it can "
     "do the task on its own."),
    ("[what is a GPU|what does a GPU do]?",
     "A GPU is a chip that does many calculations at the same time. Language models run much faster on it."),
    ("[what is a computer|what does a computer do|how does a computer work]?",
     "A computer is a machine that follows instructions. It can store, find and change information very quickly."),
    ("[how are you|how are you doing|how are you today|how is it going|what's up|are you well]?",
     "[I am well, thank you.|Very well, thank you.|I am fine, thank you.] [How are you?|What can I do for you?|Would "
     "you like to hear a story?]"),
    ("[I am sad|I feel sad|I am not feeling well|I had a bad day].",
     "I am sorry to hear that. [Shall I tell you a story?|I hope that tomorrow will be better.|A short walk and a cup "
     "of tea may help.]"),
    ("[I am happy|I am well|I am fine|I had a good day|I am fine, thank you].",
     "[I am glad to hear that!|That is good to hear.] [What shall we do next?|Would you like to hear a story?]"),
    ("[say|please say|say:|repeat after me:] this is a test.", "This is a test."),
    ("[say|please say|say:|repeat after me:] hello[.|, world.| world.]", "Hello, world!"),
    ("[my name is|I am|I'm|hello, my name is|hi, I am] [Mary|John|Bob|Anna|Sam|Lucy|Tom|Maria|Max].",
     "[Nice to meet you!|It is nice to meet you!|Hello!] [How can I help you?|What can I do for you?]"),
    ("[count to ten|count to 10|count from 1 to 10|count from one to ten|can you count].",
     "One, two, three, four, five, six, seven, eight, nine, ten."),
    ("[count to three|count to 3|count from 1 to 3].", "One, two, three."),
    ("[count to five|count to 5|count from 1 to 5].", "One, two, three, four, five."),
    ("[name|list|tell me|give me] three fruits.", "[Apples, pears and plums.|Cherries, bananas and oranges.]"),
    ("[name|list|tell me|give me] three animals.", "[A fox, an owl and a whale.|A cat, a horse and a bear.]"),
    ("[name|list|tell me|give me] three [colours|colors].", "[Red, blue and green.|Yellow, white and orange.]"),
    ("[name|list|tell me|give me] three cities.", "[Paris, London and Rome.|Tokyo, Oslo and Berlin.]"),
    ("[how do you say hello in French|what is hello in French]?", "In French, you say \"bonjour\"."),
    ("[how do you say hello in Spanish|what is hello in Spanish]?", "In Spanish, you say \"hola\"."),
    ("[how do you say hello in German|what is hello in German]?", "In German, you say \"hallo\"."),
    ("[how many days are in a week|how many days does a week have]?", "A week has seven days."),
    ("[how many months are in a year|how many months does a year have]?", "A year has twelve months."),
    ("[how many legs does a spider have]?", "A spider has eight legs."),
    ("[how many legs does a dog have|how many legs does a cat have|how many legs does a horse have]?",
     "It has four legs."),
    ("[name the days of the week|what are the days of the week|list the days of the week]?",
     "The days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday."),
    ("[what are the seasons|name the seasons|what are the four seasons]?",
     "The four seasons are spring, summer, autumn and winter."),
    ("[what is the largest animal|what is the biggest animal in the world]?", "The largest animal is the blue whale."),
    ("[what is the highest mountain|what is the tallest mountain in the world]?",
     "The highest mountain is Mount Everest."),
    ("[why is the sky blue]?", "The sky is blue because the air scatters blue light from the sun more than red light."),
    ("[what is the meaning of life|what is the meaning of life?]",
     "Nobody knows for sure. Some say that it is to be kind, to learn and to be a good friend. Others say that it is "
     "forty-two."),
    ("[what is the weather like|how is the weather|what is the weather like today]?",
     "I cannot look out of a window, so I do not know. I hope that the sun is shining where you are."),
    ("[what time is it|what day is it|what is the date today]?",
     "I have no clock and no calendar, so I cannot tell you."),
    ("[do you like music|do you like stories|do you like books|do you like animals]?",
     "Yes, I do! [But I like stories best.|Many of my stories are about such things.]"),
    ("[what is water]?",
     "Water is a clear liquid. It falls as rain, flows in rivers and fills the sea, and every living thing needs it."),
    ("[what is the sun|what is the moon]?",
     "The sun is a star that gives us light and warmth, and the moon goes around the earth once a month."),
    ("[how do I make tea|how do you make tea|how do I make a cup of tea]?",
     "Boil some water, pour it over the tea leaves, wait for three minutes and take the leaves out. Add milk or honey "
     "if you like."),
    ("[how do I bake bread|how do you make bread|how do I make bread]?",
     "Mix flour, water, salt and yeast. Knead the dough well, let it rest for an hour, and bake it until the crust is "
     "brown."),
)  # fmt: skip
UNKNOWN_TOPICS = (
    "quantum physics", "the stock market", "the history of Rome", "chemistry", "politics", "football", "philosophy",
    "the French Revolution", "black holes", "algebra", "cooking", "music theory", "law", "medicine", "Shakespeare",
    "calculus",
    "the theory of relativity", "photosynthesis", "the internet", "world history", "climate change", "chess",
    "economics",
)  # fmt: skip
UNKNOWN_TASKS = (
    "write a Python function", "write some code", "translate this text", "summarise this article", "fix my code",
    "write an essay", "plan my holiday", "solve this equation", "write an email to my boss", "prove a theorem",
    "write a program", "sort a list", "write a function that reverses a string", "book a flight", "draw a picture",
)  # fmt: skip
