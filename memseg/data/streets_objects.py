"""What stands on a generated street: cars, people, trees and poles, each in metres.

A network that could tell a car by its paint would learn nothing of use. So colours range widely and are shared: a car
may be as grey as the road, a trunk as thin and dark as a pole, a coat as green as a hedge. What tells them apart is
shape, and where they stand.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from memseg.data.streets_canvas import (
    Canvas,
    Colour,
    Draws,
    Floats,
    Point,
    Texture,
    channels,
    dim,
    ellipse,
    leaves,
    mix,
    noise,
    polygon,
    rectangle,
    soft,
    stroke,
)


class Label(IntEnum):
    """The classes of the generated streets, in the order of their numbers."""

    ROAD = 0
    SIDEWALK = 1
    BUILDING = 2
    POLE = 3
    VEGETATION = 4
    SKY = 5
    PERSON = 6
    CAR = 7


@dataclass(frozen=True)
class Camera:
    """A pinhole above the road, looking along it."""

    focal: float
    """Pixels."""
    column: float
    """Where the street vanishes, in pixels from the left."""
    horizon: float
    """Row of the horizon, in pixels from the top."""
    height: float
    """Metres above the road."""

    def at(self, across: float, up: float, ahead: float) -> Point:
        """Pixel of a point in metres: to the right of the camera, above the road, and in front."""
        return self.horizon + self.focal * (self.height - up) / ahead, self.column + self.focal * across / ahead

    def pixels(self, metres: float, ahead: float) -> float:
        return self.focal * metres / ahead


@dataclass(frozen=True)
class Light:
    """What the air and the sun do to a colour."""

    haze: Colour
    haze_distance: float
    """Metres at which half of a colour is haze."""
    sun: int
    """-1: the sun stands to the left of the street; 1: to the right."""
    strength: float
    """0 under clouds, 1 in full sun."""

    def through(self, colour: Colour, ahead: float) -> Colour:
        """`colour` as it is seen at `ahead` metres."""
        return mix(colour, self.haze, self.veil(ahead))

    def veil(self, ahead: float) -> float:
        return ahead / (ahead + self.haze_distance)

    def on_side(self, side: int) -> float:
        """Brightness of a wall that looks to `side` (-1 left, 1 right)."""
        return 1.0 + (0.16 if side == self.sun else -0.3) * self.strength


@dataclass(frozen=True)
class Scene:
    """What every painter needs: where to paint, from where it is seen, in what light, and chance."""

    canvas: Canvas
    camera: Camera
    light: Light
    draws: Draws
    grain: Draws
    """For noise by the pixel, apart from `draws`, so that a scene is the same street at every size."""


Painter = Callable[[Scene], None]

PAINTS: tuple[Colour, ...] = (
    (0.12, 0.12, 0.13), (0.85, 0.86, 0.87), (0.55, 0.57, 0.6), (0.3, 0.32, 0.35), (0.6, 0.1, 0.1), (0.13, 0.22, 0.45),
    (0.16, 0.36, 0.28), (0.75, 0.66, 0.5), (0.85, 0.72, 0.15), (0.45, 0.16, 0.2), (0.35, 0.55, 0.7), (0.8, 0.42, 0.15),
)  # fmt: skip
CLOTHES: tuple[Colour, ...] = (
    (0.1, 0.1, 0.14), (0.2, 0.24, 0.4), (0.6, 0.15, 0.16), (0.8, 0.78, 0.72), (0.3, 0.4, 0.24), (0.5, 0.36, 0.24),
    (0.75, 0.55, 0.2), (0.45, 0.5, 0.55), (0.45, 0.25, 0.45), (0.2, 0.45, 0.5), (0.85, 0.5, 0.55),
)  # fmt: skip
SKINS: tuple[Colour, ...] = ((0.9, 0.74, 0.62), (0.76, 0.58, 0.44), (0.55, 0.38, 0.27), (0.34, 0.23, 0.17))
LEAVES: tuple[Colour, ...] = (
    (0.22, 0.36, 0.14), (0.32, 0.44, 0.18), (0.16, 0.3, 0.16), (0.45, 0.46, 0.18),
    (0.55, 0.38, 0.14), (0.27, 0.4, 0.28),
)  # fmt: skip
GLASS: Colour = (0.13, 0.17, 0.2)
METALS: tuple[Colour, ...] = ((0.4, 0.42, 0.43), (0.2, 0.22, 0.22), (0.62, 0.63, 0.62), (0.18, 0.28, 0.24))


def shadow(scene: Scene, across: float, ahead: float, half_width: float, half_depth: float) -> None:
    """A soft dark patch on the ground; the labels below stay."""
    camera = scene.camera
    row, column = camera.at(across, 0.0, ahead)
    depth = camera.at(across, 0.0, max(ahead - half_depth, 1.5))[0] - row
    patch = soft(ellipse((row, column), 1.3 * depth, camera.pixels(1.25 * half_width, ahead)), 0.6 * depth)
    scene.canvas.paint(patch, (0.05, 0.05, 0.07), None, opacity=0.55)


@dataclass(frozen=True)
class Body:
    """The outline of a kind of car, in metres; shares are of its length, from the end that is seen."""

    length: float
    width: float
    belt: float
    roof: float
    tail: tuple[float, float]
    """Where the rear window meets the belt, and the roof."""
    nose: tuple[float, float]
    """Where the windscreen meets the belt, and the roof, from the front."""


BODIES = (
    Body(4.0, 1.75, 0.92, 1.48, (0.03, 0.14), (0.24, 0.42)),
    Body(4.6, 1.8, 0.92, 1.43, (0.15, 0.3), (0.26, 0.43)),
    Body(4.5, 1.88, 1.05, 1.68, (0.03, 0.12), (0.24, 0.38)),
    Body(5.2, 1.95, 1.15, 2.15, (0.0, 0.02), (0.12, 0.24)),
)


def car(across: float, ahead: float, *, oncoming: bool) -> Painter:
    """A car whose near end stands `ahead` metres away; `across` is its middle."""

    def paint(scene: Scene) -> None:
        draws, light = scene.draws, scene.light
        body = draws.one_of(BODIES)
        colour = draws.shade(draws.one_of(PAINTS), 0.2)
        shadow(scene, across, ahead + body.length * 0.4, body.width * 0.62, body.length * 0.62)
        if abs(across) > body.width / 2:
            _car_side(scene, body, colour, across, ahead, oncoming)
        _car_end(scene, body, light.through(colour, ahead), across, ahead, oncoming)

    return paint


def _car_side(scene: Scene, body: Body, colour: Colour, across: float, ahead: float, oncoming: bool) -> None:
    camera, canvas, light = scene.camera, scene.canvas, scene.light
    side = -1 if across > 0 else 1
    plane = across + side * body.width / 2
    length = body.length
    near, far = (body.nose, body.tail) if oncoming else (body.tail, body.nose)
    lit = light.through(dim(colour, 0.82 * light.on_side(side)), ahead)
    dark = light.through((0.05, 0.05, 0.06), ahead)
    glass = light.through(dim(GLASS, light.on_side(side)), ahead)

    def at(up: float, share: float) -> Point:
        return camera.at(plane, up, ahead + share * length)

    def cabin_at(up: float, share: float) -> Point:
        lean = 0.05 + 0.17 * (up - body.belt) / (body.roof - body.belt)
        return camera.at(plane - side * lean * body.width / 2, up, ahead + share * length)

    roof, belt = body.roof, body.belt
    low = belt - 0.1
    cabin = (cabin_at(low, near[0]), cabin_at(roof, near[1]), cabin_at(roof, 1 - far[1]), cabin_at(low, 1 - far[0]))
    canvas.paint(polygon(*cabin), lit, Label.CAR)
    canvas.paint(polygon(at(0.2, 0.0), at(belt - 0.1, 0.0), at(belt, near[0]), at(belt, 1 - far[0]),
                         at(belt - 0.12, 1.0), at(0.22, 1.0)), lit, Label.CAR)  # fmt: skip
    middle = (near[1] + 1 - far[1]) / 2
    for start, end in (((near[0] + 0.05, near[1] + 0.03), (middle - 0.012,) * 2),
                       ((middle + 0.012,) * 2, (1 - far[0] - 0.05, 1 - far[1] - 0.03))):  # fmt: skip
        pane = (cabin_at(belt + 0.03, start[0]), cabin_at(roof - 0.1, start[1]),
                cabin_at(roof - 0.1, end[1]), cabin_at(belt + 0.03, end[0]))  # fmt: skip
        canvas.paint(polygon(*pane), glass, Label.CAR)
    for share in (0.19, 0.81):
        row, column = at(0.31, share)
        half_width = abs(at(0.31, share - 0.075)[1] - at(0.31, share + 0.075)[1]) / 2
        half_height = camera.pixels(0.32, ahead + share * length)
        canvas.paint(ellipse((row, column), half_height, half_width), dark, Label.CAR)
        canvas.paint(
            ellipse((row, column), half_height * 0.55, half_width * 0.55), mix(dark, (0.6, 0.6, 0.62), 0.7), Label.CAR
        )


def _car_end(scene: Scene, body: Body, colour: Colour, across: float, ahead: float, oncoming: bool) -> None:
    camera, canvas, light, draws = scene.camera, scene.canvas, scene.light, scene.draws
    half = body.width / 2
    shares = body.nose if oncoming else body.tail
    belt_ahead, roof_ahead = ahead + shares[0] * body.length, ahead + shares[1] * body.length
    near_belt = body.belt - (0.12 if shares[0] > 0.1 else 0.0)
    dark = light.through((0.06, 0.06, 0.07), ahead)

    def at(part: float, up: float, distance: float) -> Point:
        return camera.at(across + part * half, up, distance)

    def trapezium(low: float, high: float, up_low: float, up_high: float) -> tuple[Point, ...]:
        return (at(-low, up_low, belt_ahead), at(-high, up_high, roof_ahead),
                at(high, up_high, roof_ahead), at(low, up_low, belt_ahead))  # fmt: skip

    def block(left: float, right: float, low: float, high: float, rounding: float = 0.0) -> tuple[float, ...]:
        top, start = at(left, high, ahead)
        bottom, end = at(right, low, ahead)
        return top, bottom, start, end, camera.pixels(rounding, ahead)

    def plate(paint: Colour, *bounds: float) -> None:
        top, bottom, left, right, rounding = block(*bounds)
        canvas.paint(rectangle(top, bottom, left, right, rounding=rounding), paint, Label.CAR)

    for side in (-0.86, 0.62):
        plate(dark, side, side + 0.24, 0.0, 0.4)
    canvas.paint(polygon(*trapezium(0.95, 0.78, body.belt, body.roof)), colour, Label.CAR)
    glass = light.through(mix(GLASS, light.haze, 0.18), ahead)
    canvas.paint(polygon(*trapezium(0.84, 0.7, body.belt + 0.04, body.roof - 0.09)), glass, Label.CAR)
    glint = (at(-0.55, body.belt + 0.06, belt_ahead), at(-0.35, body.roof - 0.1, roof_ahead),
             at(-0.1, body.roof - 0.1, roof_ahead), at(-0.2, body.belt + 0.06, belt_ahead))  # fmt: skip
    canvas.paint(polygon(*glint), light.haze, Label.CAR, opacity=0.25)
    if shares[0] > 0.02:
        canvas.paint(polygon(at(-0.97, near_belt - 0.02, ahead), at(-0.95, body.belt + 0.02, belt_ahead),
                             at(0.95, body.belt + 0.02, belt_ahead), at(0.97, near_belt - 0.02, ahead)),
                     dim(colour, 1.12), Label.CAR)  # fmt: skip
    plate(colour, -1.0, 1.0, 0.24, near_belt, 0.14)
    plate(dim(colour, 0.62), -0.98, 0.98, 0.24, 0.42, 0.08)
    lamp = (0.95, 0.93, 0.82) if oncoming else (0.7, 0.08, 0.07)
    lamp = light.through(lamp, ahead * 0.4)
    height = near_belt - 0.14
    for left in (-0.94, 0.62):
        plate(lamp, left, left + 0.32, height - 0.13, height, 0.04)
    if oncoming:
        plate(dim(dark, 1.5), -0.5, 0.5, height - 0.14, height - 0.02, 0.03)
    plate(light.through(draws.one_of(((0.9, 0.9, 0.86), (0.85, 0.75, 0.3))), ahead), -0.3, 0.3, 0.42, 0.54)


def person(across: float, ahead: float) -> Painter:
    """Someone standing or walking at that place."""

    def paint(scene: Scene) -> None:
        camera, canvas, light, draws = scene.camera, scene.canvas, scene.light, scene.draws
        tall = draws.between(1.5, 1.9) if draws.chance(0.85) else draws.between(1.0, 1.35)
        stride, swing = draws.between(0.02, 0.2), draws.between(-0.22, 0.22)
        coat, legs = (light.through(draws.shade(draws.one_of(CLOTHES), 0.25), ahead) for _ in range(2))
        skin = light.through(draws.one_of(SKINS), ahead)
        hair = light.through(draws.shade((0.22, 0.16, 0.12), 0.6), ahead)
        shoes = light.through((0.09, 0.08, 0.08), ahead)
        unit = camera.pixels(tall, ahead)
        row, column = camera.at(across, 0.0, ahead)
        foot = row

        def at(aside: float, up: float) -> Point:
            return foot - up * unit, column + aside * unit

        def limb(start: Point, end: Point, first: float, last: float, paint: Colour) -> None:
            canvas.paint(
                stroke(at(*start), at(*end), max(first * unit, 0.4), max(last * unit, 0.35)), paint, Label.PERSON
            )

        shadow(scene, across, ahead, 0.3 * tall / 1.7, 0.25)
        for way in (-1.0, 1.0):
            limb((way * 0.04, 0.5), (way * (0.03 + stride * 0.5), 0.05), 0.055, 0.035, legs)
            limb((way * (0.03 + stride * 0.5), 0.025), (way * (0.05 + stride * 0.5), 0.02), 0.026, 0.02, shoes)
        limb((-0.1, 0.79), (-0.13 - swing * 0.4, 0.47), 0.034, 0.026, dim(coat, 0.82))
        limb((0.0, 0.76), (0.0, 0.54), 0.1, 0.08, coat)
        if draws.chance(0.3):
            limb((0.0, 0.56), (0.0, 0.42), 0.085, 0.095, coat)
        limb((0.1, 0.79), (0.13 + swing * 0.4, 0.47), 0.034, 0.026, dim(coat, 0.9))
        if draws.chance(0.35):
            bag = light.through(draws.shade(draws.one_of(CLOTHES), 0.3), ahead)
            limb((0.14, 0.5), (0.15, 0.42), 0.05, 0.06, bag)
        limb((0.0, 0.86), (0.0, 0.84), 0.035, 0.035, skin)
        limb((0.0, 0.95), (0.0, 0.925), 0.05, 0.045, hair)
        limb((0.012, 0.925), (0.01, 0.915), 0.04, 0.036, skin)

    return paint


def _foliage(scene: Scene, colour: Colour, ahead: float, middle: float, radius: float, shift: Point) -> Texture:
    """Leaves: light above, dark below, dappled; `middle` is the row of the crown's middle, `radius` its size."""
    light = scene.light
    veil, texel = light.veil(ahead), 256 / (3.0 * radius)

    def texture(rows: Floats, columns: Floats) -> Floats:
        clumps = noise(rows * texel + shift[1], columns * texel + shift[0])
        twigs = noise(columns * (texel * 5) + shift[0], rows * (texel * 5) + shift[1])
        bright = 0.25 + clumps + 0.7 * (twigs - 0.35) - (rows - middle) * (0.2 / radius)
        colours: Floats = bright * channels(dim(colour, 1 - veil)) + channels(dim(light.haze, veil))
        return colours

    return texture


