"""What a change did: two profiles side by side, as values.

Whoever drops activations, halves a precision or exchanges a block has a profile from before and one from after. Two
long tables do not tell which lines moved. `Comparison` pairs what the two have in common, finds the layers that only
one of them has, and orders all by how much changed; `comparison_view` and `comparison_picture` show it.

The profiles come from files that `memseg profile --json` wrote, perhaps weeks ago. They are read strictly: half a
file, another program's or one of an older form is refused with what it lacks, for zeros in place of what is missing
would look like savings.
"""

import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, JsonValue, ValidationError, model_validator

from memseg.errors import InputError
from memseg.planning.strict import StrictModel, field_names, problem_lines

Bytes = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Amount = int | float
"""Bytes, which are whole, or seconds."""

_ROUNDING = 1e-9
"""Share by which times differ when only the order of a sum does."""
_FIGURE_ENDINGS = ("_bytes", "_seconds")
"""A key with these is never a setting."""


class StoredLayer(StrictModel):
    """A layer of a stored profile; the keys are those of `ProfileRow`."""

    name: str = Field(min_length=1)
    saved_bytes: Bytes
    peak_bytes: Bytes
    parameter_bytes: Bytes
    forward_s: Seconds
    backward_s: Seconds
    flops: int = Field(ge=0)
    moved_bytes: Bytes


class StoredTerm(StrictModel):
    """Something on the card beside tensors; more may be told of it."""

    model_config = ConfigDict(extra="ignore")

    name: str
    size_bytes: Bytes


class StoredBeyond(StrictModel):
    """What a CUDA card holds beside tensors; more may be told of it."""

    model_config = ConfigDict(extra="ignore")

    terms: tuple[StoredTerm, ...]
    reserved_but_not_allocated_bytes: Bytes
    segments: int = Field(ge=0)


class StoredProfile(StrictModel):
    """What `memseg profile --json` printed. Keys that are named nowhere here are settings of the step."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    model: str
    precision: str
    device: str
    card: str
    peak_allocated_bytes: Bytes
    peak_reserved_bytes: Bytes | None
    device_total_bytes: Bytes | None
    peak_tensor_bytes: Bytes
    peak_moment: str
    first_step_peak_bytes: Bytes
    steady_step_peak_bytes: Bytes
    step_seconds: Seconds
    uncounted: tuple[str, ...] = ()
    fits: bool = True
    by_category: dict[str, Bytes]
    layers: tuple[StoredLayer, ...] = Field(min_length=1)
    alive_at_peak: tuple[dict[str, JsonValue], ...]
    beyond_tensors: StoredBeyond | None = None
    """None on the CPU."""
    measured_peak_allocated_bytes: Bytes | None = None
    """None where nothing was measured."""

    @model_validator(mode="after")
    def _check(self) -> "StoredProfile":
        problems = [
            f"{name}: unknown key" for name, value in self.__pydantic_extra__.items() if not _is_setting(name, value)
        ]
        counts = Counter(layer.name for layer in self.layers)
        problems += [f"layers: {name} is there twice" for name, count in counts.items() if count > 1]
        if sum(self.by_category.values()) != self.peak_tensor_bytes:
            problems.append("by_category: must add up to peak_tensor_bytes")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """What the step was asked to be, and for which card."""
        last = {"precision": self.precision, "device": self.device, "card": self.card}
        return {"model": self.model, **self.__pydantic_extra__, **last}

    @property
    def depth(self) -> int:
        """How many names deep its layers are told."""
        return max(layer.name.count(".") + 1 for layer in self.layers)

    def layers_to(self, depth: int) -> dict[str, StoredLayer]:
        """Layers by name, those that lie deeper added to the layer that holds them."""
        found: dict[str, list[StoredLayer]] = {}
        for layer in self.layers:
            found.setdefault(".".join(layer.name.split(".")[:depth]), []).append(layer)
        return {name: parts[0] if len(parts) == 1 else _sum(name, parts) for name, parts in found.items()}


def load_profile(path: Path) -> StoredProfile:
    """The profile in a file that `memseg profile --json` wrote.

    Raises:
        InputError: no such file, or not a whole profile of today's form; what is wrong with it is told, and how to
            make a new one.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise _not_a_profile(path, [f"cannot be read: {error.strerror}"], {}) from None
    except UnicodeDecodeError:
        raise _not_a_profile(path, ["must be text in UTF-8"], {}) from None
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        what = f"must be one whole JSON object, but: {error}" if text.strip() else "the file is empty"
        raise _not_a_profile(path, [what], {}) from None
    if not isinstance(content, dict):
        raise _not_a_profile(path, [f"must be one JSON object, got {type(content).__name__}"], {})
    try:
        return StoredProfile.model_validate_json(text.encode())
    except ValidationError as error:
        raise _not_a_profile(path, _problems(error), content) from None


