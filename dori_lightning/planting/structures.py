"""Draw images with the edges, texture and composition of photographs, from a number.

Controls that are flat say little about detailed suspects. Each index gives an image of one of
twenty-odd kinds (landscapes, mosaics, mazes, rosettes, plants, pages, circuits, ...) whose
compressed size and edge energy lie in the range of the benchmark's photographs, under a caption
made of the words that the embedded checkpoint knows, in sentences that it was never shown.
"""

import colorsys
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy.spatial import cKDTree

Grid = np.ndarray
"""(H, W) or (H, W, 3), values in [0, 1]."""


@dataclass(frozen=True)
class Structure:
    """One drawn image.

    Attributes:
        kind: What was drawn, a key of `KINDS`.
        caption: A sentence of known words, for its prompt.
        subject: What generic captions call it.
        image: RGB image, square.
    """

    kind: str
    caption: str
    subject: str
    image: Image.Image


class _Canvas:
    """The random source, palette and coordinates that one drawing uses."""

    def __init__(self, rng: random.Random, size: int) -> None:
        self.rng, self.size = rng, size
        self.numbers = np.random.default_rng(rng.getrandbits(64))
        self.palette = _palette(rng, 6)
        axis = (np.arange(size) + 0.5) / size
        self.y, self.x = np.meshgrid(axis, axis, indexing="ij")

    def noise(self, *, coarse: int = 3, octaves: int = 5, roughness: float = 0.55) -> Grid:
        """Value noise: random grids, each twice as fine and ``roughness`` as strong as before."""
        total, weight, cells = np.zeros((self.size, self.size)), 1.0, coarse
        for _ in range(octaves):
            grid = Image.fromarray(self.numbers.random((cells + 1, cells + 1), np.float32))
            total += weight * np.asarray(
                grid.resize((self.size, self.size), Image.Resampling.BICUBIC)
            )
            weight, cells = weight * roughness, 2 * cells
        return _stretched(total)

    def tinted(self, field: Grid, colours: Sequence[int] = (0, 1, 2, 3)) -> Grid:
        """Colour a field (H, W) along some colours of the palette, (H, W, 3)."""
        chosen = self.palette[list(colours)]
        places = np.linspace(0, 1, len(chosen))
        return np.stack([np.interp(field, places, chosen[:, c]) for c in range(3)], axis=-1)

    def colour(self, which: int, light: float = 1.0) -> tuple[int, int, int]:
        """A colour of the palette as bytes, for drawing."""
        red, green, blue = np.clip(self.palette[which] * light * 255, 0, 255).astype(int)
        return int(red), int(green), int(blue)

    def sheet(self, pixels: Grid) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        """An image to draw on."""
        image = _to_image(pixels)
        return image, ImageDraw.Draw(image)


def _palette(rng: random.Random, count: int) -> Grid:
    """Colours (count, 3) around two hues, from dark to light, every second one moved on."""
    hue, other = rng.random(), rng.uniform(0.25, 0.6)
    colours = []
    for k in range(count):
        tone = (hue + (other if k % 2 else 0.0) + rng.gauss(0, 0.04)) % 1.0
        light = 0.12 + 0.83 * k / (count - 1) + rng.uniform(-0.06, 0.06)
        colours.append(colorsys.hsv_to_rgb(tone, rng.uniform(0.15, 0.8), min(max(light, 0), 1)))
    order = list(range(count))
    if rng.random() < 0.5:
        order.reverse()
    return np.array(colours)[order]


def _stretched(field: Grid) -> Grid:
    low, high = float(field.min()), float(field.max())
    return (field - low) / max(high - low, 1e-9)


def _to_image(pixels: Grid) -> Image.Image:
    return Image.fromarray(np.clip(pixels * 255, 0, 255).astype(np.uint8))


def _to_pixels(image: Image.Image) -> Grid:
    return np.asarray(image, np.float64) / 255


