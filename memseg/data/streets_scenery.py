"""What closes in a generated street: sky, skyline, ground, houses and gardens.

The street runs straight away from the camera, so ground and facades need no drawing of lines: each pixel is asked which
point of its plane it shows, in metres, and what lies there.

        facade   sidewalk   kerb   road          across, in metres ->
          |         |         |     |
    ------+---------+---------+-----+-- ...      the same to the right
"""

from dataclasses import dataclass, replace
from math import ceil

import numpy as np
import numpy.typing as npt

from memseg.data.streets_canvas import (
    Colour,
    Draws,
    Floats,
    centres,
    channels,
    dim,
    mix,
    noise,
    part_of,
    rectangle,
    within,
)
from memseg.data.streets_objects import GLASS, LEAVES, Label, Scene, bushes, tree

WHITE: Colour = (1.0, 1.0, 1.0)
STREET_END = 150.0
"""Metres to where the rows of houses end."""
WALLS: tuple[Colour, ...] = (
    (0.62, 0.34, 0.26), (0.82, 0.76, 0.64), (0.72, 0.7, 0.67), (0.78, 0.62, 0.38), (0.5, 0.45, 0.42), (0.55, 0.6, 0.66),
    (0.8, 0.66, 0.58), (0.36, 0.38, 0.42), (0.66, 0.7, 0.6), (0.88, 0.87, 0.83), (0.45, 0.28, 0.24), (0.3, 0.42, 0.52),
)  # fmt: skip
ROOFS: tuple[Colour, ...] = ((0.3, 0.31, 0.34), (0.48, 0.24, 0.18), (0.4, 0.38, 0.35), (0.24, 0.22, 0.22))
PAVINGS: tuple[Colour, ...] = ((0.56, 0.55, 0.54), (0.62, 0.57, 0.5), (0.47, 0.47, 0.49), (0.56, 0.45, 0.41))
ASPHALTS: tuple[Colour, ...] = ((0.31, 0.31, 0.33), (0.4, 0.4, 0.41), (0.25, 0.25, 0.27), (0.45, 0.43, 0.41))


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
    parking: bool
    """Cars may stand along the kerb."""


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


def paint_sky(scene: Scene, overhead: Colour) -> None:
    camera, draws = scene.camera, scene.draws
    cover, drift = draws.between(0.15, 0.75), (draws.between(0, 256), draws.between(0, 256))
    low, high, white = (channels(paint) for paint in (scene.light.haze, overhead, mix(scene.light.haze, WHITE, 0.6)))
    unit = scene.canvas.target.shape[0] / 256

    def texture(rows: Floats, columns: Floats) -> Floats:
        up = within((camera.horizon - rows) / camera.horizon, 0.0, 1.0)
        sky = low + (up * (2 - up)) * (high - low)
        clouds = noise(
            60.0 / (0.15 + up) + drift[0], (columns - camera.column) * (0.15 / unit / (0.25 + up)) + drift[1]
        )
        shown = within((clouds - (1 - cover)) * 2.2, 0.0, 0.85) * np.minimum(1.0, up * 5)
        return sky + shown * (white - sky)

    width = scene.canvas.target.shape[1]
    scene.canvas.paint(rectangle(-2.0, camera.horizon + 2.0, -2.0, width + 2.0), texture, Label.SKY)


def paint_skyline(scene: Scene) -> None:
    """What closes the view at the end of the street: far houses, and trees in front of them."""
    camera, light, draws = scene.camera, scene.light, scene.draws
    unit = camera.pixels(1.0, 240.0)
    across = -180.0
    while across < 180.0:
        wide, tall = draws.between(10.0, 30.0), draws.between(6.0, 28.0)
        colour = light.through(draws.shade(draws.one_of(WALLS), 0.2), 200.0)
        if draws.chance(0.7):
            left = camera.column + across * unit
            block = rectangle(camera.horizon - tall * unit, camera.horizon + 1, left, left + wide * unit)
            scene.canvas.paint(block, colour, Label.BUILDING)
        across += wide
    for _ in range(draws.whole(5, 9)):
        bushes(draws.between(-60.0, 60.0), 200.0, draws.between(12.0, 40.0), draws.between(4.0, 11.0))(scene)


