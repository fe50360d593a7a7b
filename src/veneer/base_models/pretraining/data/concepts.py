"""Concepts of the bundled base models: which the generator is trained on, which are held out, and in which icon sets.

A concept is written `word=emoji name`, or only the name if both are equal. Words are single, ordinary nouns if possible, because
prompts such as "a <toy>, center, blue background" use a new token in their place.
"""

from __future__ import annotations

STYLES = {"flat": "fluent-emoji-flat", "twemoji": "twemoji", "3d": "fluent-emoji-3d"}
"""Style word in captions -> icon set, for the generator. They agree in outline and differ in shading."""

CLIP_SETS = ("noto", "noto-v1", "fluent-emoji-flat", "fluent-emoji", "twemoji", "emojione")
MORE_SETS = ("fluent-emoji-3d", "streamline-emojis")
"""Additional training sets of the CLIP, without held-out renderings; they do not add names."""
UNSEEN_SET = "fxemoji"
"""Held out from all training, to evaluate an unseen style."""

ALSO_CALLED = {"teddy bear": "toy"}
"""Emoji of the generator in addition to `DRAWN`, with a broader word in half of the captions."""

_DRAWN = """
apple=red apple, pear, banana, lemon, cherry=cherries, strawberry, grapes, watermelon, pineapple, tomato, carrot,
mushroom, bread, cheese=cheese wedge, burger=hamburger, pizza, donut=doughnut, cookie, ice cream=soft ice cream,
coffee=hot beverage, beer=beer mug,
dog=dog face, cat=cat face, fox, lion, tiger=tiger face, horse=horse face, cow=cow face, pig=pig face,
rabbit=rabbit face, bear, panda, monkey=monkey face, frog, chick=front-facing baby chick, penguin, owl, elephant,
turtle, whale=spouting whale, fish, crab, butterfly, bee=honeybee, ladybug=lady beetle, snail,
rose, sunflower, tulip, tree=deciduous tree, pine tree=evergreen tree, palm tree, cactus, maple leaf,
sun, moon=crescent moon, star, cloud, rainbow, lightning=high voltage, snowflake, fire, drop=droplet,
snowman=snowman without snow,
house, car=automobile, bus, train=locomotive, airplane, rocket, boat=sailboat,
ball=soccer ball, basketball, balloon, gift=wrapped gift, crown, ring, diamond=gem stone, hat=top hat, shirt=t-shirt,
dress, shoe=running shoe, umbrella, key, lock=locked, bell, clock=alarm clock, phone=mobile phone, camera,
light bulb, candle, book=closed book, pencil, scissors, guitar, heart=red heart, skull, ghost, pumpkin=jack-o-lantern,
smiley=grinning face
"""

_NOT_DRAWN = """
corn=ear of corn, eggplant, fries=french fries, egg=cooking, cake=birthday cake, candy, wine=wine glass, mouse=mouse face,
koala, snake, dolphin, unicorn, dragon=dragon face, clover=four leaf clover, volcano, earth=globe showing Americas,
castle, truck=delivery truck, bicycle, helicopter, tractor, baseball, bag=handbag, backpack, computer=laptop,
television, hammer, trumpet, drum, violin, trophy, dice=game die, robot, alien, christmas tree, teddy bear
"""

_KEPT_BACK = """
octopus, duck, shark, squirrel=chipmunk, rooster, crocodile, avocado, croissant, saxophone, motorcycle, anchor, tent
"""


def _parse(text: str) -> dict[str, str]:
    pairs = (item.strip().partition("=") for item in " ".join(text.split()).split(","))
    return {word: name or word for word, _, name in pairs}


DRAWN: dict[str, str] = _parse(_DRAWN)
"""Caption word -> emoji name, for every concept the generator is trained on."""

NOT_DRAWN: dict[str, str] = _parse(_NOT_DRAWN)
"""Caption word -> emoji name, for things that only the CLIP is trained on."""

KEPT_BACK: dict[str, str] = _parse(_KEPT_BACK)
"""Caption word -> emoji name, for concepts held out from the generator, to be used as new concepts."""

_NOT_THINGS = (
    "clock", "o’clock", "thirty", "moon", "globe", "heart", "face", "speaker", "mailbox", "envelope", "tray", "book",
    "banknote", "chart", "page", "calendar", "medal", "oncoming", "ball", "map", "japan", "tokyo", "card", "note",
    "locked", "magnifying", "with", "arrow", "button", "sign", "phone", "suit",
)  # fmt: skip


def clip_names(by_group: dict[str, list[str]], sets_with: dict[str, set[str]]) -> dict[str, str]:
    """Caption word -> emoji name for the CLIP: the concepts above, and other things in at least five sets."""
    names = {**DRAWN, **KEPT_BACK, **NOT_DRAWN}
    taken = set(names.values())
    for group in ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects"):
        for name in by_group[group]:
            plain = not any(part in name.lower() for part in _NOT_THINGS)
            if plain and name not in taken and name not in names and len(sets_with[name]) >= 5:
                names[name] = name
    return names