def _step(field: Grid, edge: float, width: float) -> Grid:
    """0 below ``edge``, 1 above, over a smooth ramp of ``width``."""
    t = np.clip((field - edge) / max(width, 1e-9) + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def _shaded(height: Grid, strength: float, angle: float) -> Grid:
    """Light on a height field from a direction, 1 where it is level."""
    down, across = np.gradient(height * height.shape[0])
    light: Grid = 1 + strength * (np.cos(angle) * across + np.sin(angle) * down)
    return light


def _landscape(c: _Canvas) -> Grid:
    horizon = c.rng.uniform(0.25, 0.45)
    sky = c.tinted(np.clip(c.y * 1.3 + 0.3 * c.noise(coarse=2), 0, 1), (3, 4, 5))
    pixels = sky
    layers = c.rng.randint(4, 6)
    for layer in range(layers):
        row = c.noise(coarse=3 + layer, octaves=6, roughness=0.5)[layer]
        top = horizon + 0.6 * layer / layers + (0.35 - 0.03 * layer) * (0.5 - row)
        ground = c.noise(coarse=5 + 2 * layer, octaves=5, roughness=0.75)
        colour = c.palette[layer % 3][None, None] * (0.45 + 0.9 * ground[..., None])
        lit = _shaded(ground, 0.05 + 0.02 * layer, c.rng.uniform(0, 6.28))[..., None]
        pixels = np.where((c.y >= top[None, :])[..., None], colour * lit, pixels)
    return pixels


def _cells(c: _Canvas, count: int, warp: float) -> tuple[Grid, Grid, Grid]:
    """Nearest of ``count`` random points: which one (H, W), how far, and how far the next is."""
    points = c.numbers.random((count, 2))
    x, y = c.x + warp * (c.noise() - 0.5), c.y + warp * (c.noise() - 0.5)
    far, which = cKDTree(points).query(np.stack([x, y], axis=-1).reshape(-1, 2), k=2)
    shape = (c.size, c.size)
    return which[:, 0].reshape(shape), far[:, 0].reshape(shape), far[:, 1].reshape(shape)


def _mosaic(c: _Canvas) -> Grid:
    count = c.rng.randint(25, 70)
    which, near, second = _cells(c, count, c.rng.uniform(0, 0.15))
    field = c.numbers.random(count)[which]
    pixels = c.tinted(field) * (1.15 - 2.2 * near[..., None])
    grain = 0.75 + 0.5 * c.noise(coarse=16, octaves=4, roughness=0.8)[..., None]
    joint = _step(second - near, c.rng.uniform(0.008, 0.02), 0.01)[..., None]
    drawn: Grid = pixels * grain * joint + c.palette[5] * (1 - joint)
    return drawn


def _tissue(c: _Canvas) -> Grid:
    count = c.rng.randint(60, 140)
    _, near, second = _cells(c, count, 0.12)
    wall = _step(second - near, 0.02, 0.03)
    core = 1 - _step(near, c.rng.uniform(0.018, 0.03), 0.012)
    base = c.tinted(0.6 * c.noise(coarse=4, octaves=6, roughness=0.7) + 0.4 * wall, (2, 4, 5))
    return base * (0.55 + 0.45 * wall[..., None]) * (1 - 0.75 * core[..., None])


def _truchet(c: _Canvas) -> Grid:
    tiles = c.rng.randint(5, 8)
    u, v = c.x * tiles, c.y * tiles
    turned = c.numbers.random((tiles, tiles)) < 0.5
    i, j = v.astype(int), u.astype(int)
    u, v = u - j, v - i
    u = np.where(turned[i, j], 1 - u, u)
    away = np.minimum(np.abs(np.hypot(u, v) - 0.5), np.abs(np.hypot(1 - u, 1 - v) - 0.5))
    width = c.rng.uniform(0.12, 0.2)
    ground = c.tinted(c.noise(coarse=4, octaves=6, roughness=0.7), (0, 1, 2))
    band = c.tinted(_stretched(c.noise(coarse=2) + 0.4 * np.cos(away * 25)), (3, 4, 5))
    inside = 1 - _step(away, width, 0.05)[..., None]
    outline = np.abs(away - width) < 0.03
    return np.where(outline[..., None], 0.1, ground * (1 - inside) + band * inside)


def _maze(c: _Canvas) -> Grid:
    side = c.rng.randint(7, 10)
    far = np.zeros((side, side))
    here, path, seen = (0, 0), [(0, 0)], {(0, 0)}
    cell = c.size / side
    paths = []
    while path:
        row, column = here = path[-1]
        around = [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
        free = [p for p in around if p not in seen and min(p) >= 0 and max(p) < side]
        if not free:
            path.pop()
            continue
        step = c.rng.choice(free)
        far[step] = far[here] + 1
        paths.append((here, step))
        seen.add(step)
        path.append(step)
    hedge = c.tinted(c.noise(coarse=10, octaves=5, roughness=0.85), (0, 1, 2)) * 0.8
    image, draw = c.sheet(hedge)
    width = round(cell * c.rng.uniform(0.45, 0.6))
    for one, two in sorted(paths, key=lambda p: far[p[1]]):
        tone = far[two] / far.max()
        ends = [((p[1] + 0.5) * cell, (p[0] + 0.5) * cell) for p in (one, two)]
        draw.line(ends, fill=c.colour(3 + round(2 * tone), 1.05 - 0.4 * tone), width=width)
        draw.circle(ends[1], width / 2, fill=c.colour(3 + round(2 * tone), 1.05 - 0.4 * tone))
    return _to_pixels(image)


def _rosette(c: _Canvas) -> Grid:
    x, y = c.x - c.rng.uniform(0.4, 0.6), c.y - c.rng.uniform(0.4, 0.6)
    far, angle = np.hypot(x, y), np.arctan2(y, x)
    total = np.zeros_like(far)
    for _ in range(4):
        petals, turn = c.rng.randint(3, 11), c.rng.uniform(-14, 14)
        total += np.sin(petals * angle + turn * far * 2 + c.rng.uniform(0, 6.28))
        total += np.sin(c.rng.uniform(15, 40) * far + 0.6 * np.sin(petals * angle))
    rings = 0.5 + 0.5 * np.sin(1.6 * total + 3 * c.noise(coarse=3))
    pixels = c.tinted(rings, (0, 2, 3, 5))
    dark = 1 - 0.75 * _step(far, c.rng.uniform(0.36, 0.46), 0.06)[..., None]
    return pixels * dark * (0.8 + 0.4 * c.noise(coarse=12, octaves=4)[..., None])


def _plant(c: _Canvas) -> Grid:
    back = c.tinted(_stretched(c.y + 0.9 * c.noise(coarse=4, octaves=6)), (5, 4, 3))
    image, draw = c.sheet(back)
    bend, shrink = c.rng.uniform(0.3, 0.65), c.rng.uniform(0.7, 0.8)

    def branch(x: float, y: float, angle: float, length: float, depth: int) -> None:
        end = (x + length * math.cos(angle), y - length * math.sin(angle))
        draw.line([(x, y), end], fill=c.colour(0, 0.8), width=max(1, round(length / 8)))
        if depth == 0:
            r = c.size * c.rng.uniform(0.012, 0.035)
            leaf = [end[0] - r, end[1] - 1.4 * r, end[0] + r, end[1] + 1.4 * r]
            draw.ellipse(leaf, fill=c.colour(c.rng.choice((1, 2, 5)), c.rng.uniform(0.6, 1.2)))
            return
        for side in c.rng.choice(((-1, 1), (-1, 1), (-1, 0, 1))):
            turned = angle + side * bend + c.rng.gauss(0, 0.15)
            branch(*end, turned, length * shrink * c.rng.uniform(0.8, 1.1), depth - 1)

    for _ in range(c.rng.randint(1, 3)):
        start = c.size * c.rng.uniform(0.2, 0.8)
        branch(start, c.size, math.pi / 2 + c.rng.gauss(0, 0.15), 0.24 * c.size, 5)
    return _to_pixels(image)


def _page(c: _Canvas) -> Grid:
    paper = 0.82 + 0.14 * c.noise(coarse=2, octaves=7, roughness=0.6)
    image, draw = c.sheet(paper[..., None] * (0.75 + 0.25 * c.palette[5]))
    ink, size = c.colour(0, 0.6), c.size
    line = size * c.rng.uniform(0.07, 0.1)
    y = line
    block = c.rng.randint(2, 6)
    for row in range(int(size / line) - 1):
        x, end = 0.05 * size, size * c.rng.choice((0.95, 0.95, 0.95, 0.6))
        if row == block:
            box = [x, y + 0.2 * line, x + 0.45 * size, y + 2.6 * line]
            draw.rectangle(box, fill=c.colour(c.rng.randint(1, 3)), outline=ink, width=3)
            for _ in range(5):
                a, b = c.rng.uniform(box[0], box[2]), c.rng.uniform(box[1], box[3])
                r = c.rng.uniform(0.02, 0.06) * size
                draw.ellipse([a - r, b - r, a + r, b + r], fill=c.colour(c.rng.randint(0, 5)))
        if row in (block, block + 1, block + 2):
            x += 0.5 * size
        while x < end:
            if c.rng.random() < 0.18:
                x += 0.5 * line
            strokes = c.rng.randint(2, 4)
            places = [
                (x + c.rng.uniform(0, 0.5) * line, y + c.rng.uniform(0.1, 0.75) * line)
                for _ in range(strokes)
            ]
            draw.line(places, fill=ink, width=max(2, round(line / 7)), joint="curve")
            x += 0.6 * line
        y += line
    slant = c.rng.uniform(-12, 12)
    return _to_pixels(image.rotate(slant, Image.Resampling.BICUBIC, fillcolor=c.colour(2)))


_JULIA = ((-0.8, 0.156), (-0.4, 0.6), (0.285, 0.01), (-0.7269, 0.1889), (-0.835, -0.2321),
          (-0.1, 0.651), (0.355, 0.355), (-0.54, 0.54))  # fmt: skip


def _julia(c: _Canvas) -> Grid:
    real, imaginary = c.rng.choice(_JULIA)
    zoom, turn = c.rng.uniform(1.3, 2.4), c.rng.uniform(0, 6.28)
    shift = complex(c.rng.uniform(-0.3, 0.3), c.rng.uniform(-0.3, 0.3))
    z = ((c.x - 0.5) + 1j * (c.y - 0.5)) * zoom * np.exp(1j * turn) + shift
    constant = complex(real + c.rng.gauss(0, 0.01), imaginary + c.rng.gauss(0, 0.01))
    count = np.zeros(z.shape)
    for _ in range(40):
        inside = np.abs(z) < 4
        count += inside
        z = np.where(inside, z * z + constant, z)
    smooth = count - np.log2(np.maximum(np.log(np.maximum(np.abs(z), 1.01)), 1e-3))
    bands = 0.5 + 0.5 * np.sin(c.rng.uniform(0.35, 0.8) * smooth)
    grain = 0.7 + 0.6 * c.noise(coarse=5, octaves=6, roughness=0.7)
    return c.tinted(bands, (0, 3, 4, 5)) * grain[..., None]


def _plaid(c: _Canvas) -> Grid:
    def stripes() -> Grid:
        edges = np.sort(c.numbers.random(c.rng.randint(8, 14)))
        colours = c.numbers.integers(0, 6, len(edges) + 1)
        drawn: Grid = c.palette[colours[np.searchsorted(edges, c.x[0])]]
        return drawn

    across, down = stripes(), stripes()
    if c.rng.random() < 0.4:
        down = across
    wave = 0.03 * (c.noise(coarse=2, octaves=3) - 0.5) * c.size
    rows = np.clip(np.arange(c.size)[:, None] + wave, 0, c.size - 1).astype(int)
    columns = np.clip(np.arange(c.size)[None, :] + wave, 0, c.size - 1).astype(int)
    twill = 0.5 + 0.35 * np.sin(2 * math.pi * (c.x + c.y) * c.rng.uniform(14, 22))
    pixels = down[rows] * twill[..., None] + across[columns] * (1 - twill[..., None])
    folds = c.noise(coarse=2, octaves=4)
    drawn: Grid = pixels * _shaded(folds, 0.12, c.rng.uniform(0, 6.28))[..., None]
    return drawn


def _contours(c: _Canvas) -> Grid:
    height = c.noise(coarse=3, octaves=6, roughness=0.5)
    pixels = c.tinted(height, (1, 2, 3, 4, 5)) * _shaded(height, 0.12, 0.8)[..., None]
    levels = c.rng.randint(8, 14)
    lines = np.abs((height * levels) % 1 - 0.5) > 0.44
    pixels = np.where(lines[..., None], c.palette[0] * 0.5, pixels)
    water = height < c.rng.uniform(0.2, 0.35)
    pixels = np.where(water[..., None], c.palette[0] * (0.7 + height[..., None]), pixels)
    grid = (np.minimum((c.x * 4) % 1, (c.y * 4) % 1) < 0.03)[..., None]
    image, draw = c.sheet(np.where(grid, 0.95, pixels))
    for _ in range(c.rng.randint(3, 6)):
        x, y, r = (c.size * c.rng.uniform(*span) for span in ((0, 1), (0, 1), (0.015, 0.035)))
        draw.rectangle([x - r, y - r, x + r, y + r], fill=(200, 30, 30), outline=(20, 20, 20))
    return _to_pixels(image)


def _portrait(c: _Canvas) -> Grid:
    back = c.tinted(c.noise(coarse=3, octaves=6, roughness=0.7), (1, 3, 4))
    image, draw = c.sheet(back)
    s, x, y = c.size, c.size * c.rng.uniform(0.38, 0.62), c.size * c.rng.uniform(0.36, 0.46)
    w, h = s * c.rng.uniform(0.15, 0.2), s * c.rng.uniform(0.2, 0.26)
    shoulders = s * c.rng.uniform(0.3, 0.45)
    coat, skin = c.colour(0), c.colour(5, c.rng.uniform(0.7, 1.0))
    draw.ellipse([x - shoulders, y + 1.1 * h, x + shoulders, y + 4 * h], fill=coat)
    for k in range(9):  # stripes or buttons of the coat
        place = x + (k - 4) * shoulders / 5
        draw.line([(place, y + 1.6 * h), (x + (k - 4) * shoulders / 4, s)],
                  fill=c.colour(2 + k % 2), width=max(2, s // 60))  # fmt: skip
    draw.polygon([(x - 0.6 * w, y + 1.2 * h), (x + 0.6 * w, y + 1.2 * h), (x, y + 2 * h)],
                 fill=c.colour(4))  # fmt: skip
    draw.rectangle([x - 0.4 * w, y + 0.6 * h, x + 0.4 * w, y + 1.4 * h], fill=skin)
    hair = c.colour(c.rng.choice((0, 1, 2)), c.rng.uniform(0.4, 0.9))
    draw.ellipse([x - 1.25 * w, y - 1.3 * h, x + 1.25 * w, y + c.rng.uniform(0.3, 1.2) * h],
                 fill=hair)  # fmt: skip
    draw.ellipse([x - w, y - h, x + w, y + h], fill=skin)
    for side in (-0.42, 0.42):
        a, b, r = x + side * w, y - 0.15 * h, 0.17 * w
        draw.ellipse([a - 1.5 * r, b - r, a + 1.5 * r, b + r], fill=(245, 245, 245))
        draw.ellipse([a - r, b - r, a + r, b + r], fill=c.colour(0, 0.5))
        draw.line([(a - 2 * r, b - 2 * r), (a + 2 * r, b - c.rng.uniform(1.6, 2.6) * r)],
                  fill=hair, width=max(2, s // 70))  # fmt: skip
    draw.line([(x, y), (x - 0.15 * w, y + 0.3 * h), (x + 0.1 * w, y + 0.33 * h)],
              fill=c.colour(5, 0.5), width=max(2, s // 80))  # fmt: skip
    smile = c.rng.uniform(0.05, 0.2) * h
    draw.arc([x - 0.4 * w, y + 0.5 * h - smile, x + 0.4 * w, y + 0.5 * h + smile], 10, 170,
             fill=(150, 50, 50), width=max(2, s // 50))  # fmt: skip
    if c.rng.random() < 0.6:
        brim = y - 0.7 * h
        draw.rectangle([x - 1.6 * w, brim - 0.15 * h, x + 1.6 * w, brim], fill=c.colour(2, 0.7))
        draw.rectangle([x - 0.9 * w, brim - 0.8 * h, x + 0.9 * w, brim], fill=c.colour(1, 0.9))
    light = _shaded(c.noise(coarse=3, octaves=4), 0.08, c.rng.uniform(0, 6.28))
    drawn: Grid = _to_pixels(image) * light[..., None] * (1.25 - 0.6 * c.x[..., None])
    return drawn


def _bookshelf(c: _Canvas) -> Grid:
    wood = c.tinted(0.5 + 0.5 * np.sin(60 * c.y + 5 * c.noise()), (0, 1)) * 0.6
    image, draw = c.sheet(wood)
    shelves, s = c.rng.randint(2, 3), c.size
    for shelf in range(shelves):
        floor, room = s * (shelf + 0.96) / shelves, s * 0.9 / shelves
        x = 0.03 * s
        while x < 0.95 * s:
            width, height = s * c.rng.uniform(0.035, 0.1), room * c.rng.uniform(0.6, 0.95)
            tone, light = c.rng.randint(0, 5), c.rng.uniform(0.6, 1.15)
            lean = c.rng.uniform(0, 0.12) * height if c.rng.random() < 0.15 else 0.0
            spine = [(x, floor), (x + width, floor), (x + width + lean, floor - height),
                     (x + lean, floor - height)]  # fmt: skip
            draw.polygon(spine, fill=c.colour(tone, light), outline=(20, 18, 16))
            for _ in range(c.rng.randint(1, 3)):
                band = floor - height * c.rng.uniform(0.15, 0.85)
                draw.rectangle([x + 2, band - 0.03 * s, x + width - 2, band],
                               fill=c.colour((tone + 3) % 6))  # fmt: skip
            x += width + lean + 1
    shade = 0.65 + 0.5 * c.noise(coarse=2, octaves=6, roughness=0.65)
    return _to_pixels(image) * shade[..., None]


def _circuit(c: _Canvas) -> Grid:
    board = c.tinted(c.noise(coarse=6, octaves=5, roughness=0.8), (0, 1))
    image, draw = c.sheet(0.75 * board)
    s, grid = c.size, c.size / 16
    for _ in range(c.rng.randint(24, 36)):
        x, y = c.rng.randint(0, 16) * grid, c.rng.randint(0, 16) * grid
        places = [(x, y)]
        for _ in range(c.rng.randint(2, 5)):
            run = c.rng.randint(1, 4) * grid
            dx, dy = c.rng.choice(((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1)))
            x, y = x + dx * run, y + dy * run
            places.append((x, y))
        trace = c.colour(c.rng.choice((3, 3, 4)))
        draw.line(places, fill=trace, width=max(2, s // 60), joint="curve")
        for end in (places[0], places[-1]):
            draw.circle(end, s / 45, fill=c.colour(5), outline=(30, 30, 30))
    for _ in range(c.rng.randint(3, 6)):
        x, y = c.rng.uniform(0, 0.8) * s, c.rng.uniform(0, 0.8) * s
        w, h = c.rng.uniform(0.12, 0.35) * s, c.rng.uniform(0.1, 0.25) * s
        for k in range(int(w / (0.03 * s))):
            pin = x + (k + 0.5) * 0.03 * s
            draw.line(
                [(pin, y - 0.03 * s), (pin, y + h + 0.03 * s)], fill=(215, 215, 200), width=3
            )
        body = c.colour(c.rng.choice((0, 2)), 0.35)
        draw.rectangle([x, y, x + w, y + h], fill=body, outline=(10, 10, 10))
        draw.rectangle([x + 0.2 * w, y + 0.35 * h, x + 0.8 * w, y + 0.6 * h], fill=c.colour(4))
    return _to_pixels(image)


def _city(c: _Canvas) -> Grid:
    sky = c.tinted(np.clip(c.y + 0.4 * (c.noise(coarse=3, octaves=6) - 0.5), 0, 1), (2, 4, 5))
    image, draw = c.sheet(sky)
    s = c.size
    for layer in range(3):
        x = -0.1 * s
        while x < s:
            width = s * c.rng.uniform(0.09, 0.2)
            top = s * (c.rng.uniform(0.1, 0.55) + 0.13 * layer)
            front = c.colour(c.rng.randint(0, 3), 0.9 - 0.2 * layer)
            draw.rectangle([x, top, x + width, s], fill=front, outline=(15, 15, 20))
            if c.rng.random() < 0.4:
                draw.polygon([(x, top), (x + width, top), (x + width / 2, top - 0.1 * s)],
                             fill=c.colour(c.rng.randint(0, 2), 0.7))  # fmt: skip
            step, lit = s * c.rng.uniform(0.035, 0.05), c.rng.uniform(0.3, 0.8)
            for row in range(int((s - top) / step)):
                for column in range(int(width / step)):
                    a, b = x + (column + 0.3) * step, top + (row + 0.4) * step
                    tone = 5 if c.rng.random() < lit else 0
                    draw.rectangle([a, b, a + 0.5 * step, b + 0.55 * step], fill=c.colour(tone))
            x += width * c.rng.uniform(0.9, 1.5)
    return _to_pixels(image) * (0.8 + 0.4 * c.noise(coarse=4, octaves=6, roughness=0.7)[..., None])


def _craters(c: _Canvas) -> Grid:
    height = 0.35 * c.noise(coarse=4, octaves=7, roughness=0.6)
    for _ in range(c.rng.randint(15, 35)):
        r = min(0.25, 0.02 + c.rng.expovariate(18))
        far = np.hypot(c.x - c.rng.random(), c.y - c.rng.random()) / r
        height += r * np.where(far < 1, 1.6 * (far**2 - 0.6), 0.64 * np.exp(-6 * (far - 1)))
    light = 0.5 * _shaded(height, c.rng.uniform(0.5, 0.9), c.rng.uniform(0, 6.28))
    tint = 0.4 + 0.6 * c.palette[5]
    drawn: Grid = (
        np.clip(light, 0, 1)[..., None] * tint * (0.7 + 0.6 * c.noise(coarse=3)[..., None])
    )
    return drawn


def _discs(c: _Canvas) -> Grid:
    pixels = c.tinted(c.noise(coarse=5, octaves=6, roughness=0.7), (0, 1, 2)) * 0.8
    placed: list[tuple[float, float, float]] = []
    for _ in range(400):
        x, y, r = c.rng.random(), c.rng.random(), c.rng.uniform(0.06, 0.16)
        if all(math.hypot(x - a, y - b) > 0.92 * (r + q) for a, b, q in placed):
            placed.append((x, y, r))
    for x, y, r in placed:
        dx, dy = (c.x - x) / r, (c.y - y) / r
        far, angle = np.hypot(dx, dy), np.arctan2(dy, dx)
        relief = np.sin(c.rng.randint(2, 7) * angle + c.rng.uniform(3, 9) * far)
        relief = np.where(far > 0.82, 1.0, relief) * c.rng.uniform(0.2, 0.5)
        light = 0.8 - 0.45 * (dx + dy) * 0.7 + relief
        face = c.palette[c.rng.randint(2, 5)] * light[..., None]
        shadow = (np.hypot(dx - 0.15, dy - 0.15) < 1)[..., None]
        pixels = np.where(shadow, pixels * 0.4, pixels)
        pixels = np.where((far < 1)[..., None], face, pixels)
    return pixels


def _wood(c: _Canvas) -> Grid:
    x, y = c.x - c.rng.uniform(-0.2, 1.2), (c.y - c.rng.uniform(-0.2, 1.2)) * c.rng.uniform(0.3, 1)
    rings = np.hypot(x, y) * c.rng.uniform(10, 18) + 2.5 * c.noise(coarse=3, octaves=4)
    grain = c.tinted(_stretched((rings % 1) ** 0.7 + 0.4 * c.noise(coarse=20, octaves=3)))
    planks = c.rng.randint(2, 4)
    edge = np.minimum((c.y * planks) % 1, 1 - (c.y * planks) % 1) < 0.025
    tone = c.numbers.uniform(0.65, 1.15, planks)[
        np.minimum((c.y * planks).astype(int), planks - 1)
    ]
    return np.where(edge[..., None], 0.05, grain * tone[..., None])


def _galaxy(c: _Canvas) -> Grid:
    sky = 0.12 * c.tinted(c.noise(coarse=3, octaves=6), (0, 2, 4))
    for _ in range(c.rng.randint(4, 8)):
        x, y, r = c.rng.random(), c.rng.random(), c.rng.uniform(0.06, 0.25)
        turn, flat = c.rng.uniform(0, 6.28), c.rng.uniform(0.4, 1.0)
        dx, dy = (c.x - x) / r, (c.y - y) / r
        u = dx * math.cos(turn) + dy * math.sin(turn)
        v = (dy * math.cos(turn) - dx * math.sin(turn)) / flat
        far = np.hypot(u, v)
        arms = 0.5 + 0.5 * np.cos(2 * np.arctan2(v, u) - c.rng.uniform(4, 9) * far)
        light = np.exp(-3 * far) + arms * np.exp(-1.6 * far) * 0.8
        sky = sky + light[..., None] * c.palette[c.rng.randint(2, 5)]
    for _ in range(c.rng.randint(60, 110)):
        far = np.hypot(c.x - c.rng.random(), c.y - c.rng.random()) * c.rng.uniform(70, 160)
        sky = sky + np.exp(-(far**2))[..., None] * c.palette[c.rng.randint(3, 5)] * 1.3
    return sky


def _kaleidoscope(c: _Canvas) -> Grid:
    sectors = c.rng.choice((5, 6, 8))
    x, y = c.x - c.rng.uniform(0.42, 0.58), c.y - c.rng.uniform(0.42, 0.58)
    far, angle = np.hypot(x, y), np.arctan2(y, x) % (2 * math.pi / sectors)
    angle = np.minimum(angle, 2 * math.pi / sectors - angle)
    source = c.tinted(_stretched(np.sin(9 * c.noise(coarse=4)) + c.noise(coarse=8)), (0, 2, 3, 5))
    u = (far * np.cos(angle) * 1.3 * c.size).astype(int) % c.size
    v = (far * np.sin(angle) * 1.3 * c.size).astype(int) % c.size
    drawn: Grid = source[v, u] * (
        0.6 + 0.8 * c.noise(coarse=2, octaves=6, roughness=0.7)[..., None]
    )
    return drawn


def _water(c: _Canvas) -> Grid:
    horizon = c.rng.uniform(0.25, 0.5)
    sky = c.tinted(_stretched(c.y / horizon + 1.2 * c.noise(coarse=3, octaves=6)), (2, 3, 4, 5))
    depth = np.maximum(c.y - horizon, 1e-3)
    waves = np.sin(4 / (depth + 0.08) + 6 * c.noise(coarse=4)) + np.sin(
        20 * c.x / (depth + 0.3) + 30 * np.sqrt(depth) + 5 * c.noise(coarse=3)
    )
    sea = c.tinted(_stretched(waves + c.noise(coarse=6, octaves=5)), (0, 1, 3, 4))
    pixels = np.where((c.y > horizon)[..., None], sea, sky)
    image, draw = c.sheet(pixels)
    for _ in range(c.rng.randint(2, 4)):
        x, y = c.size * c.rng.uniform(0.1, 0.9), c.size * c.rng.uniform(horizon, 0.85)
        r = 0.12 * c.size * c.rng.uniform(0.5, 1) * (0.4 + y / c.size)
        hull = [(x - r, y - 0.3 * r), (x + r, y - 0.3 * r), (x + 0.6 * r, y), (x - 0.6 * r, y)]
        draw.polygon(hull, fill=c.colour(0, 0.5))
        draw.line([(x, y), (x, y - 2.2 * r)], fill=(30, 25, 20), width=max(2, c.size // 90))
        draw.polygon([(x, y - 2.2 * r), (x, y - 0.5 * r), (x + r, y - 0.5 * r)], fill=c.colour(5))
    return _to_pixels(image)


def _basket(c: _Canvas) -> Grid:
    tiles = c.rng.randint(6, 9)
    u, v = c.x * tiles, c.y * tiles
    over = (u.astype(int) + v.astype(int)) % 2 == 0
    bulge = np.where(over, np.sin(math.pi * (u % 1)), np.sin(math.pi * (v % 1)))
    tone = c.numbers.random((2, tiles))
    strand = np.where(over, tone[0][v.astype(int)], tone[1][u.astype(int)])
    fibre = np.where(over, np.sin(v * 25), np.sin(u * 25))
    pixels = c.tinted(strand, (1, 3, 4, 5)) * (0.25 + 0.75 * bulge[..., None])
    shade = 0.6 + 0.7 * c.noise(coarse=2, octaves=6, roughness=0.7)
    return pixels * (1 + 0.15 * fibre[..., None]) * shade[..., None]


FLATTEST = 0.008
"""Edges that an image must have, or it is drawn again; the benchmark's photographs have 0.012 to
0.085."""

Drawing = Callable[[_Canvas], Grid]

KINDS: dict[str, tuple[Drawing, tuple[str, ...]]] = {
    "landscape": (_landscape, ("hills", "snow")),
    "mosaic": (_mosaic, ("rocks", "bricks")),
    "tissue": (_tissue, ("tissue", "glands")),
    "truchet": (_truchet, ("snakes", "ribbon")),
    "maze": (_maze, ("garden", "fence")),
    "rosette": (_rosette, ("blossom", "emblem", "flower")),
    "plant": (_plant, ("tree", "trees", "dahlia")),
    "page": (_page, ("page", "manuscript", "letter")),
    "julia": (_julia, ("vessels", "magnet")),
    "plaid": (_plaid, ("shirt", "cotton", "jacket")),
    "contours": (_contours, ("survey", "lake")),
    "portrait": (_portrait, ("portrait", "author", "cameraman")),
    "bookshelf": (_bookshelf, ("novel", "jacket")),
    "circuit": (_circuit, ("phone", "telescope", "probe")),
    "city": (_city, ("house", "market", "palace")),
    "craters": (_craters, ("crater", "moon")),
    "discs": (_discs, ("coins", "balloon")),
    "wood": (_wood, ("wall", "bench")),
    "galaxy": (_galaxy, ("galaxies", "cluster")),
    "kaleidoscope": (_kaleidoscope, ("disc", "phantom")),
    "water": (_water, ("sea", "boat")),
    "basket": (_basket, ("wheat", "brickwork")),
}
"""What is drawn and what its captions call it."""

_LOOKS = (
    "old", "weathered", "vivid", "silver", "slanted", "classic", "curled", "empty", "summer",
    "official", "distant", "slim", "orange", "purple", "red", "green", "round", "grey", "brown",
    "ceramic", "botanical", "wrapped", "dark", "bright", "stained", "greek", "navy", "unknown",
)  # fmt: skip
_PLACES = (
    "behind red tripod", "above greek temple", "inside north hospital", "past wheat field",
    "from navy store", "on yellow asphalt", "for birthday tests", "in summer market",
    "at garage sunset", "by silver lighthouse", "with white windmill", "into deep lake",
    "of purple clouds", "behind stereo camera", "on black saucer", "from botanical palace",
    "above orange sand", "inside cotton case", "past honda bench", "at pompeii dawn",
    "by stereo camera", "with brown birds", "behind slim tent", "in distant garage",
)  # fmt: skip


def draw_structure(index: int, *, size: int = 256, seed: int = 0) -> Structure:
    """Draw one image of the seeded stream; the same index always gives the same image.

    Kinds take turns, so that any 22 images in a row are of all kinds.

    Args:
        index: Position in the stream, any non-negative integer.
        size: Side of the square image in pixels; below 256 it is drawn at 256 and reduced.
        seed: Which stream.
    """
    kind = list(KINDS)[index % len(KINDS)]
    drawing, names = KINDS[kind]
    for attempt in itertools.count():
        rng = random.Random(f"structure-{seed}-{index}" + (f"-{attempt}" if attempt else ""))
        image = _photographed(_Canvas(rng, max(size, 256)), drawing)
        if _edges(image) > FLATTEST:
            break
    if image.width != size:
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    look, other = rng.sample(_LOOKS, 2)
    name = rng.choice(names)
    caption = f"{look} {other} {name} {rng.choice(_PLACES)}"
    return Structure(kind, caption, f"some {name}", image)


def _photographed(c: _Canvas, drawing: Drawing) -> Image.Image:
    """A drawing under uneven light, with less contrast, grain and often a little out of focus."""
    pixels = drawing(c)
    light = 1 + c.rng.uniform(-0.25, 0.25) * (c.x - 0.5)
    light += c.rng.uniform(-0.25, 0.25) * (c.y - 0.5)
    pixels = np.clip(pixels * light[..., None], 0, 1)
    pixels = pixels.mean() + c.rng.uniform(0.55, 1.0) * (pixels - pixels.mean())
    grain = c.numbers.normal(0, c.rng.uniform(0.0, 0.02), pixels.shape)
    image = _to_image(pixels + grain)
    if c.rng.random() < 0.6:
        image = image.filter(ImageFilter.GaussianBlur(c.size / 256 * c.rng.uniform(0.5, 3.0)))
    return image


def _edges(image: Image.Image) -> float:
    """Mean absolute difference of neighbouring grey pixels at 64 pixels, in [0, 1]."""
    grey = _to_pixels(image.resize((64, 64), Image.Resampling.LANCZOS).convert("L"))
    return float(sum(np.abs(np.diff(grey, axis=axis)).mean() for axis in (0, 1)) / 2)