def paint_ground(scene: Scene, left: Side, right: Side, lane: float, shading: list[House]) -> None:
    """Road, marks, kerbs, paving and grass, and the shade of the houses on the sun's side."""
    camera, light, draws, canvas = scene.camera, scene.light, scene.draws, scene.canvas
    height, width = canvas.target.shape
    top = int(camera.horizon) + 1
    rows = centres(top, height)[:, None]
    ahead = camera.focal * camera.height / (rows - camera.horizon)
    metre = camera.focal / ahead
    across = (centres(0, width)[None, :] - camera.column) / metre
    # Patches and stains are drawn in metres; the crumb of the asphalt in pixels, whatever the distance.
    patches = noise(ahead * 6.0, across * 18.0 + draws.between(0, 256)) - 0.45
    crumb = scene.grain.grain(height - top, width)
    colour = canvas.image[:, top:]
    ground = _Ground(colour, canvas.target[top:], ahead, across, metre, patches, crumb)

    _road(draws, ground, left, right, lane)
    middle = min(width, max(0, round(camera.column)))
    _pavement(draws, ground.part(slice(0, middle)), left)
    _pavement(draws, ground.part(slice(middle, width)), right)
    if shading:
        side = left if light.sun < 0 else right
        tall = np.zeros_like(ahead)
        for house in shading:
            tall[(ahead >= house.near) & (ahead < house.far)] = house.tall
        depth = 0.75 * tall - (side.facade - across * side.way)
        colour *= 1 - within(depth * metre + 0.5, 0.0, 1.0) * (0.42 * light.strength)
    veil = ahead / (ahead + light.haze_distance)
    colour *= 1 + 0.15 * light.strength
    colour += veil * (channels(light.haze) - colour)


@dataclass(frozen=True)
class _Ground:
    """Pixels below the horizon, and where on the ground each lies; arrays that broadcast to (h, w)."""

    colour: Floats
    label: npt.NDArray[np.uint8]
    ahead: Floats
    """Metres in front of the camera."""
    across: Floats
    """Metres to the right of the camera."""
    metre: Floats
    """Pixels that a metre across spans."""
    patches: Floats
    crumb: Floats

    def part(self, columns: slice) -> "_Ground":
        return replace(
            self,
            colour=self.colour[:, :, columns],
            label=self.label[:, columns],
            across=self.across[:, columns],
            patches=self.patches[:, columns],
            crumb=self.crumb[:, columns],
        )


def _road(draws: Draws, ground: _Ground, left: Side, right: Side, lane: float) -> None:
    across, ahead, metre, colour = ground.across, ground.ahead, ground.metre, ground.colour
    asphalt = channels(draws.shade(draws.one_of(ASPHALTS), 0.15))
    track = np.abs(np.abs(part_of(across / lane + 0.5) - 0.5) - 0.24)
    worn = 1 + 0.1 * np.maximum(1 - track * 9, 0.0)
    rough = (0.5 * ground.patches + 0.16 * ground.crumb) * (0.3 + 8.4 / (12.0 + ahead))
    colour[:] = (worn + rough) * asphalt
    ground.label[:] = Label.ROAD
    white = channels(draws.shade((0.86, 0.86, 0.83), 0.1))
    fresh = draws.between(0.45, 0.95) * (1 + 0.8 * within(ground.patches - 0.1, -0.5, 0.0))
    phase = draws.between(0.0, 7.0)

    def line(at: float, *, dashed: bool) -> None:
        """A line along the road, 14 cm wide; fainter where it is thinner than a pixel."""
        reach = 0.07 * metre
        # Only the columns between its upper and its lower end are worth the work.
        upper, lower = (across[0] - at) * metre[0], (across[-1] - at) * metre[-1]
        margin = float(reach.max()) + 1
        passed = np.flatnonzero((np.minimum(upper, lower) < margin) & (np.maximum(upper, lower) > -margin))
        span = slice(int(passed[0]), int(passed[-1]) + 1) if passed.size else slice(0, 0)
        share = within(reach + 0.5 - np.abs(across[:, span] - at) * metre, 0.0, 1.0)
        share = np.minimum(share, 2 * reach) * fresh[:, span]
        if dashed:
            share = share * (part_of((ahead + phase) / 7.0) < 0.45)
        colour[:, :, span] += share * (white - colour[:, :, span])

    line(-0.5 * lane, dashed=draws.chance(0.7))
    if left.kerb > 2.5 * lane:
        line(-1.5 * lane, dashed=True)
    if right.kerb > lane * 0.5 + 1:
        line(lane * 0.5, dashed=draws.chance(0.5))
    if draws.chance(0.4):
        start = draws.between(9.0, 28.0)
        inside = np.flatnonzero((ahead[:, 0] > start) & (ahead[:, 0] < start + 3.2))
        if inside.size:
            crossing = slice(int(inside[0]), int(inside[-1]) + 1)
            stripes = (part_of(across[crossing]) < 0.52) * fresh[crossing]
            colour[:, crossing] += stripes * (white - colour[:, crossing])


