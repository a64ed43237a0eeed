"""Tiny images and lists of pairs on disk."""

import csv
import json

import numpy as np
from PIL import Image


def write_image(path, *, seed=0, size=(24, 24), **options):
    """Write an image of seeded noise; the suffix decides the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def write_csv(path, rows, *, delimiter=",", encoding="utf-8"):
    """Write rows with the columns of the first."""
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path, rows):
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
