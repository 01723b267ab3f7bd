"""Label maps for pictures and videos of one's own.

A folder may hold hundreds of pictures and one of them may be broken. What can be known beforehand (a missing file, a
file that is no picture, two pictures whose results would overwrite each other) is told before the first is labelled,
all at once. What shows only on decoding stops the work with the file's name, and every result already written stays,
whole.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from memseg.data import ClassList
from memseg.data.dataset import read_image, visible_files
from memseg.errors import DataError, InputError
from memseg.inference.images import label_png, overlay_png, save_png
from memseg.inference.labelling import Framing, evaluating, label_image
from memseg.inference.video import VIDEO_SUFFIXES, VideoWriter, open_video, require_pyav
from memseg.levels import Precision
from memseg.models import SegmentedModel

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm"})
"""What counts as a picture inside a folder; a file that is named itself may have any suffix but those of videos."""

_LABELS, _OVERLAY, _VIDEO_OVERLAY = "_labels.png", "_overlay.png", "_overlay.mp4"
"""How the names of results end."""

Progress = Callable[[int, int], None]
"""Called with the pictures done and the pictures in all."""


@dataclass(frozen=True)
class Prediction:
    """Where the results of one picture lie."""

    image: Path
    labels: Path | None
    """Palette PNG of the picture's size; its values are class indices, 255 for what the network did not see."""
    overlay: Path | None
    """RGB PNG of the picture's size, with the colours of the classes laid over it."""


@dataclass(frozen=True)
class VideoPrediction:
    """Where the results of one video lie."""

    video: Path
    frames: int
    """How many of its pictures were labelled."""
    labels: Path | None
    """A folder with a palette PNG of each, NUMBER_labels.png; numbers are those of the video's pictures, from 0."""
    overlay: Path | None
    """An MP4 with the colours of the classes laid over them."""


@dataclass(frozen=True)
class Inputs:
    """What is to be labelled."""

    images: list[Path]
    videos: list[Path]


def find_inputs(paths: Sequence[Path], out_dir: Path | None = None) -> Inputs:
    """Pictures and videos among files and folders, in the order given, each once.

    Args:
        paths: Files, and folders, which are searched to the bottom, sorted.
        out_dir: Where results go. What an earlier run has left there is no picture of a folder.

    Raises:
        DataError: a path does not exist, or a folder holds neither; all of these together.
    """
    found: list[Path] = []
    problems = []
    for path in paths:
        if path.is_dir():
            known = IMAGE_SUFFIXES | VIDEO_SUFFIXES
            inside = [file for file in visible_files(path) if file.suffix.lower() in known]
            inside = [file for file in inside if not _is_result(file, out_dir)]
            if not inside:
                problems.append(f"{path}: a folder must hold pictures or videos ({', '.join(sorted(known))}), has none")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            problems.append(f"{path}: no such file or folder")
    if problems:
        raise DataError("pictures", problems)
    found = list({path.resolve(): path for path in reversed(found)}.values())[::-1]
    videos = [path for path in found if path.suffix.lower() in VIDEO_SUFFIXES]
    return Inputs([path for path in found if path not in videos], videos)


def predict_images(
    model: SegmentedModel,
    image_paths: Sequence[Path],
    out_dir: Path,
    classes: ClassList,
    *,
    device: torch.device | str = "cpu",
    framing: Framing | None = None,
    precision: Precision = Precision.FLOAT32,
    labels: bool = True,
    overlay: bool = True,
    progress: Progress | None = None,
) -> list[Prediction]:
    """Label pictures one at a time, each at its own size, and write for each NAME_labels.png and NAME_overlay.png.

    Args:
        model: Moved to `device`; run in eval mode, and left in the mode it came in.
        image_paths: Files that Pillow can read.
        out_dir: Made if absent; results of earlier runs under the same names are replaced.
        classes: Names and colours of the network's classes.
        device: Where the network runs.
        framing: What of each picture the network sees; None for all of it at its own size.
        precision: As for `label_image`.
        labels, overlay: Which of the two files are written.
        progress: Told after each picture how many are done, and how many there are.

    Returns:
        One entry per picture, in order.

    Raises:
        DataError: before anything is written: all pictures that cannot be opened, or would share a result. Later: a
            picture that cannot be decoded.
    """
    framing = framing or Framing()
    device = torch.device(device)
    if problems := _image_problems(image_paths, framing):
        raise DataError("pictures", problems)
    out_dir.mkdir(parents=True, exist_ok=True)
    predictions = []
    with evaluating(model, device):
        for done, path in enumerate(image_paths, start=1):
            image = read_image(path)
            found = label_image(model, image, framing=framing, device=device, precision=precision)
            labels_path = out_dir / f"{path.stem}{_LABELS}" if labels else None
            overlay_path = out_dir / f"{path.stem}{_OVERLAY}" if overlay else None
            if labels_path:
                save_png(label_png(found, classes), labels_path)
            if overlay_path:
                save_png(overlay_png(image, found, classes), overlay_path)
            predictions.append(Prediction(path, labels_path, overlay_path))
            if progress:
                progress(done, len(image_paths))
    return predictions