def tree(across: float, ahead: float) -> Painter:
    """A tree with its foot at that place; trunk and leaves are vegetation."""

    def paint(scene: Scene) -> None:
        camera, canvas, light, draws = scene.camera, scene.canvas, scene.light, scene.draws
        tall, wide = draws.between(5.0, 11.0), draws.between(1.3, 2.6)
        bare = tall * draws.between(0.3, 0.42)
        colour = draws.shade(draws.one_of(LEAVES), 0.25)
        bark = light.through(draws.shade((0.3, 0.24, 0.19), 0.35), ahead)
        thick = camera.pixels(draws.between(0.09, 0.22), ahead)
        lean = draws.between(-0.3, 0.3)
        shadow(scene, across, ahead, wide * 0.8, 1.2)
        trunk = stroke(camera.at(across, 0.0, ahead), camera.at(across + lean, bare * 1.6, ahead), thick, thick * 0.6)
        canvas.paint(trunk, bark, Label.VEGETATION)
        unit = camera.pixels(1.0, ahead)
        circles = []
        for _ in range(draws.whole(5, 8)):
            up, size = draws.between(bare + 0.6, tall - 0.6), draws.between(0.45, 0.8) * wide
            row, column = camera.at(across + lean + draws.between(-0.75, 0.75) * wide, up, ahead)
            circles.append((row, column, size * unit))
        shift = (draws.between(0, 256), draws.between(0, 256))
        middle = camera.at(across, (bare + tall) / 2, ahead)[0]
        leafage = _foliage(scene, colour, ahead, middle, wide * unit, shift)
        canvas.paint(leaves(circles, shift), leafage, Label.VEGETATION)

    return paint


