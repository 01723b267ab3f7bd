"""The composition of one generated street: sky, houses, ground, then everything that stands on it, far to near.

The street runs straight away from the camera, so ground and facades need no drawing of lines: each pixel is asked which
point of its plane it shows, in metres, and what lies there.

        facade   sidewalk   kerb   road          across, in metres ->
          |         |         |     |
    ------+---------+---------+-----+-- ...      the same to the right
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memseg.data.streets_canvas import Canvas, Colour, Draws, Floats, dim, mix, noise, rectangle
from memseg.data.streets_objects import (
    GLASS,
    LEAVES,
    Camera,
    Label,
    Light,
    Painter,
    Scene,
    bushes,
    car,
    person,
    pole,
    tree,
)

STREET_END = 150.0
"""Metres to where the rows of houses end."""
WALLS: tuple[Colour, ...] = (
    (0.62, 0.34, 0.26), (0.82, 0.76, 0.64), (0.72, 0.7, 0.67), (0.78, 0.62, 0.38), (0.5, 0.45, 0.42), (0.55, 0.6, 0.66),
    (0.8, 0.66, 0.58), (0.36, 0.38, 0.42), (0.66, 0.7, 0.6), (0.88, 0.87, 0.83), (0.45, 0.28, 0.24), (0.3, 0.42, 0.52),
)  # fmt: skip
ROOFS: tuple[Colour, ...] = ((0.3, 0.31, 0.34), (0.48, 0.24, 0.18), (0.4, 0.38, 0.35), (0.24, 0.22, 0.22))
PAVINGS: tuple[Colour, ...] = ((0.56, 0.55, 0.54), (0.62, 0.57, 0.5), (0.47, 0.47, 0.49), (0.56, 0.45, 0.41))
ASPHALTS: tuple[Colour, ...] = ((0.31, 0.31, 0.33), (0.4, 0.4, 0.41), (0.25, 0.25, 0.27), (0.45, 0.43, 0.41))
SKIES: tuple[tuple[Colour, Colour, float], ...] = (
    ((0.3, 0.5, 0.78), (0.78, 0.86, 0.93), 1.0), ((0.42, 0.58, 0.78), (0.88, 0.9, 0.9), 0.8),
    ((0.62, 0.66, 0.7), (0.82, 0.83, 0.84), 0.0), ((0.72, 0.74, 0.77), (0.9, 0.9, 0.9), 0.1),
    ((0.4, 0.46, 0.66), (0.96, 0.8, 0.64), 0.7), ((0.5, 0.54, 0.6), (0.74, 0.75, 0.76), 0.0),
)  # fmt: skip
"""Colour overhead, colour at the horizon, strength of the sun."""


@dataclass(frozen=True)
class Side:
    """One side of the street; metres across from the camera, positive."""

    way: int
    """-1 left, 1 right."""
    kerb: float
    facade: float
    """Where the houses begin."""
    green: float
    """Where grass begins; beyond the facade when there is none."""


@dataclass(frozen=True)
class House:
    """One house of a row: `near` to `far` metres ahead."""

    near: float
    far: float
    tall: float
    wall: Colour
    roof: Colour
    roof_tall: float
    trim: Colour
    floor: float
    """Metres from one row of windows to the next."""
    bay: float
    """Metres from one column of windows to the next."""
    window: tuple[float, float]
    """Share of the bay and of the floor that is window."""
    shop: bool


def render(height: int, width: int, words: tuple[int, ...]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Image (height, width, 3) and target (height, width) of the scene that `words` name; pixels and class numbers."""
    draws = Draws(*words)
    camera = Camera(
        focal=1.55 * height,
        column=width * draws.between(0.4, 0.6),
        horizon=height * draws.between(0.38, 0.47),
        height=draws.between(1.3, 1.9),
    )
    overhead, haze, strength = draws.one_of(SKIES)
    overhead, haze = draws.shade(overhead, 0.12), draws.shade(haze, 0.06)
    light = Light(haze, draws.between(90.0, 400.0), draws.one_of((-1, 1)), strength * draws.between(0.5, 1.0))
    scene = Scene(Canvas(height, width), camera, light, draws)
    lane = draws.between(3.1, 3.6)
    left, right = (_side(draws, way, lane) for way in (-1, 1))
    houses = {side.way: _row_of_houses(draws) for side in (left, right)}

    _sky(scene, overhead)
    _skyline(scene)
    _ground(scene, left, right, lane, houses[-light.sun] if light.strength > 0.3 else [])
    for side in (left, right):
        for house in reversed(houses[side.way]):
            if house.tall > 0:
                _house(scene, side, house)
            else:
                _garden(scene, side, house)
    for _, painter in sorted(_things(draws, left, right, lane), key=lambda thing: -thing[0]):
        painter(scene)
    return _exposed(scene), scene.canvas.target


