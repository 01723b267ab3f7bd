"""What a card has, what it keeps back, how fast it is.

A plan is made on a machine without the cards it is for, so their figures must come from somewhere: one TOML file per
card, each figure beside the document it was taken from. Users describe their own card in the same form. What a card
keeps back (`reserve`) is the only safety margin in memseg; predictions are never padded.

    title = "NVIDIA GeForce GTX 1070"
    kind = "cuda"

    [capacity]
    value = "7.93 GiB"
    source = "total capacity in PyTorch's out-of-memory message"

and so on for each of `reserve`, `flops`, `bandwidth`, `link`, `efficiency` and, for CUDA, `compute_capability`.
"""

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError

from memseg.errors import InputError, ProblemsError, UnknownNameError
from memseg.planning.costs import Work
from memseg.planning.roofline import ProductKind, products_seconds
from memseg.planning.strict import StrictModel, field_names, problem_lines
from memseg.resources import shipped_folder
from memseg.units import format_bytes, parse_bytes

Value = TypeVar("Value")


@dataclass(frozen=True)
class Card:
    """A device that can run segments."""

    name: str
    """As the user wrote it: gtx1070, cpu:8GiB, my_card.toml. `parse_cards` reads it back."""
    title: str
    kind: Literal["cuda", "cpu"]
    capacity_bytes: int
    """What a process sees of it; a little less than is printed on the box."""
    reserve_bytes: int
    """Kept back for what no prediction counts: context, workspaces, fragmentation, the display."""
    flops: float
    """Peak float32 operations per second, multiply-add counted as two, without TF32."""
    bandwidth: float
    """Peak bytes per second to and from its memory."""
    link: float
    """Bytes per second to another card."""
    efficiency: float
    """The fraction of the peak rates that training reaches, in (0, 1]."""
    compute_capability: str | None
    """As in CUDA's documentation, "6.1"; None for a cpu card."""
    sources: Mapping[str, str] = field(compare=False, repr=False)
    """Where each figure comes from, by its name in the profile."""
    convolution_flops: float | None = None
    """Of float32 convolutions, where they run at another rate than float32 matrix products; on a card with TF32, in
    TF32, as torch does by default."""
    half_flops: float | None = None
    """Of bfloat16 and float16 products, summed in float32; None where they run no faster than in float32."""
    overhead_s: float = 0.0
    """Seconds that each operation takes beside its arithmetic and its traffic."""

    @property
    def available_bytes(self) -> int:
        """What a prediction may fill."""
        return self.capacity_bytes - self.reserve_bytes

    def flops_of(self, kind: ProductKind) -> float:
        """Peak operations per second of one kind of products.

        bfloat16 needs compute capability 8.0; before, it runs at the rate of float32. float64 is taken at half that
        rate, as on CPUs and on cards for data centres; on other cards it is slower.
        """
        match kind:
            case ProductKind.CONVOLUTION:
                return self.convolution_flops or self.flops
            case ProductKind.FLOAT16:
                return self.half_flops or self.flops
            case ProductKind.BFLOAT16:
                return self.half_flops or self.flops if self._has_bfloat16 else self.flops
            case ProductKind.FLOAT64:
                return self.flops / 2
            case ProductKind.MATRIX:
                return self.flops

    def seconds(self, work: Work) -> float:
        """Predicted time of `work`, one operation after the other (`memseg.planning.roofline`).

        The seconds of a sum are the sum of the seconds.
        """
        products = products_seconds(work.products, self.flops_of, self.bandwidth)
        other_flops = work.flops - sum(one.flops for one in work.products)
        at_peak = products + other_flops / self.flops + work.moved_bytes / self.bandwidth
        return at_peak / self.efficiency + work.operations * self.overhead_s

    @property
    def _has_bfloat16(self) -> bool:
        return self.compute_capability is None or parse_capability(self.compute_capability) >= (8, 0)


class _Figure(StrictModel):
    value: str
    """A number with its unit."""
    source: str = Field(min_length=10)
    """The document, message or command that it was taken from."""


class _Fraction(StrictModel):
    value: float = Field(gt=0, le=1)
    source: str = Field(min_length=10)


class _Profile(StrictModel):
    title: str = Field(min_length=1)
    kind: Literal["cuda", "cpu"]
    capacity: _Figure
    reserve: _Figure
    flops: _Figure
    bandwidth: _Figure
    link: _Figure
    efficiency: _Fraction
    compute_capability: _Figure | None = None
    convolution_flops: _Figure | None = None
    half_flops: _Figure | None = None
    overhead: _Figure | None = None


def known_cards() -> tuple[Card, ...]:
    """Every card that memseg ships a profile of, from the smallest to the largest.

    >>> [card.name for card in known_cards()][:2]
    ['rtx2060', 'gtx1070']
    """
    return tuple(sorted(_shipped().values(), key=lambda card: (card.available_bytes, card.name)))


def parse_cards(text: str) -> tuple[Card, ...]:
    """The cards that a comma-separated list names.

    Each is the name of a shipped profile or the path of a TOML file like those, and may be followed by a colon and the
    size of its memory. A card may be repeated.

    Raises:
        UnknownNameError: neither a known card nor a TOML file.
        ProblemsError: the TOML file does not describe a card.
        InputError: nothing named, or a size that leaves nothing beside the reserve.

    >>> [card.title for card in parse_cards("gtx1070,titanx")]
    ['NVIDIA GeForce GTX 1070', 'NVIDIA Titan X (Pascal)']
    >>> parse_cards("cpu:8GiB")[0].capacity_bytes
    8589934592
    """
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise InputError(f"cards must be names joined by commas, got {text!r}; try gtx1070,titanx or cpu:8GiB")
    return tuple(_parse_card(name) for name in names)