def _problems(error: ValidationError) -> list[str]:
    """What is missing in one line, then the rest."""
    known = field_names(StoredProfile, StoredLayer, StoredTerm, StoredBeyond)
    lines = [line.removeprefix("the whole file: ") for line in problem_lines(error, known)]
    lacking = [line.removesuffix(": missing") for line in lines if line.endswith(": missing")]
    # A list lacks the same in each of its objects: the first is enough.
    lacking = [name for name in lacking if not name.startswith("layers.") or name.startswith("layers.0.")]
    others = [line for line in lines if not line.endswith(": missing")]
    shown = others[:_MOST_PROBLEMS]
    if len(others) > len(shown):
        shown.append(f"and {len(others) - len(shown)} more")
    return [*([f"missing: {', '.join(lacking)}"] if lacking else []), *shown]


_MOST_PROBLEMS = 5


def _not_a_profile(path: Path, problems: Sequence[str], content: Mapping[str, Any]) -> InputError:
    words = ["memseg", "profile", "MODEL"]
    if isinstance(content.get("model"), str) and content["model"]:
        words[2] = content["model"]
        for name in ("image", "batch", "precision", "card"):
            if isinstance(content.get(name), str | int):
                words += [f"--{name}", str(content[name])]
    command = f"{shlex.join([*words, '--json'])} > {shlex.quote(str(path))}"
    return InputError("\n  ".join([f"{path}: not a profile; make a new one: {command}", *problems]))


def _is_setting(name: str, value: JsonValue) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return not name.endswith(_FIGURE_ENDINGS) and not any(isinstance(one, dict | list) for one in inner)


def _sum(name: str, parts: Sequence[StoredLayer]) -> StoredLayer:
    return StoredLayer(
        name=name,
        saved_bytes=sum(one.saved_bytes for one in parts),
        peak_bytes=max(one.peak_bytes for one in parts),
        parameter_bytes=sum(one.parameter_bytes for one in parts),
        forward_s=sum(one.forward_s for one in parts),
        backward_s=sum(one.backward_s for one in parts),
        flops=sum(one.flops for one in parts),
        moved_bytes=sum(one.moved_bytes for one in parts),
    )


class Measure(StrEnum):
    """What is compared of a layer."""

    SAVED = "saved"
    PEAK = "peak"
    """The most that is allocated, by everybody, while it works: the only one that does not add up over layers."""
    PARAMETERS = "parameters"
    TIME = "time"
    """Of forward and backward."""


class Order(StrEnum):
    """By what layers are sorted."""

    CHANGE = "change"
    """By their largest change in anything."""
    AS_RUN = "order"
    SAVED = "saved"
    PEAK = "peak"
    PARAMETERS = "parameters"
    TIME = "time"


_AMOUNT_OF: Mapping[Measure, Callable[[StoredLayer], Amount]] = {
    Measure.SAVED: lambda layer: layer.saved_bytes,
    Measure.PEAK: lambda layer: layer.peak_bytes,
    Measure.PARAMETERS: lambda layer: layer.parameter_bytes,
    Measure.TIME: lambda layer: layer.forward_s + layer.backward_s,
}


@dataclass(frozen=True)
class Change:
    """One figure before and after.

    >>> change = Change(8, 6)
    >>> change.difference, change.percent, change.differs
    (-2, -25.0, True)
    """

    before: Amount | None
    """None: not known."""
    after: Amount | None

    @property
    def difference(self) -> Amount | None:
        """What was added; None where one of them is not known."""
        if self.before is None or self.after is None:
            return None
        return self.after - self.before if self.differs else 0

    @property
    def percent(self) -> float | None:
        """The difference in percent of what was before; None where that is nothing or not known."""
        return None if self.difference is None or not self.before else 100 * self.difference / self.before

    @property
    def differs(self) -> bool:
        """Whether they are not the same, roundings of times apart."""
        if self.before is None or self.after is None:
            return self.before is not self.after
        return abs(self.after - self.before) > _ROUNDING * max(self.before, self.after)

    @property
    def size(self) -> Amount:
        """How much changed, in either direction; 0 where it is not known."""
        return abs(self.difference or 0)