def _side(draws: Draws, way: int, lane: float) -> Side:
    lanes = 0.5 if way > 0 else draws.one_of((1.5, 1.5, 2.5))
    kerb = lane * lanes + draws.one_of((0.4, 2.2, 2.2))
    paved = draws.between(2.0, 4.5)
    lawn = draws.one_of((0.0, 0.0, draws.between(1.5, 6.0)))
    facade = kerb + paved + lawn
    return Side(way, kerb, facade, kerb + paved if lawn else facade + 0.5)


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


def _sky(scene: Scene, overhead: Colour) -> None:
    camera, draws = scene.camera, scene.draws
    cover, drift = draws.between(0.15, 0.75), (draws.between(0, 256), draws.between(0, 256))
    cloud = mix(scene.light.haze, (1.0, 1.0, 1.0), 0.6)
    unit = scene.canvas.target.shape[0] / 256

    def texture(rows: Floats, columns: Floats) -> Floats:
        up = np.clip((camera.horizon - rows) / camera.horizon, 0.0, 1.0)
        fade = np.asarray(up * (2 - up), np.float32)[:, :, None]
        sky = np.asarray(scene.light.haze) * (1 - fade) + np.asarray(overhead) * fade
        flat = 60.0 / (0.15 + up)
        clouds = noise(flat + drift[0], (columns - camera.column) / unit * (0.15 / (0.25 + up)) + drift[1])
        shown = np.asarray(np.clip((clouds - 1 + cover) * 2.2, 0.0, 0.85) * np.minimum(1.0, up * 5), np.float32)
        result: Floats = sky + shown[:, :, None] * (np.asarray(cloud) - sky)
        return result

    height, width = scene.canvas.target.shape
    scene.canvas.paint(rectangle(-2.0, height + 2.0, -2.0, width + 2.0), texture, Label.SKY)


def _skyline(scene: Scene) -> None:
    """What closes the view at the end of the street: far houses, and trees in front of them."""
    camera, light, draws = scene.camera, scene.light, scene.draws
    unit = camera.pixels(1.0, 240.0)
    half = scene.canvas.target.shape[1]
    column = camera.column - half
    while column < camera.column + half:
        wide, tall = draws.between(10.0, 30.0) * unit, draws.between(6.0, 28.0) * unit
        colour = light.through(draws.shade(draws.one_of(WALLS), 0.2), 200.0)
        if draws.chance(0.7):
            block = rectangle(camera.horizon - tall, camera.horizon + 1, column, column + wide)
            scene.canvas.paint(block, colour, Label.BUILDING)
        column += wide
    for _ in range(draws.whole(5, 9)):
        bushes(draws.between(-60.0, 60.0), 200.0, draws.between(12.0, 40.0), draws.between(4.0, 11.0))(scene)


