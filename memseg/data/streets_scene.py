"""The composition of one generated street: its light, what closes it in, then what stands on it, far to near."""

import numpy as np
import numpy.typing as npt

from memseg.data.streets_canvas import Canvas, Colour, Draws, channels, mix, within
from memseg.data.streets_objects import Camera, Light, Painter, Scene, car, person, pole, tree
from memseg.data.streets_scenery import (
    ROOFS,
    STREET_END,
    WALLS,
    House,
    Side,
    paint_garden,
    paint_ground,
    paint_house,
    paint_sky,
    paint_skyline,
)

SKIES: tuple[tuple[Colour, Colour, float], ...] = (
    ((0.3, 0.5, 0.78), (0.78, 0.86, 0.93), 1.0), ((0.42, 0.58, 0.78), (0.88, 0.9, 0.9), 0.8),
    ((0.62, 0.66, 0.7), (0.82, 0.83, 0.84), 0.0), ((0.72, 0.74, 0.77), (0.9, 0.9, 0.9), 0.1),
    ((0.4, 0.46, 0.66), (0.96, 0.8, 0.64), 0.7), ((0.5, 0.54, 0.6), (0.74, 0.75, 0.76), 0.0),
)  # fmt: skip
"""Colour overhead, colour at the horizon, strength of the sun."""


def render(height: int, width: int, words: tuple[int, ...]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Image (height, width, 3) and target (height, width) of the scene that `words` name; pixels and class numbers."""
    draws = Draws(*words)
    camera = Camera(
        focal=1.7 * height,
        column=width * draws.between(0.4, 0.6),
        horizon=height * draws.between(0.42, 0.53),
        height=draws.between(1.3, 1.9),
    )
    overhead, haze, strength = draws.one_of(SKIES)
    overhead, haze = draws.shade(overhead, 0.12), draws.shade(haze, 0.06)
    light = Light(haze, draws.between(90.0, 400.0), draws.one_of((-1, 1)), strength * draws.between(0.5, 1.0))
    scene = Scene(Canvas(height, width), camera, light, draws, Draws(*words, height, width))
    lane = draws.between(3.1, 3.6)
    left, right = (_side(draws, way, lane) for way in (-1, 1))
    houses = {side.way: _row_of_houses(draws) for side in (left, right)}

    paint_sky(scene, overhead)
    paint_skyline(scene)
    paint_ground(scene, left, right, lane, houses[light.sun] if light.strength > 0.3 else [])
    for side in (left, right):
        row = houses[side.way]
        for house, nearer in zip(reversed(row), [*reversed(row[:-1]), None], strict=True):
            if house.tall > 0:
                paint_house(scene, side, house, beside=nearer.tall if nearer else 0.0)
            else:
                paint_garden(scene, side, house)
    for _, painter in sorted(_things(draws, left, right, lane), key=lambda thing: -thing[0]):
        painter(scene)
    return _exposed(scene), scene.canvas.target


def _side(draws: Draws, way: int, lane: float) -> Side:
    lanes = 0.5 if way > 0 else draws.one_of((1.5, 1.5, 2.5))
    parking = draws.chance(0.67)
    kerb = lane * lanes + (2.2 if parking else 0.4)
    paved = draws.between(2.0, 4.5)
    lawn = draws.one_of((0.0, 0.0, draws.between(1.5, 6.0)))
    facade = kerb + paved + lawn
    return Side(way, kerb, facade, kerb + paved if lawn else facade + 0.5, parking)


def _row_of_houses(draws: Draws) -> list[House]:
    row = []
    near, usual, gaps = 1.0, draws.between(6.0, 20.0), draws.between(0.05, 0.35)
    while near < STREET_END:
        far = near + draws.between(8.0, 22.0)
        tall = 0.0 if draws.chance(gaps) else max(4.5, usual * draws.between(0.6, 1.4))
        wall = draws.shade(draws.one_of(WALLS), 0.2)
        row.append(
            House(
                near, far, tall, wall, draws.shade(draws.one_of(ROOFS), 0.2), draws.one_of((0.4, 1.6, 2.4)),
                mix(wall, draws.one_of(((0.95, 0.94, 0.9), (0.2, 0.2, 0.2))), draws.between(0.2, 0.7)),
                draws.between(2.8, 3.6), draws.between(1.8, 3.6),
                (draws.between(0.35, 0.75), draws.between(0.45, 0.7)), draws.chance(0.45),
            )
        )  # fmt: skip
        near = far
    return row


def _things(draws: Draws, left: Side, right: Side, lane: float) -> list[tuple[float, Painter]]:
    """Everything that stands on the ground, with its distance in metres."""
    things: list[tuple[float, Painter]] = []
    for side in (left, right):
        if side.parking:
            ahead, crowded = draws.between(5.0, 14.0), draws.between(0.15, 0.75)
            while ahead < 90:
                if draws.chance(crowded):
                    things.append((ahead, car(side.way * (side.kerb - 1.12), ahead, oncoming=side.way < 0)))
                ahead += draws.between(5.8, 8.0)
        ahead, spacing = draws.between(7.0, 16.0), draws.between(9.0, 26.0)
        lamps = draws.chance(0.75)
        while ahead < 110:
            if lamps:
                things.append((ahead, pole(side.way * (side.kerb + 0.5), ahead)))
            ahead += spacing * draws.between(0.7, 1.4)
        ahead, spacing = draws.between(8.0, 30.0), draws.between(8.0, 24.0)
        planted = draws.chance(0.6)
        while ahead < 110:
            if planted:
                things.append((ahead, tree(side.way * (side.kerb + 1.0), ahead)))
            ahead += spacing * draws.between(0.7, 1.4)
        for _ in range(draws.whole(2, 7)):
            ahead = 5.5 + 50.0 * draws.fraction() * draws.fraction()
            spot = side.way * draws.between(side.kerb + 0.5, max(side.kerb + 1.0, side.facade - 0.6))
            for friend in range(draws.one_of((1, 1, 2, 3))):
                distance = ahead + friend * draws.between(-0.4, 0.4)
                things.append((distance, person(spot + friend * 0.6 * side.way, distance)))
    for _ in range(draws.whole(0, 3)):
        ahead = draws.between(12.0, 45.0)
        things.append((ahead, person(draws.between(-left.kerb, right.kerb), ahead)))
    ahead = draws.between(9.0, 40.0)
    while ahead < 110 and draws.chance(0.7):
        things.append((ahead, car(draws.between(-0.3, 0.3), ahead, oncoming=False)))
        ahead += draws.between(10.0, 40.0)
    ahead = draws.between(8.0, 40.0)
    while ahead < 110 and draws.chance(0.75):
        things.append((ahead, car(-lane + draws.between(-0.3, 0.3), ahead, oncoming=True)))
        ahead += draws.between(10.0, 40.0)
    return things


def _exposed(scene: Scene) -> npt.NDArray[np.uint8]:
    """The picture as a camera gives it: its exposure, its tint, its noise."""
    draws, image = scene.draws, scene.canvas.image
    exposure = draws.between(0.95, 1.3)
    image *= channels(draws.shade((0.9 * exposure, 0.9 * exposure, 0.9 * exposure), 0.04))
    image += scene.grain.grain(*scene.canvas.target.shape) * np.float32(draws.between(0.02, 0.07))
    pixels = within(image * 255 + 0.5, 0.0, 255.0).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))