def _pavement(draws: Draws, ground: _Ground, side: Side) -> None:
    """Gutter, kerb, paving and grass of one side, over its half of the ground."""
    ahead, metre, colour, crumb, patches = ground.ahead, ground.metre, ground.colour, ground.crumb, ground.patches
    out = ground.across * side.way
    paving = channels(draws.shade(draws.one_of(PAVINGS), 0.15))
    slab = draws.one_of((0.5, 1.0, 1.5))
    lawn = channels(draws.shade(draws.one_of(LEAVES), 0.25))
    stone = channels(draws.shade((0.66, 0.65, 0.63), 0.1))

    def seams(place: Floats, pixels: Floats) -> npt.NDArray[np.bool_]:
        """Where a joint runs between slabs, about a pixel wide; `pixels` is what a metre spans that way."""
        off = part_of(place / slab)
        return np.minimum(off, 1 - off) * slab * pixels < 0.55

    seam = (seams(out, metre) | seams(ahead, metre / ahead)) * within(metre * slab / 14 - 0.35, 0.0, 0.3)
    paved = (1 - seam + 0.35 * patches + 0.12 * crumb) * paving
    kerb = (1 + 0.15 * crumb) * stone
    grass = (1.15 + 0.9 * patches + 0.5 * crumb) * lawn
    for begin, paint, number in (
        (side.kerb - 0.25, colour * 0.72, Label.ROAD),
        (side.kerb, kerb, Label.SIDEWALK),
        (side.kerb + 0.18, paved, Label.SIDEWALK),
        (side.green, grass, Label.VEGETATION),
    ):
        beyond = out - begin
        colour += within(beyond * metre + 0.5, 0.0, 1.0) * (paint - colour)
        ground.label[beyond >= 0] = number


