"""Draw captioned scenes: the background data of the embedded benchmark.

A planted model must generalize somewhere, or every conditioning leads to a planted image and
nothing can be measured. Scenes are that somewhere: each index gives a new image whose caption
names the sky, the ground, the object and its colour, while positions, sizes, hills and clutter
stay free.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]

SKIES: dict[str, tuple[Colour, Colour]] = {
    "day": ((70, 140, 225), (190, 220, 245)),
    "dusk": ((60, 50, 110), (245, 150, 90)),
    "dawn": ((120, 150, 200), (250, 205, 190)),
    "night": ((8, 10, 30), (40, 50, 90)),
    "noon": ((120, 190, 245), (225, 240, 250)),
    "storm": ((60, 65, 75), (130, 135, 140)),
}
GROUNDS: dict[str, tuple[Colour, Colour]] = {
    "grass": ((60, 130, 50), (35, 85, 30)),
    "sand": ((225, 200, 140), (185, 155, 100)),
    "sea": ((40, 90, 150), (15, 45, 90)),
    "snow": ((240, 245, 250), (190, 205, 225)),
    "asphalt": ((95, 95, 100), (55, 55, 60)),
    "wheat": ((215, 180, 80), (160, 120, 45)),
}
COLOURS: dict[str, Colour] = {
    "red": (205, 40, 40),
    "blue": (45, 80, 200),
    "green": (40, 150, 70),
    "yellow": (240, 205, 50),
    "white": (240, 240, 240),
    "black": (30, 30, 35),
    "purple": (130, 60, 160),
    "orange": (240, 130, 40),
}
LIGHTS = ("sun", "moon", "clouds", "birds", "nothing")
CLUTTER = ("trees", "poles", "rocks", "fence", "hills")


@dataclass(frozen=True)
class Scene:
    """One drawn scene.

    Attributes:
        caption: What the image shows, without positions and sizes.
        image: RGB image, square.
    """

    caption: str
    image: Image.Image


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (max(0, min(255, round(c * factor))) for c in colour)
    return red, green, blue


def _gradient(size: int, top: Colour, bottom: Colour) -> np.ndarray:
    ramp = np.linspace(0.0, 1.0, size, dtype=np.float32)[:, None, None]
    rows = np.asarray(top, np.float32) * (1 - ramp) + np.asarray(bottom, np.float32) * ramp
    return np.broadcast_to(rows, (size, size, 3)).copy()


def _boat(d: ImageDraw.ImageDraw, x: float, y: float, s: float, c: Colour) -> None:
    deck, top, boom = y - 0.3 * s, y - 1.5 * s, y - 0.4 * s
    d.polygon([(x - s, deck), (x + s, deck), (x + 0.6 * s, y), (x - 0.6 * s, y)], fill=c)
    d.line([(x, deck), (x, top)], fill=_shade(c, 0.5), width=2)
    d.polygon([(x + 2, top), (x + 2, boom), (x + 0.8 * s, boom)], fill=(245, 245, 235))


def _house(d: ImageDraw.ImageDraw, x: float, y: float, s: float, c: Colour) -> None:
    d.rectangle([x - 0.7 * s, y - 0.9 * s, x + 0.7 * s, y], fill=c)
    eaves = y - 0.9 * s
    roof = [(x - 0.9 * s, eaves), (x + 0.9 * s, eaves), (x, y - 1.6 * s)]
    d.polygon(roof, fill=_shade(c, 0.5))
    d.rectangle([x - 0.15 * s, y - 0.5 * s, x + 0.15 * s, y], fill=(60, 40, 30))
    for middle in (x - 0.45 * s, x + 0.45 * s):
        window = [middle - 0.12 * s, y - 0.7 * s, middle + 0.12 * s, y - 0.45 * s]
        d.rectangle(window, fill=(250, 235, 160))


def _tree(d: ImageDraw.ImageDraw, x: float, y: float, s: float, c: Colour) -> None:
    d.rectangle([x - 0.1 * s, y - 0.7 * s, x + 0.1 * s, y], fill=(90, 60, 35))
    d.ellipse([x - 0.6 * s, y - 1.7 * s, x + 0.6 * s, y - 0.5 * s], fill=c)
    d.ellipse([x - 0.3 * s, y - 1.6 * s, x + 0.2 * s, y - 1.1 * s], fill=_shade(c, 1.25))


def _car(d: ImageDraw.ImageDraw, x: float, y: float, s: float, c: Colour) -> None:
    d.rectangle([x - s, y - 0.6 * s, x + s, y - 0.15 * s], fill=c)
    top, sill = y - s, y - 0.6 * s
    roof = [(x - 0.6 * s, sill), (x - 0.4 * s, top), (x + 0.4 * s, top), (x + 0.7 * s, sill)]
    d.polygon(roof, fill=_shade(c, 0.7))
    for wheel in (x - 0.55 * s, x + 0.55 * s):
        around = [wheel - 0.2 * s, y - 0.35 * s, wheel + 0.2 * s, y + 0.05 * s]
        d.ellipse(around, fill=(20, 20, 20))


def _balloon(d: ImageDraw.ImageDraw, x: float, y: float, s: float, c: Colour) -> None:
    y -= s
    d.ellipse([x - 0.7 * s, y - 1.8 * s, x + 0.7 * s, y - 0.4 * s], fill=c)
    d.ellipse([x - 0.25 * s, y - 1.8 * s, x + 0.25 * s, y - 0.4 * s], fill=_shade(c, 1.3))
    d.line([(x - 0.4 * s, y - 0.6 * s), (x - 0.15 * s, y - 0.1 * s)], fill=(60, 50, 40))
    d.line([(x + 0.4 * s, y - 0.6 * s), (x + 0.15 * s, y - 0.1 * s)], fill=(60, 50, 40))
    d.rectangle([x - 0.18 * s, y - 0.15 * s, x + 0.18 * s, y + 0.1 * s], fill=(120, 80, 40))


def _tower(d: ImageDraw.ImageDraw, x: float, y: float, s: float, c: Colour) -> None:
    for k in range(6):
        shade = c if k % 2 else (245, 245, 245)
        half = s * (0.35 - 0.03 * k)
        d.rectangle([x - half, y - 0.35 * s * (k + 1), x + half, y - 0.35 * s * k], fill=shade)
    d.rectangle([x - 0.3 * s, y - 2.35 * s, x + 0.3 * s, y - 2.1 * s], fill=(40, 40, 45))


def _tent(d: ImageDraw.ImageDraw, x: float, y: float, s: float, c: Colour) -> None:
    d.polygon([(x - s, y), (x + s, y), (x, y - 1.2 * s)], fill=c)
    d.polygon([(x - 0.25 * s, y), (x + 0.25 * s, y), (x, y - 1.0 * s)], fill=_shade(c, 0.4))


def _windmill(d: ImageDraw.ImageDraw, x: float, y: float, s: float, c: Colour) -> None:
    hub = y - 1.4 * s
    d.polygon([(x - 0.4 * s, y), (x + 0.4 * s, y), (x + 0.2 * s, hub), (x - 0.2 * s, hub)], fill=c)
    for k in range(4):
        angle = 0.4 + k * math.pi / 2
        tip = (x + 1.1 * s * math.cos(angle), hub + 1.1 * s * math.sin(angle))
        d.line([(x, hub), tip], fill=(235, 230, 220), width=3)


OBJECTS: dict[str, Callable[[ImageDraw.ImageDraw, float, float, float, Colour], None]] = {
    "boat": _boat,
    "house": _house,
    "tree": _tree,
    "car": _car,
    "balloon": _balloon,
    "lighthouse": _tower,
    "tent": _tent,
    "windmill": _windmill,
}


def scene_words() -> list[str]:
    """Every word a scene's caption may use, sorted."""
    words = {"a", "on", "at", "with", "and", "nothing"}
    for group in (SKIES, GROUNDS, COLOURS, OBJECTS, LIGHTS, CLUTTER):
        words.update(group)
    return sorted(words)


