"""Videos as pictures in a row, decoded and encoded by PyAV.

A decoder's habit is to make up what a damaged file does not hold, and to end early without a word where a file breaks
off. Label maps of made-up pictures look like any other. So the decoder is asked to stop at the first damage, and the
end of a video is compared with what its header promises.

PyAV is an extra of its own: only videos need it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

import numpy as np

from memseg.data.dataset import Pixels
from memseg.errors import DataError, InputError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".wmv"})
"""What is taken for a video; everything else for a picture."""

_STRICT = {"err_detect": "explode"}
"""FFmpeg's option for decoders: an error at the first damage, not a guess."""
_MISSING_S = 1.0
"""Seconds that a video may be shorter than its header says, where that does not count its frames: sound may be longer
than the pictures."""
_USUAL_RATE = Fraction(25)
"""Pictures per second where a file does not say."""


class Video:
    """The pictures of a file.

    Attributes:
        path: Of the file.
        size: (height, width) in pixels.
        rate: Pictures per second.
        frames: How many there are, by the header; an estimate where it does not count them, 0 where nothing tells.
    """

    def __init__(self, path: Path, container: "InputContainer", stream: "VideoStream") -> None:
        self.path, self._container, self._stream = path, container, stream
        self.size = (stream.height, stream.width)
        self.rate = stream.average_rate or stream.guessed_rate or _USUAL_RATE
        seconds = container.duration / 1_000_000 if container.duration else 0.0
        self.frames = stream.frames or round(seconds * self.rate)
        self._seconds = seconds

    def pictures(self, every: int = 1) -> Iterator[tuple[int, Pixels]]:
        """The number, from 0, and the pixels, uint8 (H, W, 3), of each `every`-th picture; to be asked for once.

        Raises:
            DataError: the file is damaged or breaks off; all pictures before that have been given.
        """
        from av.error import FFmpegError

        self._stream.codec_context.options = dict(_STRICT)
        read, end = 0, 0.0
        try:
            for frame in self._container.decode(self._stream):
                if frame.is_corrupt or (frame.height, frame.width) != self.size:
                    what = "is damaged" if frame.is_corrupt else f"has another size, {frame.height}x{frame.width}"
                    raise self._broken(f"its picture {read} {what}")
                if read % every == 0:
                    yield read, cast(Pixels, frame.to_ndarray(format="rgb24"))
                read += 1
                end = max(end, (frame.time or 0.0) + float(1 / self.rate))
        except FFmpegError as error:
            raise self._broken(f"it cannot be decoded after {read} pictures ({error.strerror})") from None
        if read < self._stream.frames:
            raise self._broken(f"it breaks off after {read} of {self._stream.frames} pictures")
        if not self._stream.frames and end < self._seconds - _MISSING_S:
            raise self._broken(f"it breaks off after {end:.1f} of {self._seconds:.1f} s, {read} pictures")

    def _broken(self, what: str) -> DataError:
        return DataError(
            str(self.path), [f"{what}; what was written up to there stays, restore the video for the rest"]
        )


@contextmanager
def open_video(path: Path) -> Iterator[Video]:
    """The video in a file.

    Raises:
        InputError: PyAV is not installed.
        DataError: the file is no video.
    """
    require_pyav()
    import av
    from av.error import FFmpegError

    try:
        container = av.open(str(path))
    except (FFmpegError, OSError) as error:
        raise DataError(str(path), [f"must be a video that FFmpeg can read: {error.strerror}"]) from None
    with container:
        if not container.streams.video:
            raise DataError(str(path), ["must be a video, found no pictures in it"])
        yield Video(path, container, container.streams.video[0])


def require_pyav() -> None:
    """Do nothing where PyAV is installed.

    Raises:
        InputError: it is not.
    """
    if find_spec("av") is None:
        raise InputError('videos need PyAV, which is not installed; install it with: pip install "memseg[video]"')


class VideoWriter:
    """An MP4 of pictures of one size, which plays wherever H.264 does; a context, which finishes the file at its end.

    The usual layout of colours wants even sides, so an odd side gets its last row or column twice.

    Args:
        path: Of the file, which is replaced.
        rate: Pictures per second.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        import av

        self._container = av.open(str(path), "w")
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        self._stream = cast("VideoStream", self._container.add_stream(codec, rate=rate))
        self._stream.pix_fmt = "yuv420p"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._stream.codec_context.is_open:
                self._container.mux(self._stream.encode())
        finally:
            self._container.close()

    def add(self, picture: Pixels) -> None:
        """Append a picture, uint8 (H, W, 3), RGB."""
        from av import VideoFrame

        height, width = picture.shape[:2]
        even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if not self._stream.codec_context.is_open:
            self._stream.height, self._stream.width = even.shape[:2]
        self._container.mux(self._stream.encode(VideoFrame.from_ndarray(even, format="rgb24")))
