"""Random draws and a painter whose every pixel is the same on every machine.

A generated data set is worth having only if a seed means one picture. Drawing libraries change how they fill a polygon
from one version to the next, NumPy does not promise the stream of its `Generator` methods, and `exp` or `sin` differ in
the last digit between processors. So the draws come from the raw bits of PCG64, which NumPy does promise, and the
painter uses only what IEEE arithmetic defines exactly: add, multiply, divide, square root, compare.

A shape is a signed distance in pixels, negative inside. The colour is blended by how much of the pixel the shape
covers, so edges are smooth; the label goes to the pixels whose centre lies inside, so labels are exact.
"""

from collections.abc import Callable, Sequence
from functools import cache
from math import ceil, floor, sqrt
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
"""Float32 in fact, which NumPy's type stubs cannot follow through arithmetic with plain numbers."""
Colour = tuple[float, float, float]
"""Red, green, blue from 0 to 1."""
Texture = Callable[[Floats, Floats], Floats]
"""Rows (h, 1) and columns (1, w) of pixel centres -> colours (3, h, w)."""
Point = tuple[float, float]
"""(row, column), in pixels from the top left corner; the centre of the first pixel is (0.5, 0.5)."""
T = TypeVar("T")

TILE = 256
"""Side of the noise tile, in texels; a power of two, so that it repeats by masking."""