def predict_video(
    model: SegmentedModel,
    path: Path,
    out_dir: Path,
    classes: ClassList,
    *,
    every: int = 1,
    device: torch.device | str = "cpu",
    framing: Framing | None = None,
    precision: Precision = Precision.FLOAT32,
    labels: bool = True,
    overlay: bool = True,
    progress: Progress | None = None,
) -> VideoPrediction:
    """Label each `every`-th picture of a video; write NAME/NUMBER_labels.png for each, and NAME_overlay.mp4.

    Args:
        path: A video that FFmpeg can read.
        every: 1 for all pictures. The overlay plays at that share of the video's rate, so as long as the video.
        labels, overlay: Whether the PNGs, and the MP4, are written.
        progress: Told after each labelled picture how many are done, and how many are expected.
        model, out_dir, classes, device, framing, precision: As for `predict_images`.

    Raises:
        InputError: PyAV is not installed, or the video is smaller than the framing's region.
        DataError: the file is no video; or it is damaged or breaks off, then all results up to there are whole.
    """
    framing = framing or Framing()
    device = torch.device(device)
    frames = out_dir / path.stem if labels else None
    overlay_path = out_dir / f"{path.stem}{_VIDEO_OVERLAY}" if overlay else None
    done = 0
    with ExitStack() as opened:
        video = opened.enter_context(open_video(path))
        framing.region_in(video.size)
        out_dir.mkdir(parents=True, exist_ok=True)
        if frames:
            frames.mkdir(exist_ok=True)
        writer = opened.enter_context(VideoWriter(overlay_path, video.rate / every)) if overlay_path else None
        opened.enter_context(evaluating(model, device))
        for number, image in video.pictures(every):
            found = label_image(model, image, framing=framing, device=device, precision=precision)
            if frames:
                save_png(label_png(found, classes), frames / f"{number:06d}{_LABELS}")
            if writer:
                writer.add(np.asarray(overlay_png(image, found, classes)))
            done += 1
            if progress:
                progress(done, max(done, -(-video.frames // every)))
    return VideoPrediction(path, done, frames, overlay_path)


def check_inputs(inputs: Inputs, framing: Framing) -> None:
    """Do nothing where all pictures and videos can be opened and their results will not overwrite each other.

    Raises:
        InputError: there are videos, and PyAV is not installed.
        DataError: with every problem that shows in names and headers.
    """
    if inputs.videos:
        require_pyav()
    if problems := [*_image_problems(inputs.images, framing), *_video_problems(inputs.videos, framing)]:
        raise DataError("pictures and videos", problems)


def _is_result(file: Path, out_dir: Path | None) -> bool:
    """Whether an earlier run may have written a file."""
    named_so = file.name.endswith((_LABELS, _OVERLAY, _VIDEO_OVERLAY))
    return named_so and out_dir is not None and file.resolve().is_relative_to(out_dir.resolve())


def _image_problems(paths: Sequence[Path], framing: Framing) -> list[str]:
    problems = []
    names: dict[str, Path] = {}
    for path in paths:
        try:
            with Image.open(path) as image:
                framing.region_in((image.height, image.width))
                if image.mode.startswith(("I", "F")):
                    problems.append(f"{path}: must have 8 bits a channel, has more (Pillow's mode {image.mode})")
        except (OSError, ValueError, InputError, Image.DecompressionBombError) as error:
            problems.append(f"{path}: {_reason(error)}")
        problems += _clash(names, path)
    return problems


def _video_problems(paths: Sequence[Path], framing: Framing) -> list[str]:
    problems = []
    names: dict[str, Path] = {}
    for path in paths:
        try:
            with open_video(path) as video:
                framing.region_in(video.size)
        except DataError as error:
            problems += [f"{path}: {problem}" for problem in error.problems]
        except InputError as error:
            problems.append(f"{path}: {error}")
        problems += _clash(names, path)
    return problems


def _clash(names: dict[str, Path], path: Path) -> list[str]:
    """A problem where a file before has the same name but for its folder and suffix; the name joins `names`."""
    other = names.setdefault(path.stem, path)
    if other == path:
        return []
    return [f"{path}: its results would overwrite those of {other}; rename one, or use two --out folders"]


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, UnidentifiedImageError):
        return "must be a picture that Pillow can read (PNG, JPEG, ...), it is not"
    return str(error) if isinstance(error, InputError) else f"cannot be decoded, the file is damaged: {error}"