@dataclass(frozen=True)
class LayerChange:
    """A layer before and after; figures of one that is not there are 0."""

    name: str
    only_in: Literal["before", "after"] | None
    """None where both profiles have it."""
    changes: Mapping[Measure, Change]
    has_parts: bool = False
    """Whether layers inside it are told apart from it, so that the figures are only its own."""

    @property
    def differs(self) -> bool:
        """Whether anything of it is not the same."""
        return self.only_in is not None or any(change.differs for change in self.changes.values())


@dataclass(frozen=True)
class Comparison:
    """Two profiles."""

    before: StoredProfile
    after: StoredProfile

    @cached_property
    def settings(self) -> dict[str, tuple[Any, Any]]:
        """Settings that are not the same: before and after, None where there is none.

        Of levels by segment, those that changed are told one by one.
        """
        before, after = self.before.settings, self.after.settings
        found: dict[str, tuple[Any, Any]] = {}
        for name in {**before, **after}:
            old, new = before.get(name), after.get(name)
            if isinstance(old, dict) and isinstance(new, dict):
                inner = {key: (old.get(key), new.get(key)) for key in {**old, **new}}
                found.update({f"{name} {key}": pair for key, pair in inner.items() if pair[0] != pair[1]})
            elif old != new:
                found[name] = (old, new)
        return found

    @property
    def same_settings(self) -> dict[str, Any]:
        """Settings that both have, with one value."""
        after = self.after.settings
        return {name: value for name, value in self.before.settings.items() if name in after and after[name] == value}

    @cached_property
    def figures(self) -> dict[str, Change]:
        """Of the whole step, by key of the JSON; those that neither profile knows are left out."""
        names = [
            "peak_allocated_bytes",
            "peak_reserved_bytes",
            "device_total_bytes",
            "peak_tensor_bytes",
            "first_step_peak_bytes",
            "steady_step_peak_bytes",
            "measured_peak_allocated_bytes",
            "step_seconds",
        ]
        found = {name: Change(getattr(self.before, name), getattr(self.after, name)) for name in names}
        found["reserved_but_not_allocated_bytes"] = Change(_unallocated(self.before), _unallocated(self.after))
        return {name: one for name, one in found.items() if (one.before, one.after) != (None, None)}

    @cached_property
    def beyond(self) -> dict[str, Change]:
        """What the card holds beside tensors, by name; empty where neither card is CUDA's."""
        terms = [
            {term.name: term.size_bytes for term in one.beyond_tensors.terms} if one.beyond_tensors else None
            for one in (self.before, self.after)
        ]
        names = {name: None for one in terms for name in one or {}}
        old, new = ([None if one is None else one.get(name, 0) for name in names] for one in terms)
        return {name: Change(*pair) for name, *pair in zip(names, old, new, strict=True)}

    @cached_property
    def categories(self) -> dict[str, Change]:
        """Of the peak, by what the bytes are for; what neither has is left out."""
        before, after = self.before.by_category, self.after.by_category
        found = {name: Change(before.get(name, 0), after.get(name, 0)) for name in {**before, **after}}
        return {name: change for name, change in found.items() if change.before or change.after}

    @cached_property
    def layers(self) -> tuple[LayerChange, ...]:
        """As they run; one that only the later profile has stands after what it follows there."""
        before, after = self.before.layers_to(self._depth), self.after.layers_to(self._depth)
        found = []
        names = merged(list(before), list(after))
        holders = {name[:index] for name in names for index, letter in enumerate(name) if letter == "."}
        for name in names:
            old, new = before.get(name), after.get(name)
            changes = {
                measure: Change(amount(old) if old else 0, amount(new) if new else 0)
                for measure, amount in _AMOUNT_OF.items()
            }
            only_in: Literal["before", "after"] | None = "before" if new is None else "after" if old is None else None
            found.append(LayerChange(name, only_in, changes, name in holders))
        return tuple(found)

    @property
    def notes(self) -> list[str]:
        """What a reader must know to read the figures."""
        notes = []
        depths = self.before.depth, self.after.depth
        if depths[0] != depths[1]:
            words = [f"{depth} name{'s' if depth > 1 else ''} deep" for depth in depths]
            notes.append(
                f"layers are told {words[0]} before and {words[1]} after; the deeper ones are added up here. "
                "For all of them, profile both at the same --depth"
            )
        if self.before.card != self.after.card:
            notes.append(f"times are estimates for {self.before.card} before and for {self.after.card} after")
        return notes

    @cached_property
    def differs(self) -> bool:
        """Whether anything is not the same."""
        changes = [*self.figures.values(), *self.beyond.values(), *self.categories.values()]
        is_other = any(change.differs for change in changes) or any(layer.differs for layer in self.layers)
        return bool(self.settings) or is_other

    def total(self, measure: Measure) -> Change:
        """Of all layers: the sum, and of peaks the largest."""
        changes = [layer.changes[measure] for layer in self.layers]
        add = max if measure is Measure.PEAK else sum
        return Change(add(one.before or 0 for one in changes), add(one.after or 0 for one in changes))

    def sorted_layers(self, order: Order = Order.CHANGE) -> list[LayerChange]:
        """All layers; those that changed most come first, and those that changed alike as they run."""
        if order is Order.AS_RUN:
            return list(self.layers)
        if order is not Order.CHANGE:
            measure = Measure(order.value)
            return sorted(self.layers, key=lambda layer: -layer.changes[measure].size)
        # A peak is everybody's: where much is saved, it falls in all layers. So it decides only between equals.
        totals = {measure: self.total(measure) for measure in Measure}

        def share(layer: LayerChange, measure: Measure) -> float:
            whole = max(totals[measure].before or 0, totals[measure].after or 0)
            return layer.changes[measure].size / whole if whole else 0.0

        own = [measure for measure in Measure if measure is not Measure.PEAK]
        return sorted(
            self.layers,
            key=lambda layer: (-max(share(layer, measure) for measure in own), -share(layer, Measure.PEAK)),
        )

    @property
    def _depth(self) -> int:
        return min(self.before.depth, self.after.depth)