def _ground(scene: Scene, left: Side, right: Side, lane: float, shading: list[House]) -> None:
    """Road, marks, kerbs, paving and grass, and the shade of the houses on the sun's side."""
    camera, light, draws, canvas = scene.camera, scene.light, scene.draws, scene.canvas
    height, width = canvas.target.shape
    top = int(camera.horizon) + 1
    rows = np.arange(top, height, dtype=np.float64)[:, None] + 0.5
    ahead = camera.focal * camera.height / (rows - camera.horizon)
    across = (np.arange(width, dtype=np.float64)[None, :] + 0.5 - camera.column) * ahead / camera.focal
    metre = camera.focal / ahead
    near = 12.0 / (12.0 + ahead)
    # Patches and stains are drawn in metres; the crumb of the asphalt in pixels, whatever the distance.
    patches = noise(ahead * 6.0, across * 18.0 + draws.between(0, 256)) - 0.45
    crumb = np.asarray(draws.grain(height - top, width), np.float64)

    road = np.asarray(draws.shade(draws.one_of(ASPHALTS), 0.15))
    track = np.abs((across / lane + 0.5) % 1.0 - 0.5)
    worn = 1 + 0.1 * np.clip(1 - np.abs(track - 0.24) * 9, 0.0, 1.0)
    colour = (worn + (0.5 * patches + 0.16 * crumb) * (0.3 + 0.7 * near))[:, :, None] * road
    label = np.full(across.shape, int(Label.ROAD), np.uint8)
    white = np.asarray(draws.shade((0.86, 0.86, 0.83), 0.1))
    fresh = draws.between(0.45, 0.95) * (1 + 0.8 * np.clip(patches - 0.1, -0.5, 0.0))

    def line(at: float, half: float, dashed: bool) -> None:
        nonlocal colour
        reach = half * metre
        share = np.clip(reach + 0.5 - np.abs(across - at) * metre, 0.0, np.minimum(1.0, 2 * reach))
        if dashed:
            share = share * ((ahead + dash) % 7.0 < 3.2)
        colour = colour + (share * fresh)[:, :, None] * (white - colour)

    dash = draws.between(0.0, 7.0)
    line(-0.5 * lane, 0.07, dashed=draws.chance(0.7))
    if left.kerb > 2.5 * lane:
        line(-1.5 * lane, 0.07, dashed=True)
    if right.kerb > lane * 0.5 + 1:
        line(lane * 0.5, 0.06, dashed=draws.chance(0.5))
    if draws.chance(0.4):
        start = draws.between(9.0, 28.0)
        stripes = (ahead > start) & (ahead < start + 3.2) & ((across + 20) % 1.0 < 0.52)
        colour = colour + (stripes * fresh)[:, :, None] * (white - colour)

    for side in (left, right):
        out = across * side.way
        paving = np.asarray(draws.shade(draws.one_of(PAVINGS), 0.15))
        slab = draws.one_of((0.5, 1.0, 1.5))
        joints = np.minimum((out / slab) % 1.0, 1 - (out / slab) % 1.0) * slab * metre < 0.6
        joints = joints | (np.minimum((ahead / slab) % 1.0, 1 - (ahead / slab) % 1.0) * slab * metre / ahead < 0.4)
        seam = joints * np.clip(metre * slab / 14 - 0.35, 0.0, 0.3)
        walk = (1 - seam + 0.35 * patches + 0.12 * crumb)[:, :, None] * paving
        grass_base = np.asarray(draws.shade(draws.one_of(LEAVES), 0.25))
        grass = (1.15 + 0.9 * patches + 0.5 * crumb)[:, :, None] * grass_base
        kerb = (1 + 0.15 * crumb)[:, :, None] * np.asarray(draws.shade((0.66, 0.65, 0.63), 0.1))
        for begin, paint, number in (
            (side.kerb - 0.25, colour * 0.72, Label.ROAD),
            (side.kerb, kerb, Label.SIDEWALK),
            (side.kerb + 0.18, walk, Label.SIDEWALK),
            (side.green, grass, Label.VEGETATION),
        ):
            share = np.clip((out - begin) * metre + 0.5, 0.0, 1.0)[:, :, None]
            colour = colour + share * (paint - colour)
            label[out >= begin] = number
    if shading:
        side = left if light.sun < 0 else right
        tall = np.zeros_like(ahead)
        for house in shading:
            tall = np.where((ahead >= house.near) & (ahead < house.far), house.tall, tall)
        edge = (side.facade - across * side.way) * metre
        shade = np.clip(tall * 0.75 * metre - edge + 0.5, 0.0, 1.0) * (0.42 * light.strength)
        colour = colour * (1 - shade)[:, :, None]
    veil = (ahead / (ahead + light.haze_distance))[:, :, None]
    canvas.image[top:] = np.clip(colour * (1 + 0.15 * light.strength), 0.0, 1.0) * (1 - veil) + veil * np.asarray(
        light.haze
    )
    canvas.target[top:] = label


