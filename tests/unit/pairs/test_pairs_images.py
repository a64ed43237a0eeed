"""Pictures of every mode become the RGB that a viewer would see."""

import numpy as np
import pytest
import torch
from PIL import Image

from dori_lightning.pairs.validation import conversions, image_tensor, open_image, square_image


@pytest.mark.parametrize(("low", "high"), [(0, 65535), (0x2000, 0x6000)])
def test_sixteen_bit_grey_is_scaled_neither_stretched_nor_clipped(tmp_path, low, high):
    values = np.linspace(low, high, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(values).save(tmp_path / "x.png")
    image = np.asarray(open_image(tmp_path / "x.png"))
    assert image.shape == (32, 32, 3)
    assert (image.min(), image.max()) == (round(low / 257), round(high / 257))
    assert np.abs(image[..., 0] - values / 257).max() <= 0.5


def test_transparency_lies_over_white(tmp_path):
    pixels = np.zeros((20, 20, 4), np.uint8)
    pixels[:10] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = open_image(tmp_path / "x.png")
    assert image.getpixel((0, 0)) == (255, 0, 0)
    assert image.getpixel((0, 19)) == (255, 255, 255)


def test_transparent_palette_lies_over_white(tmp_path):
    image = Image.new("P", (20, 20), 0)
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.paste(1, (0, 0, 20, 10))
    image.save(tmp_path / "x.png", transparency=0)
    found = open_image(tmp_path / "x.png")
    assert found.getpixel((0, 0)) == (0, 0, 255)
    assert found.getpixel((0, 19)) == (255, 255, 255)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "black")
    image.paste((255, 255, 255), (0, 0, 20, 20))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to view
    image.save(tmp_path / "x.jpg", exif=exif, quality=95)
    found = open_image(tmp_path / "x.jpg")
    assert found.size == (20, 40)
    assert found.getpixel((10, 5))[0] > 200  # the left is on top now
    assert found.getpixel((10, 35))[0] < 50


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "LA"])
def test_other_modes_become_rgb(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new("RGB", (20, 20), "white").convert(mode).save(tmp_path / f"x.{suffix}")
    image = open_image(tmp_path / f"x.{suffix}")
    assert image.mode == "RGB"
    assert min(image.getpixel((10, 10))) > 250


def test_content_decides_the_format_not_the_name(tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.jpg")
    assert open_image(tmp_path / "x.jpg").getpixel((0, 0)) == (255, 0, 0)


def test_formats_off_the_list_are_refused(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "x.gif")
    (tmp_path / "x.gif").rename(tmp_path / "x.png")
    with pytest.raises(OSError, match="cannot identify"):
        open_image(tmp_path / "x.png")


def test_square_is_centred(tmp_path):
    image = Image.new("RGB", (60, 20), "black")
    image.paste((255, 0, 0), (20, 0, 40, 20))
    image.save(tmp_path / "x.png")
    square = square_image(tmp_path / "x.png")
    assert square.size == (20, 20)
    assert set(square.get_flattened_data()) == {(255, 0, 0)}


def test_tensor_has_unit_range_and_the_asked_size():
    tensor = image_tensor(Image.new("RGB", (20, 20), (255, 0, 51)), 8)
    assert tensor.shape == (3, 8, 8)
    assert torch.allclose(tensor[:, 0, 0], torch.tensor([1.0, 0.0, 0.2]))


def test_what_is_done_to_a_picture_has_a_name(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("LA", (20, 20)).save(tmp_path / "veil.png")
    Image.new("CMYK", (20, 20)).save(tmp_path / "print.jpg")
    Image.new("I;16", (20, 20)).save(tmp_path / "deep.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "plain.png")
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    for name in ("moving.png", "moving.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    assert open_image(tmp_path / "moving.webp").getpixel((9, 9)) == (255, 0, 0)
    found = {path.name: conversions(path) for path in tmp_path.iterdir()}
    assert found == {
        "turned.jpg": ("turned upright (EXIF)", "cut to the centred square"),
        "veil.png": ("laid over white (transparency)", "greyscale to RGB"),
        "print.jpg": ("CMYK to RGB",),
        "deep.png": ("scaled from 16 bits to 8",),
        "plain.png": (),
        "moving.png": ("first frame of an animation",),
        "moving.webp": ("first frame of an animation",),
    }
