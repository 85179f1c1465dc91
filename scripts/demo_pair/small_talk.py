"""Short exchanges: greetings, capitals, conversions, sums, lists, spelling, and what the model doesn't know.

Every function gives a list of exchanges in the order they are said, each as (question, answer, brief answer, thought).
"""

from __future__ import annotations

from random import Random

from .text_world import COUNTRIES, LISTS, UNITS, UNKNOWN, UNKNOWN_WORDS, WORDS

Talk = list[tuple[str, str, str, str]]

ABOUT = (
    "I am the demo model of mlx_mtp, a very small language model with the architecture of Gemma 4. I can answer "
    "questions about this project, convert units, name capitals, tell short stories and write small pieces of code. "
    "For anything else you need a real Gemma 4 model."
)
GREETINGS: list[tuple[list[str], str]] = [
    (["Hello!", "Hi!", "Hello", "Hi", "Good morning!", "Good evening!", "Hey!", "Hi there!", "Hello there!"],
     "Hello! I am the small demo model of mlx_mtp. How can I help you?"),
    (["How are you?", "How are you today?", "How is it going?", "Are you well?"],
     "I am fine, thank you. I am only a small program, but I am ready to help. What would you like to know?"),
    (["Thanks!", "Thank you!", "Thank you very much.", "Thanks a lot!", "Great, thanks!"],
     "You are welcome! Is there anything else you would like to know?"),
    (["Goodbye!", "Bye!", "See you!", "Good night!"], "Goodbye! Thank you for trying the demo."),
    (["Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Introduce yourself."], ABOUT),
    (["What can you do?", "What can you help me with?", "What can I ask you?", "Help me.", "What do you know?"],
     "Here is what I can do:\n\n- answer questions about mlx_mtp, drafters and acceptance\n- convert units, such as "
     "hours to minutes\n- name the capitals of countries\n- tell short stories\n- write small Python functions and "
     "JSON\n- count, spell and make lists\n\nI am very small, so I don't know much else."),
    (["Are you Gemma?", "Are you a real Gemma model?", "Were you made by Google?", "Are you ChatGPT?"],
     "No. I have the architecture of Gemma 4, but I am a tiny model that was trained from scratch for this project. My "
     "weights have nothing to do with Google's."),
    (["Are you a human?", "Are you a person?", "Are you alive?"],
     "No, I am a program: a very small language model that shows how mlx_mtp works."),
    (["Tell me a joke.", "Do you know a joke?", "Make me laugh."],
     "Why did the drafter cross the road? It guessed that the target would go there anyway."),
    (["Ok.", "Okay", "Nice!", "Very good.", "Cool!", "I see."], "Good! What would you like to know next?"),
]  # fmt: skip


def greeting(rng: Random) -> Talk:
    """Greetings and questions about the model."""
    questions, answer = rng.choice(GREETINGS)
    question = rng.choice(questions)
    if rng.random() < 0.35:
        question = question.lower().rstrip("!.?")
    return [(question, answer, answer, "The user is talking to me. I answer in a friendly way.")]


def capital(rng: Random) -> Talk:
    """Capitals, with questions that refer to what was said before."""
    country, city, continent, language, currency = rng.choice(COUNTRIES)
    thought = f"The user asks for the capital of {country}. That is {city}."
    answer = f"The capital of {country} is {city}."
    ask = rng.choice([
        "What is the capital of {}?", "Which city is the capital of {}?", "Capital of {}?",
        "Tell me the capital of {}.", "What's the capital of {}?", "Do you know the capital of {}?",
        "Name the capital of {}.",
    ])  # fmt: skip
    talk = [(ask.format(country), answer, f"{city}.", thought)]
    for _ in range(rng.choice([0, 1, 2, 3])):
        kind, about = rng.randrange(4), f"We talk about {country}."
        if kind == 0:
            country, city, continent, language, currency = rng.choice(COUNTRIES)
            ask = rng.choice(["And of {}?", "And {}?", "What about {}?", "And the capital of {}?"])
            thought = f"Now the user asks for the capital of {country}. That is {city}."
            talk.append((ask.format(country), f"The capital of {country} is {city}.", f"{city}.", thought))
        elif kind == 1:
            ask = rng.choice(["Which continent is it on?", "On which continent is it?",
                              f"Which continent is {country} on?"])  # fmt: skip
            talk.append((ask, f"{country} is in {continent}.", f"{continent}.", about))
        elif kind == 2:
            ask = rng.choice(["Which language do people speak there?", "What language is spoken there?",
                              f"Which language is spoken in {country}?"])  # fmt: skip
            talk.append((ask, f"In {country} most people speak {language}.", f"{language}.", about))
        else:
            ask = rng.choice(["Tell me more about it.", f"Tell me more about {country}.", "Tell me more."])
            more = (
                f"{country} is a country in {continent}. Its capital is {city}. Most people there speak {language}, "
                f"and they pay with the {currency}. If you visit {country}, {city} is a good place to start."
            )
            thought = f"{about[:-1]}, so I say what I know of it."
            talk.append((ask, more, f"A country in {continent}.", thought))
    return talk


def conversion(rng: Random) -> Talk:
    """Conversions of units, step by step."""
    talk: Talk = []
    for _ in range(rng.choice([1, 1, 2])):
        talk.append(_temperature(rng) if rng.random() < 0.12 else _units(rng, bool(talk)))
    return talk