def _facade(scene: Scene, house: House, along: Floats, up: Floats, footprint: tuple[Floats, Floats]) -> Floats:
    """Colours of a wall: `along` it and `up` it in metres; `footprint` is what a pixel spans of each, in metres."""
    span_along, span_up = footprint

    def band(value: Floats, period: float, share: float, span: Floats) -> Floats:
        """How much of the pixel lies in the middle `share` of each period; the mean where periods are too fine."""
        off = np.abs(value / period % 1.0 - 0.5) * period
        sharp = np.clip(0.5 + (share * period / 2 - off) / span, 0.0, 1.0)
        blur = np.clip(span / period * 2.5 - 0.5, 0.0, 1.0)
        result: Floats = sharp + blur * (share - sharp)
        return result

    base = house.floor * (1.15 if house.shop else 0.55)
    eaves = house.tall - house.roof_tall
    level = up - base
    on_floor = (level > 0) & (up < eaves - 0.3)
    panes = band(along, house.bay, house.window[0], span_along) * band(level, house.floor, house.window[1], span_up)
    frames = band(along, house.bay, house.window[0] + 0.1, span_along) * band(
        level, house.floor, house.window[1] + 0.1, span_up
    )
    cell = noise(np.floor(level / house.floor) * 53.0, np.floor(along / house.bay) * 31.0)[:, :, None]
    glass = np.asarray(GLASS) + np.clip(cell - 0.35, 0.0, 1.0) * (np.asarray(scene.light.haze) - np.asarray(GLASS))
    stains = 0.9 + 0.3 * (noise(up * 14.0, along * 9.0) - 0.3)
    wall = stains[:, :, None] * np.asarray(house.wall)
    wall = wall + (frames * on_floor)[:, :, None] * (np.asarray(house.trim) - wall)
    wall = wall + (panes * on_floor)[:, :, None] * (glass - wall)
    if house.shop:
        front = band(along, house.bay * 2, 0.86, span_along) * ((up > 0.5) & (up < base * 0.72))
        wall = wall + front[:, :, None] * (np.asarray(GLASS) * 1.3 - wall)
        sign = (up > base * 0.76) & (up < base * 0.97)
        wall = np.where(sign[:, :, None], np.asarray(dim(house.roof, 1.3)), wall)
    else:
        wall = np.where((up < 0.6)[:, :, None], wall * 0.8, wall)
    wall = np.where((np.abs(up - eaves) < 0.18)[:, :, None], np.asarray(house.trim), wall)
    tiles = (0.85 + 0.5 * (noise(up * 25.0, along * 6.0) - 0.4))[:, :, None] * np.asarray(house.roof)
    return np.where((up > eaves + 0.18)[:, :, None], tiles, wall)


