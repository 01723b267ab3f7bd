"""Quantities as people write them: bytes inside, GiB (2**30) on screen; image sizes as HEIGHTxWIDTH."""

import re

from memseg.errors import InputError

GIB = 2**30
_UNIT_BYTES = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": GIB, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_bytes(text: str) -> int:
    """Bytes written as a number with a unit: B, KiB, MiB, GiB, or the decimal kB, MB, GB.

    Raises:
        InputError: no number, no known unit, or not more than zero.

    >>> parse_bytes("8GiB"), parse_bytes("1.5 GiB"), parse_bytes("500MB")
    (8589934592, 1610612736, 500000000)
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]+)\s*", text)
    unit = match and _UNIT_BYTES.get(match[2].lower())
    if not match or not unit:
        raise InputError(f"a size must be a number with a unit (B, KiB, MiB, GiB, kB, MB, GB), got {text!r}; try 8GiB")
    size = int(float(match[1]) * unit)
    if size <= 0:
        raise InputError(f"a size must be more than 0 bytes, got {text!r}; try 8GiB")
    return size


def format_bytes(size: int) -> str:
    """Bytes as people read them, in the unit that suits them.

    >>> format_bytes(11725260718), format_bytes(3145728), format_bytes(512), format_bytes(-(2**30))
    ('10.92 GiB', '3.0 MiB', '512 B', '-1.00 GiB')
    """
    if abs(size) >= GIB // 10:
        return f"{size / GIB:.2f} GiB"
    if abs(size) >= 2**20:
        return f"{size / 2**20:.1f} MiB"
    if abs(size) >= 2**10:
        return f"{size / 2**10:.1f} KiB"
    return f"{size} B"


def parse_image(text: str) -> tuple[int, int]:
    """(height, width) from HEIGHTxWIDTH.

    Raises:
        InputError: the text is not two whole numbers above zero joined by an x.

    >>> parse_image("1024x2048")
    (1024, 2048)
    """
    match = re.fullmatch(r"\s*([1-9][0-9]*)\s*[xX]\s*([1-9][0-9]*)\s*", text)
    if not match:
        raise InputError(f"an image size must be HEIGHTxWIDTH in pixels, got {text!r}; try 1024x2048")
    return int(match[1]), int(match[2])


def format_image(size: tuple[int, int]) -> str:
    """HEIGHTxWIDTH, as `parse_image` reads it.

    >>> format_image((1024, 2048))
    '1024x2048'
    """
    return f"{size[0]}x{size[1]}"


def format_seconds(seconds: float) -> str:
    """Seconds with the digits that matter.

    >>> format_seconds(0.0123), format_seconds(2.5), format_seconds(4000)
    ('12.3 ms', '2.50 s', '1 h 07 min')
    """
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 120:
        return f"{seconds:.2f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