def bushes(across: float, ahead: float, width: float, height: float) -> Painter:
    """Shrubs `width` metres wide, side by side, with their middle at that place."""

    def paint(scene: Scene) -> None:
        camera, canvas, draws = scene.camera, scene.canvas, scene.draws
        unit = camera.pixels(1.0, ahead)
        colour = draws.shade(draws.one_of(LEAVES), 0.3)
        circles = []
        steps = min(12, max(2, int(2 * width / height)))
        for step in range(steps):
            aside = (step / (steps - 1) - 0.5) * width
            size = draws.between(0.35, 0.6) * height
            row, column = camera.at(across + aside, size * draws.between(0.6, 1.1), ahead)
            circles.append((row, column, size * unit))
        shift = (draws.between(0, 256), draws.between(0, 256))
        middle = camera.at(across, height / 2, ahead)[0]
        leafage = _foliage(scene, colour, ahead, middle, height * unit * 0.6, shift)
        canvas.paint(leaves(circles, shift), leafage, Label.VEGETATION)

    return paint


def pole(across: float, ahead: float) -> Painter:
    """A street lamp, a road sign or a traffic light; all of it is pole."""

    def paint(scene: Scene) -> None:
        camera, canvas, light, draws = scene.camera, scene.canvas, scene.light, scene.draws
        metal = light.through(draws.shade(draws.one_of(METALS), 0.2), ahead)
        inward = -1.0 if across > 0 else 1.0

        def post(tall: float, radius: float) -> Point:
            thick = max(camera.pixels(radius, ahead), 0.5)
            foot, head = camera.at(across, 0.0, ahead), camera.at(across, tall, ahead)
            canvas.paint(rectangle(head[0], foot[0], head[1] - thick, head[1] + thick), metal, Label.POLE)
            shine = rectangle(head[0], foot[0], head[1] - thick, head[1] - thick * 0.3)
            canvas.paint(shine, (1.0, 1.0, 1.0), None, opacity=0.2)
            return head

        unit = camera.pixels(1.0, ahead)
        kind = draws.whole(0, 2)
        if kind == 0:
            row, column = post(draws.between(5.5, 8.0), 0.075)
            reach = inward * draws.between(0.8, 1.8) * unit
            thin = max(0.05 * unit, 0.5)
            canvas.paint(stroke((row, column), (row - 0.3 * unit, column + reach), thin, thin), metal, Label.POLE)
            lamp = (row - 0.28 * unit, column + reach)
            canvas.paint(ellipse(lamp, max(0.1 * unit, 0.6), max(0.32 * unit, 1.0)), metal, Label.POLE)
        elif kind == 1:
            row, column = post(draws.between(2.3, 3.0), 0.04)
            board = light.through(draws.one_of(((0.75, 0.12, 0.12), (0.12, 0.28, 0.6), (0.9, 0.8, 0.2))), ahead)
            face = light.through((0.92, 0.92, 0.9), ahead)
            for size, paint in ((0.34, board), (0.22, draws.one_of((face, board)))):
                canvas.paint(ellipse((row + 0.15 * unit, column), size * unit, size * unit), paint, Label.POLE)
        else:
            row, column = post(draws.between(2.8, 3.4), 0.06)
            box = light.through((0.08, 0.1, 0.09), ahead)
            half = 0.17 * unit
            top = row - 0.45 * unit
            canvas.paint(
                rectangle(top, top + 1.0 * unit, column - half, column + half, rounding=half * 0.4), box, Label.POLE
            )
            lit = draws.whole(0, 2)
            for place, paint in enumerate(((0.95, 0.2, 0.15), (0.95, 0.7, 0.15), (0.2, 0.85, 0.45))):
                bulb = ellipse((top + (0.2 + 0.3 * place) * unit, column), 0.11 * unit, 0.11 * unit)
                canvas.paint(bulb, paint if place == lit else dim(paint, 0.25), Label.POLE)

    return paint