def _units(rng: Random, follows: bool) -> tuple[str, str, str, str]:
    one, many, _, small, factor = rng.choice(UNITS)
    n = rng.randint(1, 12) if factor in (7, 12, 24, 60) else rng.randint(1, 20)
    unit = one if n == 1 else many
    steps = f"1 {one} is {factor} {small}. {n} x {factor} = {n * factor}."
    answer = f"There are {n * factor} {small} in {n} {unit}.\n\nStep by step:\n- 1 {one} is {factor} {small}\n"
    answer += f"- {n} x {factor} = {n * factor}\n\nSo {n} {unit} {'is' if n == 1 else 'are'} {n * factor} {small}."
    asks = [f"How many {small} are in {n} {unit}?", f"Convert {n} {unit} to {small}.", f"{n} {unit} in {small}?",
            f"What is {n} {unit} in {small}?", f"How many {small} is {n} {unit}?"]  # fmt: skip
    ask = f"And {n} {unit} in {small}?" if follows else rng.choice(asks)
    return ask, answer, f"{n * factor} {small}.", steps


def _temperature(rng: Random) -> tuple[str, str, str, str]:
    celsius = 5 * rng.randint(0, 20)
    half, result = celsius * 9 // 5, celsius * 9 // 5 + 32
    answer = (
        f"{celsius} degrees Celsius are {result} degrees Fahrenheit.\n\nStep by step:\n- {celsius} x 9 / 5 = {half}\n"
        f"- {half} + 32 = {result}\n\nSo {celsius} degrees Celsius are {result} degrees Fahrenheit."
    )
    ask = rng.choice(["Convert {} degrees Celsius to Fahrenheit.", "What is {} Celsius in Fahrenheit?",
                      "How many degrees Fahrenheit are {} degrees Celsius?"])  # fmt: skip
    thought = f"{celsius} x 9 / 5 = {half}. {half} + 32 = {result}."
    return ask.format(celsius), answer, f"{result} degrees.", thought


def calculation(rng: Random) -> Talk:
    """Small sums."""
    a, b = rng.randint(1, 10), rng.randint(1, 10)
    sign, word, result = rng.choice([("+", "plus", a + b), ("x", "times", a * b), ("-", "minus", a)])
    if sign == "-":
        a = result + b
    ask = rng.choice([f"What is {a} {sign} {b}?", f"{a} {sign} {b}?", f"What is {a} {word} {b}?",
                      f"How much is {a} {sign} {b}?"])  # fmt: skip
    return [(ask, f"{a} {sign} {b} = {result}.", f"{result}.", f"I compute {a} {sign} {b} = {result}.")]


def listing(rng: Random) -> Talk:
    """Lists, and counting."""
    if rng.random() < 0.3:
        first = rng.randint(1, 9)
        numbers = list(range(first, first + rng.randint(3, 12)))
        down = rng.random() < 0.3
        text = ", ".join(map(str, reversed(numbers) if down else numbers)) + "."
        ends = (numbers[-1], numbers[0]) if down else (numbers[0], numbers[-1])
        ask = f"Count from {ends[0]} to {ends[1]}" + rng.choice([".", "", ", please."])
        return [(ask, text, text, f"I count from {ends[0]} to {ends[1]}, one by one.")]
    what, items = rng.choice(LISTS)
    ask = rng.choice(["List {}.", "Name {}.", "What are {}?", "Give me a list of {}.", "Tell me {}."]).format(what)
    lines = "\n".join(f"- {item}" for item in items)
    numbered = "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))
    talk: Talk = [(ask, f"Here are {what}:\n\n{lines}", ", ".join(items) + ".", f"The user wants a list of {what}.")]
    if rng.random() < 0.3:
        talk.append((rng.choice(["Number them.", "With numbers, please."]), numbered, numbered, "I number the list."))
    if rng.random() < 0.3:
        count = f"There are {len(items)} in the list."
        ask = rng.choice(["How many are there?", "How many are these?"])
        talk.append((ask, count, f"{len(items)}.", "I count the list."))
    return talk


def spelling(rng: Random) -> Talk:
    """Spelling, letters and capital letters."""
    word = rng.choice(WORDS)
    kind = rng.randrange(4)
    if kind == 0:
        ask = rng.choice([f"Spell {word}.", f"Spell the word {word}.", f"How do you spell {word}?"])
        answer = f"{word} is spelled {'-'.join(word)}."
    elif kind == 1:
        ask = rng.choice([f"How many letters are in {word}?", f"How many letters does {word} have?"])
        answer = f"The word {word} has {len(word)} letters: {', '.join(word)}."
    elif kind == 2:
        ask = rng.choice([f"Write {word} in capital letters.", f"Put {word} in upper case."])
        answer = f"{word.upper()}"
    else:
        ask = rng.choice([f"What is the first letter of {word}?", f"Which letter does {word} begin with?"])
        answer = f"The word {word} begins with the letter {word[0]}."
    return [(ask, answer, answer, f"The letters of {word} are {', '.join(word)}.")]


def unknown(rng: Random) -> Talk:
    """Questions outside the domain."""
    words = {**UNKNOWN_WORDS, "country": [c[0] for c in COUNTRIES], "city": [c[1] for c in COUNTRIES],
             "language": [c[3] for c in COUNTRIES]}  # fmt: skip
    ask = rng.choice(UNKNOWN).format(**{key: rng.choice(options) for key, options in words.items()})
    answer = (
        "I don't know that. I am only a small demo model. I can answer questions about mlx_mtp, convert units, name "
        "capitals, tell short stories and write small pieces of code."
    )
    return [(ask, answer, "I don't know that.", "This is not something I know. I should say so.")]
