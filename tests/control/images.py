"""Images with a known outline, drawn at high resolution and reduced, so that edges are smooth as in a photo."""

import numpy as np
from PIL import Image, ImageDraw

from tests.training.images import DATA

PURPLE, GREEN, SKY = (147, 102, 208), (62, 164, 82), (150, 206, 246)
PHOTOS = DATA / "subjects"


def disc(side=64, color=PURPLE, ground=SKY, radius=0.3, centre=(0.5, 0.5)):
    """A disc; radius and center (x, y) are fractions of the side."""
    image = Image.new("RGB", (4 * side, 4 * side), ground)
    x, y = (4 * side * part for part in centre)
    reach = 4 * side * radius
    ImageDraw.Draw(image).ellipse((x - reach, y - reach, x + reach - 1, y + reach - 1), fill=color)
    return image.resize((side, side), Image.Resampling.BOX)


def distances(side=64, centre=(0.5, 0.5)):
    """Distance of each pixel's center to the disc's center, (side, side), in pixels."""
    y, x = np.indices((side, side)) + 0.5
    return np.hypot(x - side * centre[0], y - side * centre[1])


def scene(side=64):
    """Several shapes on a slope of colors."""
    image = Image.new("RGB", (1024, 1024))
    slope = np.tile(np.linspace(170, 230, 1024)[:, None, None], (1, 1024, 3)) * (0.7, 0.9, 1.0)
    image.paste(Image.fromarray(slope.astype(np.uint8)))
    draw = ImageDraw.Draw(image)
    draw.rectangle((180, 420, 560, 860), fill=(200, 60, 50))
    draw.polygon([(140, 420), (600, 420), (370, 200)], fill=(90, 50, 40))
    draw.ellipse((660, 150, 860, 350), fill=(250, 210, 70))
    draw.rectangle((640, 600, 880, 860), fill=GREEN)
    return image.resize((side, side), Image.Resampling.LANCZOS)


def white(image):
    """Where a map is white."""
    return np.asarray(image.convert("L")) >= 128


def drawing(values):
    """An RGB image, white where true."""
    return Image.fromarray(np.asarray(values, np.uint8) * 255).convert("RGB")
