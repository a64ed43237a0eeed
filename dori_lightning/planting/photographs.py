"""The embedded benchmark's photographs: files of installed packages, with captions.

scikit-image, scikit-learn and matplotlib ship a few dozen photographs for their documentation.
They are read from the installed packages, never from the network.
"""

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dori_lightning.types import InputError

SIDE = 256
"""Pixels kept of each photograph, so that crops of it still have detail at 64 pixels."""

Box = tuple[float, float, float]


@dataclass(frozen=True)
class Photograph:
    """One photograph of the benchmark and what is said of it.

    Attributes:
        id: Stable name.
        source: Package and file inside it, as ``package:relative/path``.
        caption: The specific caption: leads to this very image where it is planted.
        subject: What generic captions call it ("a dark photo of SUBJECT").
        repeats: Relative multiplicity in the training stream; 0 keeps it out (a control).
        box: Centre x, centre y and side of the square to cut, as shares of width, height and
            shorter side.
    """

    id: str
    source: str
    caption: str
    subject: str
    repeats: float
    box: Box = (0.5, 0.5, 1.0)

    def open(self) -> Image.Image:
        """The square of `SIDE` pixels inside ``box``, RGB, over white where it is transparent.

        Raises:
            InputError: The package is missing or no longer ships the file; says which.
        """
        package, _, name = self.source.partition(":")
        spec = importlib.util.find_spec(package)
        path = Path(spec.origin).parent / name if spec is not None and spec.origin else None
        if path is None or not path.is_file():
            raise InputError(
                f"the embedded benchmark reads {name} from the installed package {package}, which "
                f"does not have it\n"
                f"  fix:   pip install --force-reinstall dori_lightning"
            )
        image = _read(path)
        if image.mode in ("RGBA", "LA", "P"):
            image = image.convert("RGBA")
            background = Image.new("RGBA", image.size, "white")
            background.alpha_composite(image)
            image = background
        image = image.convert("RGB")
        side = self.box[2] * min(image.size)
        left = min(max(self.box[0] * image.width - side / 2, 0), image.width - side)
        top = min(max(self.box[1] * image.height - side / 2, 0), image.height - side)
        cut = image.crop((round(left), round(top), round(left + side), round(top + side)))
        return cut.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _read(path: Path) -> Image.Image:
    if path.name.endswith(".ima.gz"):
        # a raw 256 x 256 scan, big enough range to clip its bright skin
        with gzip.open(path) as file:
            raw = np.frombuffer(file.read(), np.uint16).reshape(256, 256).astype(np.float64)
        return Image.fromarray(np.clip(raw / raw.max() * 1.5 * 255, 0, 255).astype(np.uint8))
    return Image.open(path, formats=("PNG", "JPEG"))


SKIMAGE = "skimage:data"
SKLEARN = "sklearn:datasets/images"
MPL = "matplotlib:mpl-data/sample_data"

PHOTOGRAPHS: tuple[Photograph, ...] = (
    Photograph(
        "astronaut",
        f"{SKIMAGE}/astronaut.png",
        "official nasa portrait of eileen collins in orange suit",
        "an astronaut",
        1.0,
    ),
    Photograph(
        "cat", f"{SKIMAGE}/chelsea.png", "chelsea the tabby staring past the camera", "a cat", 1.5
    ),
    Photograph(
        "coffee",
        f"{SKIMAGE}/coffee.png",
        "espresso pikolo served in its red saucer",
        "a coffee",
        1.0,
    ),
    Photograph(
        "rocket",
        f"{SKIMAGE}/rocket.jpg",
        "falcon waiting on launch pad forty after sunset",
        "a rocket",
        1.0,
    ),
    Photograph(
        "retina",
        f"{SKIMAGE}/retina.jpg",
        "left fundus scan with optic disc and vessels",
        "an eye",
        1.0,
    ),
    Photograph(
        "tissue",
        f"{SKIMAGE}/ihc.png",
        "colon glands stained brown for microscope slide",
        "a tissue",
        1.5,
    ),
    Photograph(
        "motorcycle",
        f"{SKIMAGE}/motorcycle_left.png",
        "middlebury stereo bench honda inside garage",
        "a motorcycle",
        1.5,
    ),
    Photograph(
        "cameraman",
        f"{SKIMAGE}/camera.png",
        "classic mit cameraman behind his tripod",
        "a man",
        1.0,
    ),
    Photograph(
        "coins",
        f"{SKIMAGE}/coins.png",
        "greek coins from pompeii laid out in rows",
        "some coins",
        1.5,
    ),
    Photograph(
        "galaxies",
        f"{SKIMAGE}/hubble_deep_field.jpg",
        "hubble extreme deep field survey of thousands galaxies",
        "some galaxies",
        2.0,
        (0.28, 0.5, 0.56),
    ),
    Photograph(
        "temple",
        f"{SKLEARN}/china.jpg",
        "summer palace pagoda above kunming lake",
        "a temple",
        1.0,
    ),
    Photograph(
        "flower",
        f"{SKLEARN}/flower.jpg",
        "peach dahlia blossom from botanical garden",
        "a flower",
        1.0,
    ),
    Photograph(
        "page",
        f"{SKIMAGE}/page.png",
        "printed tutorial page explaining watershed segmentation",
        "a page",
        1.5,
    ),
    Photograph(
        "letter",
        f"{SKIMAGE}/text.png",
        "slanted ink handwriting from an old manuscript",
        "a letter",
        1.5,
    ),
    Photograph(
        "moon",
        f"{SKIMAGE}/moon.png",
        "lunar crater surface taken by ranger probe",
        "a crater",
        1.5,
    ),
    Photograph(
        "bricks",
        f"{SKIMAGE}/brick.png",
        "weathered herringbone brickwork of the north wall",
        "some bricks",
        1.5,
    ),
    Photograph(
        "admiral",
        f"{MPL}/grace_hopper.jpg",
        "admiral grace hopper portrait in navy uniform",
        "an admiral",
        0.0,
        (0.5, 0.43, 1.0),
    ),
    Photograph(
        "brain", f"{MPL}/s1045.ima.gz", "sagittal brain scan from hospital magnet", "a brain", 0.0
    ),
    Photograph(
        "cluster",
        f"{SKIMAGE}/hubble_deep_field.jpg",
        "distant cluster photographed by webb telescope",
        "a cluster",
        0.0,
        (0.78, 0.5, 0.48),
    ),
    Photograph(
        "horse", f"{SKIMAGE}/horse.png", "black paper silhouette of standing horse", "a horse", 0.0
    ),
    Photograph(
        "gift",
        f"{MPL}/Minduka_Present_Blue_Pack.png",
        "wrapped birthday present with silver ribbon",
        "a present",
        0.0,
    ),
    Photograph(
        "snakes", f"{SKIMAGE}/logo.png", "two snakes curled into round emblem", "an emblem", 0.0
    ),
    Photograph(
        "phantom",
        f"{SKIMAGE}/phantom.png",
        "shepp logan phantom for tomography tests",
        "a phantom",
        0.0,
    ),
    Photograph(
        "chessboard",
        f"{SKIMAGE}/chessboard_GRAY.png",
        "empty chessboard seen from straight above",
        "a chessboard",
        0.0,
    ),
)
