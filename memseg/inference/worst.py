"""The pictures of a split that a network does worst on, to look at: input, truth and prediction side by side.

Source: figure 4 of Kreso, Krapac, Segvic, "Ladder-style DenseNets for Semantic Segmentation of Large Natural Images".
"""

from PIL import Image, ImageDraw, ImageFont

from memseg.data import ClassList, SegmentationDataset
from memseg.data.dataset import Pixels
from memseg.inference.evaluate import ImageScore
from memseg.inference.images import label_png

PANEL_WIDTH = 1024
"""Pixels that each of the three parts of a strip is at most wide."""
_GAP, _LINE, _FONT_SIZE = 8, 34, 18
"""Pixels between the parts, and of the line above them."""


class WorstImages:
    """The label maps of the worst pictures so far, while a split is evaluated.

    Of as many pictures as are asked for one byte for each pixel is kept, of the others nothing.

    Args:
        count: How many pictures are kept.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: list[tuple[ImageScore, Pixels]] = []

    def add(self, score: ImageScore, labels: Pixels) -> None:
        """One more picture; where nothing of it is labelled, it is not among the worst."""
        if score.miou is None:
            return
        self._kept.append((score, labels))
        self._kept.sort(key=lambda kept: (kept[0].miou, kept[0].index))
        del self._kept[self._count :]

    def ranked(self) -> list[tuple[ImageScore, Pixels]]:
        """Score and labels of each that was kept, the worst first."""
        return list(self._kept)


def strip(dataset: SegmentationDataset, score: ImageScore, labels: Pixels) -> Image.Image:
    """Input, truth and prediction of a picture side by side, RGB.

    Args:
        dataset: Where the picture is from.
        score: Of the picture.
        labels: What was predicted, uint8 (H, W).
    """
    parts = (
        (Image.fromarray(dataset.image(score.index)), Image.Resampling.BILINEAR),
        (_coloured(dataset.target(score.index), dataset.classes), Image.Resampling.NEAREST),
        (_coloured(labels, dataset.classes), Image.Resampling.NEAREST),
    )
    height, width = dataset.size(score.index)
    shrink = min(1, PANEL_WIDTH / width)
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    sheet = Image.new("RGB", (3 * size[0] + 2 * _GAP, size[1]), "white")
    for place, (part, resampling) in enumerate(parts):
        sheet.paste(part.resize(size, resampling), (place * (size[0] + _GAP), 0))
    return sheet


def captioned(picture: Image.Image, text: str) -> Image.Image:
    """A picture with a line of text above it."""
    sheet = Image.new("RGB", (picture.width, picture.height + _LINE), "white")
    ImageDraw.Draw(sheet).text((4, 5), text, fill="black", font=ImageFont.load_default(_FONT_SIZE))
    sheet.paste(picture, (0, _LINE))
    return sheet


def caption(score: ImageScore) -> str:
    """A picture's name and scores in one line."""
    return f"{score.key}: mIoU {score.miou or 0:.1%}, pixel accuracy {score.pixel_accuracy or 0:.1%}"


def _coloured(labels: Pixels, classes: ClassList) -> Image.Image:
    return label_png(labels, classes).convert("RGB")