def load_card(path: Path) -> Card:
    """The card that a TOML file describes, named by its path.

    Raises:
        ProblemsError: the file does not describe a card; every problem is told.
    """
    return _load_card(path, str(path))


@cache
def _shipped() -> dict[str, Card]:
    folder = shipped_folder("profiles")
    return {path.stem: _load_card(path, path.stem) for path in sorted(folder.rglob("*.toml"))}


def _parse_card(name: str) -> Card:
    base, colon, size = name.rpartition(":") if ":" in name else (name, "", "")
    if base.endswith(".toml"):
        card = load_card(Path(base))
    else:
        try:
            card = _shipped()[base]
        except KeyError:
            hint = "(a card of your own is a TOML file: cards/mine.toml)"
            raise UnknownNameError("card", base, _shipped(), hint) from None
    capacity = parse_bytes(size) if colon else card.capacity_bytes
    if capacity <= card.reserve_bytes:
        raise InputError(
            f"{name}: a card must be larger than what it keeps back, {format_bytes(card.reserve_bytes)}, "
            f"got {format_bytes(capacity)}"
        )
    sources = {**card.sources, "capacity": "given by the user"} if colon else card.sources
    return replace(card, name=name, capacity_bytes=capacity, sources=sources)


def _load_card(path: Path, name: str) -> Card:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ProblemsError(str(path), [f"cannot be read as TOML: {error}"]) from None
    try:
        profile = _Profile.model_validate(content)
    except ValidationError as error:
        known = field_names(_Profile, _Figure)
        raise ProblemsError(str(path), problem_lines(error, known)) from None
    return _card_of(profile, path, name)


def _card_of(profile: _Profile, path: Path, name: str) -> Card:
    problems: list[str] = []

    def figure(key: str, parse: Callable[[str], Value], fallback: Value) -> Value:
        """What a figure says; `fallback` if it is left out, or cannot be read, which is a problem."""
        written = getattr(profile, key)
        if written is None:
            return fallback
        try:
            return parse(written.value)
        except InputError as error:
            problems.append(f"{key}.value: {error}")
            return fallback

    capability = profile.compute_capability
    if (profile.kind == "cuda") != (capability is not None):
        needed = "needs one, as in CUDA's documentation" if profile.kind == "cuda" else "has none"
        problems.append(f"compute_capability: a {profile.kind} card {needed}")
    figure("compute_capability", parse_capability, (0, 0))
    card = Card(
        name=name,
        title=profile.title,
        kind=profile.kind,
        capacity_bytes=figure("capacity", parse_bytes, 1),
        reserve_bytes=figure("reserve", parse_bytes, 0),
        flops=figure("flops", _parse_flops, 1.0),
        bandwidth=figure("bandwidth", _parse_rate, 1.0),
        link=figure("link", _parse_rate, 1.0),
        efficiency=profile.efficiency.value,
        compute_capability=capability.value if capability else None,
        sources={key: value.source for key, value in profile if isinstance(value, _Figure | _Fraction)},
        convolution_flops=figure("convolution_flops", _parse_flops, None),
        half_flops=figure("half_flops", _parse_flops, None),
        overhead_s=figure("overhead", _parse_duration, 0.0),
    )
    if not problems and card.available_bytes <= 0:
        problems.append("reserve.value: must be smaller than the capacity")
    if problems:
        raise ProblemsError(str(path), problems)
    return card


def parse_capability(text: str) -> tuple[int, int]:
    """CUDA's compute capability as numbers that compare.

    >>> parse_capability("8.6") < parse_capability("12.0")
    True
    """
    match = re.fullmatch(r"\s*([0-9]+)\.([0-9]+)\s*", text)
    if not match:
        raise InputError(f"a compute capability must be MAJOR.MINOR, got {text!r}; try 8.6")
    return int(match[1]), int(match[2])


def _parse_flops(text: str) -> float:
    """Operations per second.

    >>> _parse_flops("6.5 TFLOP/s")
    6500000000000.0
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([GT])FLOP/s\s*", text)
    if not match or float(match[1]) == 0:
        raise InputError(f"a rate of operations must be a number of GFLOP/s or TFLOP/s, got {text!r}; try 6.5 TFLOP/s")
    return float(match[1]) * {"G": 1e9, "T": 1e12}[match[2]]


def _parse_rate(text: str) -> float:
    """Bytes per second.

    >>> _parse_rate("256 GB/s")
    256000000000.0
    """
    size, slash, unit = text.partition("/")
    if not slash or unit.strip() != "s":
        raise InputError(f"a rate must be a size per second, got {text!r}; try 256 GB/s")
    return float(parse_bytes(size))


def _parse_duration(text: str) -> float:
    """Seconds.

    >>> _parse_duration("5 us")
    5e-06
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(us|ms)\s*", text)
    if not match:
        raise InputError(f"a duration must be a number of us (microseconds) or ms, got {text!r}; try 5 us")
    return float(match[1]) / {"us": 1e6, "ms": 1e3}[match[2]]