class Draws:
    """Random draws that depend on `words` alone: whole numbers, at least 0.

    >>> Draws(1, 2).between(0.0, 1.0) == Draws(1, 2).between(0.0, 1.0)
    True
    """

    def __init__(self, *words: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(words))

    def fraction(self) -> float:
        """From 0 up to, not including, 1."""
        return float(int(self._bits.random_raw()) >> 11) * 2.0**-53

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.fraction()

    def whole(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int(self.fraction() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        return self.fraction() < probability

    def one_of(self, choices: Sequence[T]) -> T:
        return choices[self.whole(0, len(choices) - 1)]

    def shade(self, colour: Colour, spread: float) -> Colour:
        """`colour` made lighter or darker as a whole, and each channel moved a little."""
        light = self.between(1 - spread, 1 + spread)
        red, green, blue = (min(1.0, max(0.0, part * light + self.between(-spread, spread) * 0.15)) for part in colour)
        return red, green, blue

    def grain(self, height: int, width: int) -> Floats:
        """White noise (height, width) from -0.5 to 0.5."""
        count = height * width
        raw = np.asarray(self._bits.random_raw((count + 7) // 8), dtype="<u8")
        noise: Floats = raw.view(np.uint8)[:count].reshape(height, width).astype(np.float32) / np.float32(255)
        return noise - np.float32(0.5)


@cache
def noise_tile() -> Floats:
    """Smooth noise (TILE, TILE) from 0 to 1 in six octaves, which repeats without a seam."""
    draws = Draws(20170)
    total = np.zeros((TILE, TILE), np.float32)
    weight, cells = 1.0, 4
    while cells <= 128:
        grid = draws.grain(cells, cells) + np.float32(0.5)
        place = np.arange(TILE, dtype=np.float32) * np.float32(cells / TILE)
        low = place.astype(np.int64)
        part = place - low
        part = part * part * (3 - 2 * part)
        high = (low + 1) % cells
        across = grid[:, low] * (1 - part) + grid[:, high] * part
        total += np.float32(weight) * (across[low] * (1 - part[:, None]) + across[high] * part[:, None])
        weight, cells = weight * 0.6, cells * 2
    total -= total.min()
    total /= total.max()
    return total


def noise(rows: Floats, columns: Floats) -> Floats:
    """The noise tile at texel coordinates that broadcast together; nearest texel."""
    down, across = (np.floor(place).astype(np.intp) & (TILE - 1) for place in (rows, columns))
    return noise_tile().ravel().take(down * TILE + across)


def centres(first: int, end: int) -> Floats:
    """Coordinates (end - first,) of the pixel centres from `first` up to, not including, `end`."""
    return np.arange(first, end, dtype=np.float32) + np.float32(0.5)


def part_of(values: Floats) -> Floats:
    """What is left of each value above the whole number below it: 0 up to 1."""
    return values - np.floor(values)


def within(values: Floats, low: float, high: float) -> Floats:
    """Each value, or the nearer bound where it lies outside."""
    return np.minimum(np.maximum(values, np.float32(low)), np.float32(high))


def channels(colour: Colour) -> Floats:
    """A colour as an array (3, 1, 1)."""
    return np.array(colour, np.float32).reshape(3, 1, 1)


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """`share` of the second colour, the rest of the first."""
    red, green, blue = (a + (b - a) * share for a, b in zip(first, second, strict=True))
    return red, green, blue


def dim(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(1.0, part * factor) for part in colour)
    return red, green, blue


class Shape(NamedTuple):
    """A region of the picture, as a box around it and the signed distance to its edge."""

    top: float
    bottom: float
    left: float
    right: float
    distance: Callable[[Floats, Floats], Floats]


def rectangle(top: float, bottom: float, left: float, right: float, *, rounding: float = 0.0) -> Shape:
    """An upright rectangle; `rounding` is the radius of its corners in pixels."""
    row, column = (top + bottom) / 2, (left + right) / 2
    half_height, half_width = (bottom - top) / 2, (right - left) / 2
    radius = min(rounding, half_height, half_width)

    def distance(rows: Floats, columns: Floats) -> Floats:
        down = np.abs(rows - row) - (half_height - radius)
        across = np.abs(columns - column) - (half_width - radius)
        result: Floats = np.maximum(down, across)
        if radius > 0:
            down_out, across_out = np.maximum(down, 0), np.maximum(across, 0)
            outside = np.sqrt(down_out * down_out + across_out * across_out)
            result = outside + np.minimum(result, 0) - radius
        return result

    return Shape(top, bottom, left, right, distance)


def ellipse(centre: Point, half_height: float, half_width: float) -> Shape:
    """An upright ellipse; the distance is exact on its edge."""
    row, column = centre
    half_height, half_width = max(half_height, 0.3), max(half_width, 0.3)
    scale = min(half_height, half_width)

    def distance(rows: Floats, columns: Floats) -> Floats:
        down, across = (rows - row) / half_height, (columns - column) / half_width
        result: Floats = (np.sqrt(down * down + across * across) - 1) * scale
        return result

    return Shape(row - half_height, row + half_height, column - half_width, column + half_width, distance)


def polygon(*points: Point) -> Shape:
    """A convex polygon; the points go round it either way."""
    rows_of, columns_of = [p[0] for p in points], [p[1] for p in points]
    centre_row, centre_column = sum(rows_of) / len(points), sum(columns_of) / len(points)
    planes: list[tuple[float, float, float]] = []
    for (row, column), (next_row, next_column) in zip(points, points[1:] + points[:1], strict=True):
        down, across = next_column - column, row - next_row
        length = sqrt(down * down + across * across)
        if length < 1e-6:
            continue
        down, across = down / length, across / length
        offset = down * row + across * column
        inside = down * centre_row + across * centre_column <= offset
        planes.append((down, across, offset) if inside else (-down, -across, -offset))
    downs, acrosses, offsets = np.array(planes, np.float32).T[:, :, None, None]

    def distance(rows: Floats, columns: Floats) -> Floats:
        result: Floats = ((rows * downs - offsets) + columns * acrosses).max(axis=0)
        return result

    return Shape(min(rows_of), max(rows_of), min(columns_of), max(columns_of), distance)


def stroke(start: Point, end: Point, start_radius: float, end_radius: float) -> Shape:
    """A line with round ends whose radius changes evenly from one end to the other."""
    down, across = end[0] - start[0], end[1] - start[1]
    square = max(down * down + across * across, 1e-9)
    reach = max(start_radius, end_radius)

    def distance(rows: Floats, columns: Floats) -> Floats:
        below, beside = rows - start[0], columns - start[1]
        along = within((below * down + beside * across) / square, 0.0, 1.0)
        off_row, off_column = below - along * down, beside - along * across
        result: Floats = np.sqrt(off_row * off_row + off_column * off_column)
        return result - (start_radius + along * (end_radius - start_radius))

    rows_of, columns_of = sorted((start[0], end[0])), sorted((start[1], end[1]))
    return Shape(rows_of[0] - reach, rows_of[1] + reach, columns_of[0] - reach, columns_of[1] + reach, distance)


def leaves(circles: Sequence[tuple[float, float, float]], shift: Point) -> Shape:
    """Circles (row, column, radius) run together, with a ragged edge like foliage; `shift` moves the noise."""
    largest = max(radius for _, _, radius in circles)
    texel = TILE / (8 * largest)

    def distance(rows: Floats, columns: Floats) -> Floats:
        result: Floats = np.full((rows.shape[0], columns.shape[1]), np.inf, np.float32)
        for row, column, radius in circles:
            down, across = rows - row, columns - column
            result = np.minimum(result, np.sqrt(down * down + across * across) - radius)
        ragged = noise(rows * texel + shift[0], columns * texel + shift[1])
        ragged = ragged + 0.5 * noise(columns * (texel * 4) + shift[1], rows * (texel * 4) + shift[0])
        return result + (ragged - 0.7) * (0.8 * largest)

    margin = 0.45 * largest
    return Shape(
        min(row - radius for row, _, radius in circles) - margin,
        max(row + radius for row, _, radius in circles) + margin,
        min(column - radius for _, column, radius in circles) - margin,
        max(column + radius for _, column, radius in circles) + margin,
        distance,
    )


def soft(shape: Shape, width: float) -> Shape:
    """`shape` with an edge that fades over its outer `width` pixels."""
    spread = max(width, 1.0)
    return shape._replace(distance=lambda rows, columns: shape.distance(rows, columns) / spread + 0.5)


class Canvas:
    """A picture and its labels, painted from far to near.

    Attributes:
        image: float32 (3, H, W), 0 to 1; NumPy is slow along axes of three.
        target: uint8 (H, W), class numbers.
    """

    def __init__(self, height: int, width: int) -> None:
        self.image: Floats = np.zeros((3, height, width), np.float32)
        self.target: npt.NDArray[np.uint8] = np.zeros((height, width), np.uint8)
        self._rows, self._columns = centres(0, height)[:, None], centres(0, width)[None, :]

    def paint(self, shape: Shape, colour: Colour | Texture, label: int | None, *, opacity: float = 1.0) -> None:
        """Blends `colour` over `shape`; without a label (shadows, glints) the labels below stay."""
        height, width = self.target.shape
        top, bottom = max(0, floor(shape.top) - 1), min(height, ceil(shape.bottom) + 1)
        left, right = max(0, floor(shape.left) - 1), min(width, ceil(shape.right) + 1)
        if top >= bottom or left >= right:
            return
        if (shape.bottom - shape.top) * (shape.right - shape.left) < 0.5:
            return  # a detail too small to be seen
        rows, columns = self._rows[top:bottom], self._columns[:, left:right]
        distance = shape.distance(rows, columns)
        covered = np.minimum(np.maximum(0.5 - distance, 0.0), opacity)
        paint = colour(rows, columns) if callable(colour) else channels(colour)
        under = self.image[:, top:bottom, left:right]
        under += covered * (paint - under)
        if label is not None:
            self.target[top:bottom, left:right][distance <= 0] = label