def _unallocated(profile: StoredProfile) -> int | None:
    return profile.beyond_tensors.reserved_but_not_allocated_bytes if profile.beyond_tensors else None


def merged(before: Iterable[str], after: Iterable[str]) -> list[str]:
    """All names in the order of `before`; a new one stands after what it follows in `after`.

    >>> merged(["stem", "block1", "logits"], ["stem", "attention", "block1", "loss"])
    ['stem', 'attention', 'block1', 'loss', 'logits']
    """
    names = list(before)
    place = 0
    for name in after:
        if name in names:
            place = names.index(name) + 1
        else:
            names.insert(place, name)
            place += 1
    return names


def comparison_object(comparison: Comparison, layers: Sequence[LayerChange]) -> dict[str, Any]:
    """The comparison for programs: bytes are integers, times seconds.

    Args:
        comparison: To tell.
        layers: Of it, in order.
    """
    return {
        "differs": comparison.differs,
        "settings": {name: {"before": old, "after": new} for name, (old, new) in comparison.settings.items()},
        "same_settings": comparison.same_settings,
        "peak_moment": {"before": comparison.before.peak_moment, "after": comparison.after.peak_moment},
        **{name: _change_object(change) for name, change in comparison.figures.items()},
        "beyond_tensors": {name: _change_object(change) for name, change in comparison.beyond.items()},
        "by_category": {name: _change_object(change) for name, change in comparison.categories.items()},
        "layers": [
            {
                "name": layer.name,
                "only_in": layer.only_in,
                **{_LAYER_KEYS[measure]: _change_object(change) for measure, change in layer.changes.items()},
            }
            for layer in layers
        ],
        "notes": comparison.notes,
    }


_LAYER_KEYS = {
    Measure.SAVED: "saved_bytes",
    Measure.PEAK: "peak_bytes",
    Measure.PARAMETERS: "parameter_bytes",
    Measure.TIME: "seconds",
}


def _change_object(change: Change) -> dict[str, Any]:
    return {
        "before": change.before,
        "after": change.after,
        "difference": change.difference,
        "percent": change.percent,
    }