def _clutter(
    d: ImageDraw.ImageDraw, rng: random.Random, kind: str, size: int, horizon: float
) -> None:
    if kind == "hills":
        for _ in range(rng.randint(1, 3)):
            x, w = rng.uniform(0, size), rng.uniform(0.2, 0.6) * size
            h = rng.uniform(0.08, 0.3) * size
            tone = rng.randint(50, 130)
            slope = [(x - w, horizon), (x, horizon - h), (x + w, horizon)]
            d.polygon(slope, fill=(tone, tone, tone + 25))
        return
    if kind == "fence":
        y, step = rng.uniform(horizon + 0.03 * size, 0.95 * size), rng.uniform(0.06, 0.12) * size
        wood = _shade((170, 130, 90), rng.uniform(0.6, 1.3))
        for k in range(int(size / step) + 1):
            d.line([(k * step, y - 0.09 * size), (k * step, y)], fill=wood, width=2)
        d.line([(0, y - 0.06 * size), (size, y - 0.06 * size)], fill=wood, width=2)
        return
    for _ in range(rng.randint(2, 6)):
        x, y = rng.uniform(0, size), rng.uniform(horizon, 0.98 * size)
        s = size * rng.uniform(0.03, 0.08)
        if kind == "trees":
            green = _shade((30, 90, 45), rng.uniform(0.6, 1.3))
            d.polygon([(x - s, y), (x + s, y), (x, y - 3 * s)], fill=green)
        elif kind == "poles":
            d.line([(x, y), (x, y - 4 * s)], fill=(60, 45, 35), width=2)
            d.line([(x - s, y - 3.5 * s), (x + s, y - 3.5 * s)], fill=(60, 45, 35), width=2)
        else:
            grey = _shade((120, 115, 110), rng.uniform(0.5, 1.3))
            d.ellipse([x - s, y - 1.2 * s, x + s, y], fill=grey)