def _house(scene: Scene, side: Side, house: House) -> None:
    """The wall that looks at the camera, then the facade along the street."""
    camera, light, canvas = scene.camera, scene.light, scene.canvas
    if house.near > 2.0:
        top, inner = camera.at(side.way * side.facade, house.tall, house.near)
        bottom, outer = camera.at(side.way * (side.facade + 14.0), 0.0, house.near)
        veil = light.veil(house.near)

        def end_wall(rows: Floats, columns: Floats) -> Floats:
            scale = house.near / camera.focal
            up = camera.height + (camera.horizon - rows) * scale + columns * 0.0
            along = (columns - camera.column) * scale + rows * 0.0
            spans = (np.full_like(along, scale), np.full_like(up, scale))
            lit = _facade(scene, house, along, up, spans) * (0.86 + 0.06 * light.strength)
            return lit * (1 - veil) + np.asarray(light.haze) * veil

        canvas.paint(rectangle(top, bottom, min(inner, outer), max(inner, outer)), end_wall, Label.BUILDING)

    width = canvas.target.shape[1]
    near_column = camera.at(side.way * side.facade, 0.0, house.near)[1]
    far_column = camera.at(side.way * side.facade, 0.0, house.far)[1]
    first, last = sorted((near_column, far_column))
    # A column belongs to the house when its centre does; half-open, so that neighbours share none.
    begin, end = max(0, int(np.ceil(first - 0.5))), min(width, int(np.ceil(last - 0.5)))
    if begin >= end:
        return
    columns = np.arange(begin, end, dtype=np.float64)[None, :] + 0.5
    ahead = camera.focal * side.facade / np.abs(columns - camera.column)
    roof_row = max(0.0, float((camera.horizon + camera.focal * (camera.height - house.tall) / ahead).min()))
    foot_row = min(float(canvas.target.shape[0]), float((camera.horizon + camera.focal * camera.height / ahead).max()))
    start, stop = int(roof_row), int(np.ceil(foot_row))
    rows = np.arange(start, stop, dtype=np.float64)[:, None] + 0.5
    up = camera.height + (camera.horizon - rows) * ahead / camera.focal
    along = ahead + rows * 0.0
    scale = ahead / camera.focal
    lit = _facade(scene, house, along, up, (ahead * scale / side.facade + rows * 0.0, scale + rows * 0.0))
    lit = lit * light.on_side(-side.way)
    veil_here = (ahead / (ahead + light.haze_distance))[:, :, None]
    lit = lit * (1 - veil_here) + np.asarray(light.haze) * veil_here
    covered = np.clip(0.5 + np.minimum(house.tall - up, up) / scale, 0.0, 1.0)[:, :, None]
    under = canvas.image[start:stop, begin:end]
    under += np.asarray(covered * (lit - under), np.float32)
    canvas.target[start:stop, begin:end][(up <= house.tall) & (up >= 0)] = Label.BUILDING


def _garden(scene: Scene, side: Side, lot: House) -> None:
    """Trees and shrubs where a house is missing."""
    draws = scene.draws
    for ahead in sorted((draws.between(max(lot.near, 6.0), lot.far + 6.0) for _ in range(3)), reverse=True):
        across = side.way * (side.facade + draws.between(1.0, 9.0))
        painter = tree(across, ahead) if draws.chance(0.5) else bushes(across, ahead, 5.0, draws.between(1.0, 2.5))
        painter(scene)


def _things(draws: Draws, left: Side, right: Side, lane: float) -> list[tuple[float, Painter]]:
    """Everything that stands on the ground, with its distance in metres."""
    things: list[tuple[float, Painter]] = []
    for side in (left, right):
        if side.kerb % lane > 1.5 or side.kerb > lane * 2:
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
            ahead = draws.between(6.0, 55.0)
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
    tint = np.asarray(draws.shade((1.0, 1.0, 1.0), 0.04), np.float32) * np.float32(draws.between(0.82, 1.15))
    speckle = draws.grain(*scene.canvas.target.shape)[:, :, None] * np.float32(draws.between(0.02, 0.07))
    return np.asarray(np.clip((image * tint + speckle) * np.float32(255) + np.float32(0.5), 0, 255), np.uint8)
