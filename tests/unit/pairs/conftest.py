"""Tiny picture folders for the readers' tests."""

import csv
import json

import numpy as np
import pytest
from PIL import Image


def _picture(path, *, seed=0, size=(24, 24), **options):
    """Write a picture of seeded noise; the suffix decides the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def _csv(path, rows, *, delimiter=",", encoding="utf-8"):
    """Write rows with the columns of the first."""
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def _jsonl(path, rows):
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    """Three pictures, a.png to c.png, without a list."""
    root = tmp_path / "pictures"
    for seed, name in enumerate("abc"):
        _picture(root / f"{name}.png", seed=seed)
    return root


@pytest.fixture
def make_picture():
    return _picture


@pytest.fixture
def make_csv():
    return _csv


@pytest.fixture
def make_jsonl():
    return _jsonl
