"""Label maps as pictures: one that programs read, one that people look at."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from memseg.data import IGNORE_INDEX, ClassList
from memseg.data.dataset import Pixels
from memseg.files import replace_file


def colour_map(classes: ClassList) -> Pixels:
    """The colour of each label, uint8 (256, 3); black for 255 and for every other label that is no class.

    >>> colour_map(ClassList(("road", "sky"), ((128, 64, 128), (70, 130, 180))))[[0, 1, 255]].tolist()
    [[128, 64, 128], [70, 130, 180], [0, 0, 0]]
    """
    colours = np.zeros((256, 3), dtype=np.uint8)
    colours[: len(classes.colours)] = classes.colours
    return colours


def label_png(labels: Pixels, classes: ClassList) -> Image.Image:
    """A label map as a palette picture: its values are the labels, its palette shows them in their classes' colours.

    Args:
        labels: uint8 (H, W), class indices; 255 is shown black.
        classes: Whose colours the palette gets.
    """
    picture = Image.fromarray(labels).convert("P")
    picture.putpalette(colour_map(classes).tobytes())
    return picture


def overlay_png(image: Pixels, labels: Pixels, classes: ClassList, *, opacity: float = 0.5) -> Image.Image:
    """A picture with the colours of its labels laid over it.

    Args:
        image: uint8 (H, W, 3), RGB.
        labels: uint8 (H, W); where 255, the picture stays as it is.
        classes: Whose colours are laid over.
        opacity: Share of the colour in the mix, 0 to 1.
    """
    share = np.where(labels == IGNORE_INDEX, 0.0, opacity).astype(np.float32)[..., None]
    mixed = image * (1 - share) + colour_map(classes)[labels] * share
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def jpeg_bytes(picture: Image.Image) -> bytes:
    """A picture as a JPEG, its colours at full resolution: label maps have sharp edges."""
    content = BytesIO()
    picture.save(content, format="JPEG", quality=88, subsampling=0)
    return content.getvalue()


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG that is whole or not there."""
    content = BytesIO()
    picture.save(content, format="PNG")
    replace_file(path, content.getvalue())
