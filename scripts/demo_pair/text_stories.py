"""Short stories from parts: a hero, a place, a thing, a trouble and its end.

The first of several wordings is the likeliest, so that the most probable story is one coherent text, and sampling
gives others.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

HEROES = {
    "fox": "clever", "rabbit": "shy", "owl": "wise", "mouse": "brave", "bear": "gentle", "cat": "curious",
    "dog": "loyal", "dragon": "small", "robot": "friendly", "girl": "cheerful", "boy": "quiet", "sailor": "old",
    "king": "lonely", "baker": "busy", "hedgehog": "sleepy", "turtle": "patient",
}  # fmt: skip
NAMES = (
    "Mira Tom Lena Otto Nora Finn Ada Max Lily Hugo Rosa Ben Ella Sam Ida Leo Maya Paul Zoe Karl Anna Oscar Tilda Jack"
).split()
PLACES = {
    "in a quiet forest": "the trees", "in a village by the sea": "the waves", "on a high mountain": "the clouds",
    "in a busy town": "the roofs", "on a little island": "the palms", "in an old castle": "the towers",
    "in a green valley": "the hills", "in a house by a lake": "the reeds",
}  # fmt: skip
THINGS = {
    "a golden key": ("it opened a small door", "behind the door there was a garden full of light"),
    "an old map": ("it showed a path that nobody knew", "at the end of the path there was a hidden spring"),
    "a silver bell": ("it rang whenever somebody was sad", "its sound made everybody gentle again"),
    "a blue lantern": ("its light never went out", "it showed the way home to all who were lost"),
    "a wooden flute": ("its song could calm the wind", "the storm grew quiet and the stars came out"),
    "a paper boat": ("it could sail against the wind", "it brought letters to friends far away"),
    "a strange seed": ("it grew in a single night", "in the morning there was a tree with sweet fruit"),
    "a broken clock": ("it ran backwards", "it gave back one lost hour to everybody"),
}  # fmt: skip
TROUBLES = {
    "a storm": ("a storm came up and the sky turned black", "the storm", "the storm was over"),
    "a thief": ("a thief came in the night and took it away", "the thief", "the thief was caught"),
    "a river": ("the river rose and carried the bridge away", "the river", "the river was low again"),
    "a giant": ("a giant sat down in the middle of the road", "the giant", "the giant stood up and went away"),
    "the dark": ("it grew so dark that nobody could see the way", "the dark", "the dark was gone"),
    "a quarrel": ("the neighbours began to quarrel about it", "the quarrel", "the quarrel was over"),
}


def pick(rng: Random, options: list[str]) -> str:
    """One of the options, the first most likely."""
    return next((option for option in options if rng.random() < 0.7), options[0])


@dataclass(frozen=True)
class Story:
    """A story and what is needed to talk about it.

    Attributes:
        hero, name, place, thing, trouble: Its parts, as in the tables above.
        title: Its title.
        text: The story.
        moral: What it teaches.
    """

    hero: str
    name: str
    place: str
    thing: str
    trouble: str
    title: str
    text: str
    moral: str


def story(rng: Random) -> Story:
    """A new story."""
    hero, name = rng.choice(list(HEROES)), rng.choice(NAMES)
    place, thing, trouble = rng.choice(list(PLACES)), rng.choice(list(THINGS)), rng.choice(list(TROUBLES))
    short = thing.split(" ", 1)[1]
    power, wonder = THINGS[thing]
    event, enemy, relief = TROUBLES[trouble]
    adjective = HEROES[hero]
    first = f"Once upon a time there was {_a(adjective)} {hero} named {name}, who lived {place}."
    habit = pick(
        rng,
        [
            f"Every morning {name} looked out and wondered what lay behind {PLACES[place]}.",
            f"{name} had many friends, but nobody had ever been far away.",
            f"Every evening {name} sat at the window and listened to {PLACES[place]}.",
        ],
    )
    find = pick(
        rng,
        [
            f"One day {name} found {thing}.",
            f"One day an old woman gave {name} {thing}.",
            f"One cold morning there was {thing} in front of the door.",
        ],
    )
    wonders = pick(
        rng,
        [
            f"It was no common {short}: {power}.",
            f"Soon {name} saw that the {short} was special: {power}.",
        ],
    )
    trial = pick(
        rng,
        [
            f"But then {event}.",
            f"For a while all was well, but then {event}.",
        ],
    )
    fear = pick(
        rng,
        [
            f"Everybody was afraid of {enemy}, and nobody knew what to do.",
            f"{name} was afraid of {enemy}, but did not run away.",
        ],
    )
    deed = pick(
        rng,
        [
            f'"We must not give up," said {name}, and took the {short} and went out alone.',
            f'"I will try," said {name}, and walked on step by step with the {short}.',
        ],
    )
    helper = pick(
        rng,
        [
            "On the way a little bird came and helped.",
            "On the way an old friend came along, and together they were not afraid.",
        ],
    )
    turn = f"At last {relief}, and {wonder}."
    end = pick(
        rng,
        [
            f"From that day on {name} was known in the whole land, and the {short} was never lost again.",
            f"{name} came home, tired and happy, and told the story to everybody.",
            f"That night {name} slept well, and the {short} lay beside the bed.",
        ],
    )
    moral = {
        "a storm": "Even the worst storm ends if you don't give up.",
        "a thief": "What you love is worth looking for.",
        "a river": "Where there is no bridge, a friend can help.",
        "a giant": "Even a giant is not too big for a brave heart.",
        "the dark": "A small light is enough to find the way.",
        "a quarrel": "A kind word can end a quarrel.",
    }[trouble]
    text = f"{first} {habit} {find} {wonders}\n\n{trial} {fear} {deed} {helper}\n\n{turn} {end}"
    title = f"{name} and the {short.title()}"
    return Story(hero, name, place, thing, trouble, title, text, moral)


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
