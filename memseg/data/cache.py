"""Decoded pictures on disk, so that each is decoded once and not once an epoch.

A PNG of 2048x1024 takes longer to decode than the rest of its preparation, and a training run reads it dozens of times.
What comes before anything random is the same every time: it is kept as an .npy file, and mapped on reading, not copied.
Any number of processes may use one folder at once: files appear whole, by a rename. A file is named by a digest of what
decides its content (the source's path, size and time, and the preparation), so a changed source has another name. A
checksum stands behind the array: what is cut off or damaged is made anew. The folder may be deleted at any time.

A disk that is too small is told before the run. One that fills up later, or breaks, costs speed and not the run: what
cannot be kept is decoded again.
"""

import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np

from memseg.data.dataset import Pixels
from memseg.errors import InputError
from memseg.files import replace_file
from memseg.units import format_bytes

_CHECKSUM_BYTES = 4
_FORMAT = "memseg decoded 1"
"""Part of every digest; another number when the same source and preparation give other pixels."""


class DecodedCache:
    """Arrays of pixels in a folder, by what decides their content.

    Args:
        folder: Made when it is not there.

    Raises:
        InputError: it cannot be made, or not be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"data.cache must be a folder that can be made, {folder}: {error.strerror}") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"data.cache must be a folder that can be written, {folder} cannot; name another")

    def check_room(self, wanted: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Whether all of `wanted`, (what decides an array, its shape), has room on the disk.

        Raises:
            InputError: what is not there yet needs more than is free.
        """
        missing = sum(int(np.prod(shape)) for decided_by, shape in wanted if not self._path(decided_by).exists())
        free = shutil.disk_usage(self.folder).free
        if missing > free:
            raise InputError(
                f"data.cache needs {format_bytes(missing)} more in {self.folder}, {format_bytes(free)} are free there; "
                "name a folder on a larger disk, or leave data.cache out"
            )

    def get(self, decided_by: str, shape: tuple[int, ...], make: Callable[[], Pixels]) -> Pixels:
        """The array of this content: as it is kept, or made and kept.

        Args:
            decided_by: All that decides its content.
            shape: Of the array; a file that holds another is damaged.
            make: Makes it.

        Returns:
            uint8, of that shape; mapped from the file where it was kept. Writing to it changes no file.
        """
        path = self._path(decided_by)
        kept = _read(path)
        if kept is not None and kept.shape == shape:
            return kept
        made = make()
        # A cache that cannot grow is a slower one; the room it needs was checked before the run.
        with suppress(OSError):
            replace_file(path, _content(made))
        return made

    def _path(self, decided_by: str) -> Path:
        digest = hashlib.sha256(f"{_FORMAT}\n{decided_by}".encode(errors="surrogateescape")).hexdigest()
        return self.folder / f"{digest[:32]}.npy"


def _content(pixels: Pixels) -> bytes:
    """An .npy file, and behind its array the checksum of that."""
    file = BytesIO()
    np.save(file, pixels, allow_pickle=False)
    file.write(_checksum(np.ascontiguousarray(pixels)))
    return file.getvalue()


def _read(path: Path) -> Pixels | None:
    """The array in a file, mapped; None where there is none or it is damaged."""
    try:
        # Copy on write: torch wants memory that could be written.
        pixels = np.load(path, mmap_mode="c", allow_pickle=False)
        with path.open("rb") as file:
            file.seek(-_CHECKSUM_BYTES, os.SEEK_END)
            whole = file.read() == _checksum(pixels)
    except (OSError, ValueError, EOFError):
        return None
    return np.asarray(pixels) if whole and pixels.dtype == np.uint8 else None


def _checksum(pixels: Pixels) -> bytes:
    return zlib.crc32(pixels.data).to_bytes(_CHECKSUM_BYTES, "big")
