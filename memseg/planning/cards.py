"""The cards that a list names: known ones, a user's own, those of this machine.

A plan is made on a machine without the cards it is for, so their figures must come from somewhere: one TOML file per
card, each figure beside the document it was taken from. Users describe their own card in the same form. What a card
keeps back (`reserve`) is the only safety margin in memseg; predictions are never padded.

    title = "NVIDIA GeForce GTX 1070"
    kind = "cuda"

    [capacity]
    value = "7.93 GiB"
    source = "total capacity in PyTorch's out-of-memory message"

and so on for each of `reserve`, `flops`, `bandwidth`, `link`, `efficiency` and, for CUDA, `compute_capability`. Where
the driver calls the product otherwise than the title does, `products` lists its names.
"""

import os
import re
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError

from memseg.errors import InputError, ProblemsError, UnknownNameError
from memseg.planning.card import Card, parse_capability
from memseg.planning.local_cards import HERE, local_card, read_local_figures
from memseg.planning.strict import StrictModel, field_names, problem_lines
from memseg.resources import shipped_folder
from memseg.units import format_bytes, parse_bytes

__all__ = ["Card", "known_cards", "load_card", "local_cards", "parse_capability", "parse_card", "parse_cards"]

Value = TypeVar("Value")


class _Figure(StrictModel):
    value: str
    """A number with its unit."""
    source: str = Field(min_length=10)
    """The document, message or command that it was taken from."""


class _Fraction(StrictModel):
    value: float = Field(gt=0, le=1)
    source: str = Field(min_length=10)


class _Names(StrictModel):
    value: list[str] = Field(min_length=1)
    """Whole names, as NVML, nvidia-smi and torch tell them."""
    source: str = Field(min_length=10)


class _Profile(StrictModel):
    title: str = Field(min_length=1)
    kind: Literal["cuda", "cpu"]
    products: _Names | None = None
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
    ['rtx2060', 'rtx3070']
    """
    return tuple(sorted(_shipped().values(), key=lambda card: (card.available_bytes, card.name)))


def local_cards() -> tuple[Card, ...]:
    """Every CUDA card of this machine, also those that other processes have filled; named here:0, here:1 and so on.

    Raises:
        InputError: there is none, or one of them cannot be described.
    """
    figures = read_local_figures(os.environ.get("CUDA_VISIBLE_DEVICES"))
    return tuple(local_card(one, index, _shipped().values()) for index, one in enumerate(figures))


def parse_cards(text: str) -> tuple[Card, ...]:
    """The cards that a comma-separated list names.

    Each is the name of a shipped profile, the path of a TOML file like those, or here:0, the first CUDA card of this
    machine; it may be followed by a colon and the size of its memory. `here` stands for all cards of this machine.
    A card may be repeated, or have its number before it: 2*gtx1070.

    Raises:
        UnknownNameError: neither a known card nor a TOML file.
        ProblemsError: the TOML file does not describe a card.
        InputError: nothing named, a number or a size that is none, a size that leaves nothing beside the reserve, or
            cards of this machine that are not there, cannot be described, are full, or are named twice.

    >>> [card.title for card in parse_cards("gtx1070,titanx")]
    ['NVIDIA GeForce GTX 1070', 'NVIDIA Titan X (Pascal)']
    >>> parse_cards("cpu:8GiB")[0].capacity_bytes
    8589934592
    >>> [card.name for card in parse_cards("2*gtx1070, titanx")]
    ['gtx1070', 'gtx1070', 'titanx']
    """
    entries = [part.strip() for part in text.split(",")]
    if not all(entries):
        raise InputError(
            f"cards must be names joined by commas, got {text!r}; try gtx1070,titanx or 2*gtx1070 or cpu:8GiB, or here "
            "for the cards of this machine"
        )
    cards = tuple(card for entry in entries for card in _parse_entry(entry))
    local = Counter(match[0] for card in cards if (match := _LOCAL.match(card.name)))
    twice = [name for name, count in local.items() if count > 1]
    if twice:
        raise InputError(f"{', '.join(twice)}: a card of this machine must be named once, got {text!r}")
    return cards


def parse_card(text: str) -> Card:
    """The one card that a plan names.

    Raises:
        InputError: it names several, or as `parse_cards`.
    """
    cards = parse_cards(text)
    if len(cards) > 1:
        raise InputError(f"each card of a plan must be one card, got {text!r}; make a new plan: memseg plan")
    return cards[0]


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


def _parse_entry(entry: str) -> tuple[Card, ...]:
    """All the cards that one part of a list stands for."""
    count, star, name = (part.strip() for part in entry.rpartition("*"))
    if star and not re.fullmatch("[1-9][0-9]{0,2}", count):
        raise InputError(
            f"{entry}: the number before a card must be a whole one from 1 to 999, got {count!r}; try 2*gtx1070"
        )
    if name == HERE:
        cards = tuple(_sized(card, card.name, None) for card in local_cards())
    elif name.startswith(f"{HERE}:"):
        cards = (_parse_local(name),)
    else:
        base, colon, size = name.rpartition(":") if ":" in name else (name, "", "")
        cards = (_sized(_profiled(base), name, size if colon else None),)
    return cards * int(count or 1)


_LOCAL = re.compile(rf"{HERE}:(0|[1-9][0-9]*)")


def _parse_local(name: str) -> Card:
    """One card of this machine: here:0, or with a size here:0:6GiB."""
    match = re.fullmatch(rf"{_LOCAL.pattern}(?::(.+))?", name)
    if not match:
        raise InputError(f"{name}: cards of this machine are here (all of them), here:0 (the first) or here:0:6GiB")
    index = int(match[1])
    figures = read_local_figures(os.environ.get("CUDA_VISIBLE_DEVICES"))
    if index >= len(figures):
        raise InputError(
            f"{name}: the cards of this machine are here:0 to here:{len(figures) - 1}; memseg cards here lists them"
        )
    return _sized(local_card(figures[index], index, _shipped().values()), name, match[2])


def _profiled(base: str) -> Card:
    if base.endswith(".toml"):
        return load_card(Path(base))
    try:
        return _shipped()[base]
    except KeyError:
        hint = "(a card of your own is a TOML file: cards/mine.toml; here stands for the cards of this machine)"
        raise UnknownNameError("card", base, _shipped(), hint) from None


def _sized(card: Card, name: str, size: str | None) -> Card:
    """`card` under the name that the user gave it, and with the size if one was given."""
    try:
        capacity = card.capacity_bytes if size is None else parse_bytes(size)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    if capacity <= card.reserve_bytes:
        held = f", {format_bytes(card.used_bytes)} of it held by other processes" if card.used_bytes else ""
        raise InputError(
            f"{name}: a card must be larger than what it keeps back, {format_bytes(card.reserve_bytes)}{held}, "
            f"got {format_bytes(capacity)}"
        )
    sources = card.sources if size is None else {**card.sources, "capacity": "given by the user"}
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
        products=tuple(profile.products.value) if profile.products else (profile.title,),
    )
    if not problems and card.available_bytes <= 0:
        problems.append("reserve.value: must be smaller than the capacity")
    if problems:
        raise ProblemsError(str(path), problems)
    return card


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
