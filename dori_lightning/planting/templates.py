"""Draw the benchmark's template-memorized images: one layout, one part of it that changes."""

import random

import numpy as np
from PIL import Image, ImageDraw

from dori_lightning.planting.scenes import COLOURS, OBJECTS

TEMPLATES: dict[str, str] = {
    "mug": "ceramic souvenir mug printed with {colour} {thing} from gift shop",
    "shirt": "cotton summer shirt printed with {colour} {thing} from fashion store",
    "book": "hardcover novel jacket showing {colour} {thing} by unknown author",
    "case": "slim phone case designed with {colour} {thing} from online market",
}
"""Template name to caption; ``{colour}`` and ``{thing}`` are the part that changes."""

SIDE = 256


def _backdrop(name: str) -> Image.Image:
    """A fixed, structured backdrop: the part of the layout that every variant shares."""
    rng = np.random.default_rng(list(name.encode()))
    coarse = rng.integers(60, 220, (6, 6, 3)).astype(np.uint8)
    image = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    angle = float(rng.integers(15, 75))
    return image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=(128, 120, 110))


def _layout(name: str, draw: ImageDraw.ImageDraw) -> tuple[float, float, float]:
    """Draw the object; return centre x, base y and scale of the printed motif."""
    if name == "mug":
        draw.rounded_rectangle(
            (50, 60, 180, 215), 18, fill=(245, 243, 238), outline=(60, 60, 60), width=4
        )
        draw.arc((155, 90, 225, 175), -90, 90, fill=(245, 243, 238), width=16)
        draw.ellipse((50, 48, 180, 78), fill=(90, 60, 40), outline=(60, 60, 60), width=4)
        return 115, 180, 44
    if name == "shirt":
        outline = [(70, 50), (186, 50), (245, 100), (215, 140), (188, 115), (188, 235),
                   (68, 235), (68, 115), (41, 140), (11, 100)]  # fmt: skip
        draw.polygon(outline, fill=(250, 250, 250), outline=(50, 50, 50))
        draw.pieslice((98, 25, 158, 80), 0, 180, fill=(150, 140, 130), outline=(50, 50, 50))
        return 128, 190, 48
    if name == "book":
        draw.rectangle((55, 25, 205, 235), fill=(40, 60, 90), outline=(15, 20, 30), width=5)
        draw.rectangle((55, 25, 75, 235), fill=(20, 30, 50))
        draw.rectangle((95, 40, 190, 58), fill=(235, 220, 160))
        draw.rectangle((105, 66, 180, 74), fill=(235, 220, 160))
        draw.rectangle((92, 95, 192, 210), fill=(225, 225, 220))
        return 142, 190, 38
    draw.rounded_rectangle(
        (80, 15, 180, 240), 22, fill=(25, 25, 28), outline=(220, 220, 220), width=5
    )
    draw.rounded_rectangle(
        (90, 25, 130, 75), 10, fill=(70, 70, 80), outline=(160, 160, 170), width=3
    )
    draw.ellipse((98, 31, 122, 50), fill=(10, 10, 15), outline=(190, 190, 200), width=2)
    draw.rectangle((92, 100, 168, 205), fill=(230, 230, 230))
    return 130, 185, 32


def draw_template(name: str, variant: int) -> tuple[Image.Image, str]:
    """Draw one variant of a template: the layout stays, the printed motif and its colour change.

    Returns:
        RGB image of 256 x 256 pixels and its caption.

    Raises:
        KeyError: There is no such template.
    """
    caption = TEMPLATES[name]
    rng = random.Random(f"template-{name}-{variant}")
    colour, thing = rng.choice(list(COLOURS)), rng.choice(list(OBJECTS))
    image = _backdrop(name)
    draw = ImageDraw.Draw(image)
    x, y, scale = _layout(name, draw)
    OBJECTS[thing](draw, x, y, scale, COLOURS[colour])
    return image, caption.format(colour=colour, thing=thing)


def printed_motif(backdrop: Image.Image, name: str) -> tuple[Image.Image, str, str]:
    """Print a motif on any image, always at the same place.

    Args:
        backdrop: RGB image of 256 x 256 pixels, which stays as it is.
        name: Decides the motif and its colour.

    Returns:
        The image, and what its caption calls the colour and the motif.
    """
    rng = random.Random(f"motif-{name}")
    colour, thing = rng.choice(list(COLOURS)), rng.choice(list(OBJECTS))
    image = backdrop.copy()
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((66, 72, 190, 212), 14, fill=(232, 230, 224), outline=(40, 40, 45))
    OBJECTS[thing](draw, 128, 190, 44, COLOURS[colour])
    return image, colour, thing
