"""What the bundled bases know: which things are drawn, which are kept back, and in which icon sets.

A concept is written `word=emoji name`, or only the name where both agree. Words are single, ordinary nouns where the
language allows it, because a prompt such as "a <toy>, center, blue background" puts a new word in the same place.
"""

from __future__ import annotations

STYLES = {"flat": "fluent-emoji-flat", "twemoji": "twemoji", "3d": "fluent-emoji-3d"}
"""Style word in captions -> icon set, for the generator. They agree in outline and differ in shading."""

CLIP_SETS = ("noto", "noto-v1", "fluent-emoji-flat", "fluent-emoji", "twemoji", "emojione")
MORE_SETS = ("fluent-emoji-3d", "streamline-emojis")
"""Learnt from by the CLIP without a rendering kept back, and no reason for a name to be known."""
UNSEEN_SET = "fxemoji"
"""Never used in any training: the honest figure for an unseen style."""

ALSO_CALLED = {"teddy bear": "toy"}
"""Emoji that the generator draws beside those of `DRAWN`, by a broader word half of the time."""

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
"""Caption word -> emoji name, for things that only the CLIP knows by a word of their own."""

KEPT_BACK: dict[str, str] = _parse(_KEPT_BACK)
"""Caption word -> emoji name, for the concepts that the generator never sees: they are there to be taught."""

_NOT_THINGS = (
    "clock", "o’clock", "thirty", "moon", "globe", "heart", "face", "speaker", "mailbox", "envelope", "tray", "book",
    "banknote", "chart", "page", "calendar", "medal", "oncoming", "ball", "map", "japan", "tokyo", "card", "note",
    "locked", "magnifying", "with", "arrow", "button", "sign", "phone", "suit",
)  # fmt: skip


def clip_names(by_group: dict[str, list[str]], sets_with: dict[str, set[str]]) -> dict[str, str]:
    """Caption word -> emoji name for the CLIP: the concepts with words of their own, and other things in five sets or more."""
    names = {**DRAWN, **KEPT_BACK, **NOT_DRAWN}
    taken = set(names.values())
    for group in ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects"):
        for name in by_group[group]:
            plain = not any(part in name.lower() for part in _NOT_THINGS)
            if plain and name not in taken and name not in names and len(sets_with[name]) >= 5:
                names[name] = name
    return names
