"""Label maps for pictures of one's own.

A folder may hold hundreds of pictures and one of them may be broken. What can be known beforehand (a missing file, a
file that is no picture, two pictures whose results would overwrite each other) is told before the first is labelled.
What shows only on decoding stops the work with the file's name, and every result already written stays, whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from memseg.data import ClassList
from memseg.data.dataset import read_image, visible_files
from memseg.errors import DataError, InputError
from memseg.inference.images import label_png, overlay_png, save_png
from memseg.inference.labelling import Framing, label_image
from memseg.models import SegmentedModel

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm"})
"""What counts as a picture inside a folder; a file that is named itself may have any suffix."""


@dataclass(frozen=True)
class Prediction:
    """Where the results of one picture lie."""

    image: Path
    labels: Path
    """Palette PNG of the picture's size; its values are class indices, 255 for what the network did not see."""
    overlay: Path
    """RGB PNG of the picture's size, with the colours of the classes laid over it."""


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The pictures among files and folders, in the order given; folders are searched to the bottom, in sorted order.

    Raises:
        DataError: a path does not exist, or a folder holds no picture; all of these together.
    """
    found: list[Path] = []
    problems = []
    for path in paths:
        if path.is_dir():
            inside = [file for file in visible_files(path) if file.suffix.lower() in IMAGE_SUFFIXES]
            if not inside:
                problems.append(
                    f"{path}: a folder must hold pictures ({', '.join(sorted(IMAGE_SUFFIXES))}), found none"
                )
            found += inside
        elif path.exists():
            found.append(path)
        else:
            problems.append(f"{path}: no such file or folder")
    if problems:
        raise DataError("pictures", problems)
    return found


def predict_images(
    model: SegmentedModel,
    image_paths: Sequence[Path],
    out_dir: Path,
    classes: ClassList,
    *,
    device: torch.device | str = "cpu",
    framing: Framing | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """Label pictures one at a time, each at its own size, and write for each NAME_labels.png and NAME_overlay.png.

    Args:
        model: Moved to `device`; run in eval mode, and left in the mode it came in.
        image_paths: Files that Pillow can read.
        out_dir: Made if absent; results of earlier runs under the same names are replaced.
        classes: Names and colours of the network's classes.
        device: Where the network runs.
        framing: What of each picture the network sees; None for all of it at its own size.
        progress: Told after each picture how many are done, and how many there are.

    Returns:
        One entry per picture, in order.

    Raises:
        DataError: before anything is written: all pictures that cannot be opened, or would share a result. Later: a
            picture that cannot be decoded.
    """
    framing = framing or Framing()
    device = torch.device(device)
    _check_images(image_paths, framing)
    out_dir.mkdir(parents=True, exist_ok=True)
    predictions = []
    was_training = model.training
    model.to(device).eval()
    try:
        for done, path in enumerate(image_paths, start=1):
            image = read_image(path)
            labels = label_image(model, image, framing=framing, device=device)
            prediction = Prediction(path, out_dir / f"{path.stem}_labels.png", out_dir / f"{path.stem}_overlay.png")
            save_png(label_png(labels, classes), prediction.labels)
            save_png(overlay_png(image, labels, classes), prediction.overlay)
            predictions.append(prediction)
            if progress:
                progress(done, len(image_paths))
    finally:
        model.train(was_training)
    return predictions


def _check_images(paths: Sequence[Path], framing: Framing) -> None:
    """Raise one DataError with every problem that shows in names and headers."""
    problems = []
    names: dict[str, Path] = {}
    for path in paths:
        try:
            with Image.open(path) as image:
                framing.region_in((image.height, image.width))
        except (OSError, ValueError, InputError, Image.DecompressionBombError) as error:
            problems.append(f"{path}: {_reason(error)}")
        other = names.setdefault(path.stem, path)
        if other != path:
            problems.append(
                f"{path}: its results would overwrite those of {other}; rename one, or use two --out folders"
            )
    if problems:
        raise DataError("pictures", problems)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, UnidentifiedImageError):
        return "must be a picture that Pillow can read (PNG, JPEG, ...), it is not"
    return str(error) if isinstance(error, InputError) else f"cannot be decoded, the file is damaged: {error}"