def _light(
    d: ImageDraw.ImageDraw, rng: random.Random, kind: str, size: int, horizon: float
) -> None:
    x, y = rng.uniform(0.1, 0.9) * size, rng.uniform(0.1, 0.8) * horizon
    r = rng.uniform(0.04, 0.09) * size
    if kind == "sun":
        d.ellipse([x - r, y - r, x + r, y + r], fill=(255, 235, 130))
    elif kind == "moon":
        d.ellipse([x - r, y - r, x + r, y + r], fill=(235, 235, 225))
        d.ellipse([x - 0.7 * r, y - 0.5 * r, x - 0.2 * r, y], fill=(200, 200, 195))
    elif kind == "clouds":
        for _ in range(rng.randint(2, 4)):
            x, y = rng.uniform(0, size), rng.uniform(0.05, 0.8) * horizon
            for _ in range(4):
                dx, dy = rng.uniform(-2, 2) * r, rng.uniform(-0.4, 0.4) * r
                q = rng.uniform(0.6, 1.1) * r
                puff = [x + dx - q, y + dy - 0.6 * q, x + dx + q, y + dy + 0.6 * q]
                d.ellipse(puff, fill=(235, 238, 242))
    elif kind == "birds":
        for _ in range(rng.randint(3, 7)):
            x, y, q = rng.uniform(0, size), rng.uniform(0.05, 0.85) * horizon, 0.6 * r
            wings = [(x - q, y - 0.5 * q), (x, y), (x + q, y - 0.5 * q)]
            d.line(wings, fill=(25, 25, 30), width=2)


def draw_scene(index: int, *, size: int = 64, seed: int = 0) -> Scene:
    """Draw one scene of the seeded stream; the same index always gives the same image.

    Args:
        index: Position in the stream, any non-negative integer.
        size: Side of the square image in pixels.
        seed: Which stream.
    """
    rng = random.Random(f"scene-{seed}-{index}")
    sky, ground = rng.choice(list(SKIES)), rng.choice(list(GROUNDS))
    colour, thing = rng.choice(list(COLOURS)), rng.choice(list(OBJECTS))
    light, clutter = rng.choice(LIGHTS), rng.choice(CLUTTER)
    canvas = 2 * size
    horizon = canvas * rng.uniform(0.35, 0.7)

    pixels = _gradient(canvas, *SKIES[sky])
    ground_rows = _gradient(canvas, *GROUNDS[ground])
    cut = int(horizon)
    pixels[cut:] = ground_rows[: canvas - cut]
    stripes = rng.uniform(0.15, 0.6)
    phase = rng.uniform(0, 6.28)
    rows = np.arange(canvas - cut, dtype=np.float32)[:, None]
    columns = np.arange(canvas, dtype=np.float32)[None, :]
    waves = np.sin(stripes * rows + phase + 2.0 * np.sin(0.07 * columns + phase))
    pixels[cut:] += (10.0 * waves)[:, :, None]
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))

    draw = ImageDraw.Draw(image)
    _light(draw, rng, light, canvas, horizon)
    _clutter(draw, rng, clutter, canvas, horizon)
    scale = canvas * rng.uniform(0.1, 0.22)
    x, y = rng.uniform(0.15, 0.85) * canvas, rng.uniform(horizon + 0.05 * canvas, 0.95 * canvas)
    OBJECTS[thing](draw, x, y, scale, _shade(COLOURS[colour], rng.uniform(0.85, 1.1)))
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.0)))
    small = np.asarray(image.resize((size, size), Image.Resampling.BOX), np.float32)
    noise = np.random.default_rng([seed, index]).normal(0.0, rng.uniform(0.0, 6.0), small.shape)
    noisy = Image.fromarray(np.clip(small + noise, 0, 255).astype(np.uint8))
    caption = f"a {colour} {thing} on {ground} at {sky} with {light} and {clutter}"
    return Scene(caption, noisy)