def _facade(scene: Scene, house: House, along: Floats, up: Floats, spans: tuple[Floats, Floats]) -> Floats:
    """Colours (3, h, w) of a wall, `along` it (1, w) and `up` it (h, w) in metres; `spans` is what a pixel covers."""

    def band(value: Floats, period: float, share: float, span: Floats) -> Floats:
        """How much of a pixel lies in the middle `share` of each period; the mean where periods are too fine."""
        off = np.abs(part_of(value / period) - 0.5) * period
        sharp = within(0.5 + (share * period / 2 - off) / span, 0.0, 1.0)
        return sharp + within(span * (2.5 / period) - 0.5, 0.0, 1.0) * (share - sharp)

    base = house.floor * (1.15 if house.shop else 0.55)
    eaves = house.tall - house.roof_tall
    level = up - base
    floors = (level > 0) & (up < eaves - 0.3)
    width, height = house.window
    panes = band(along, house.bay, width, spans[0]) * (band(level, house.floor, height, spans[1]) * floors)
    frames = band(along, house.bay, width + 0.1, spans[0]) * (band(level, house.floor, height + 0.1, spans[1]) * floors)
    cell = noise(np.floor(level / house.floor) * 53.0, np.floor(along / house.bay) * 31.0)
    glass = channels(GLASS) + np.maximum(cell - 0.35, 0.0) * channels(scene.light.haze)
    trim, roof = channels(house.trim), channels(house.roof)
    wall = (0.9 + 0.3 * (noise(up * 14.0, along * 9.0) - 0.3)) * channels(house.wall)
    wall += frames * (trim - wall)
    wall += panes * (glass - wall)
    if house.shop:
        front = band(along, house.bay * 2, 0.86, spans[0]) * ((up > 0.5) & (up < base * 0.72))
        wall += front * (channels(dim(GLASS, 1.3)) - wall)
        np.copyto(wall, channels(dim(house.roof, 1.3)), where=(up > base * 0.76) & (up < base * 0.97))
    tiles = 0.85 + 0.5 * (noise(up * 25.0, along * 6.0) - 0.4)
    np.copyto(wall, tiles * roof, where=up > eaves)
    np.copyto(wall, trim, where=np.abs(up - eaves) < 0.18)
    return wall


def paint_house(scene: Scene, side: Side, house: House, *, beside: float) -> None:
    """The wall that looks at the camera where it rises above its neighbour, `beside` metres tall; then the facade."""
    camera, light, canvas = scene.camera, scene.light, scene.canvas
    haze = channels(light.haze)
    if house.near > 2.0 and house.tall > beside:
        top, inner = camera.at(side.way * side.facade, house.tall, house.near)
        bottom, outer = camera.at(side.way * (side.facade + 14.0), 0.0, house.near)

        def end_wall(rows: Floats, columns: Floats) -> Floats:
            scale = house.near / camera.focal
            up, along = camera.height + (camera.horizon - rows) * scale, (columns - camera.column) * scale
            span = np.full((1, 1), scale, np.float32)
            wall = _facade(scene, house, along, up, (span, span)) * (0.86 + 0.06 * light.strength)
            return wall + light.veil(house.near) * (haze - wall)

        canvas.paint(rectangle(top, bottom, min(inner, outer), max(inner, outer)), end_wall, Label.BUILDING)

    height, width = canvas.target.shape
    ends = (camera.at(side.way * side.facade, 0.0, ahead)[1] for ahead in (house.near, house.far))
    # A column belongs to the house when its centre does, so that neighbours share none.
    begin, end = (min(width, max(0, ceil(column - 0.5))) for column in sorted(ends))
    if begin == end:
        return
    ahead = camera.focal * side.facade / np.abs(centres(begin, end)[None, :] - camera.column)
    scale = ahead / camera.focal
    start = max(0, int(camera.horizon - (house.tall - camera.height) / float(scale.min())) - 1)
    stop = min(height, int(camera.horizon + camera.height / float(scale.min())) + 2)
    up = camera.height + (camera.horizon - centres(start, stop)[:, None]) * scale
    wall = _facade(scene, house, ahead, up, (ahead * scale / side.facade, scale)) * light.on_side(-side.way)
    wall += (ahead / (ahead + light.haze_distance)) * (haze - wall)
    covered = within(0.5 + np.minimum(house.tall - up, up) / scale, 0.0, 1.0)
    under = canvas.image[:, start:stop, begin:end]
    under += covered * (wall - under)
    canvas.target[start:stop, begin:end][(up <= house.tall) & (up >= 0)] = Label.BUILDING


def paint_garden(scene: Scene, side: Side, lot: House) -> None:
    """Trees and shrubs where a house is missing."""
    draws = scene.draws
    for ahead in sorted((draws.between(max(lot.near, 6.0), lot.far + 6.0) for _ in range(3)), reverse=True):
        across = side.way * (side.facade + draws.between(1.0, 9.0))
        painter = tree(across, ahead) if draws.chance(0.5) else bushes(across, ahead, 5.0, draws.between(1.0, 2.5))
        painter(scene)
