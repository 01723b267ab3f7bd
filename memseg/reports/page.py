"""The profile of a training step as one HTML page, to look around in and to hand on.

A table tells what is large, a picture when; who must make a step fit wants both at once, and for every instant what is
alive and who made it. So the page gets the whole timeline and draws it in the browser. It is one file that asks nothing
of the network: styles and scripts are in it, and its content security policy lets nothing else run or load. Names of
layers may be anything; they are data in it, never markup.

The timeline is embedded in columns. Many allocations are alike but for their time, and first and steady step are alike
but for few; so what they have in common is a kind, told once, and an allocation its kind, the distance from the birth
before, and how long it lives. A step of 30 000 allocations takes less than 2 MB.
"""

from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import memseg
from memseg.files import replace_file
from memseg.levels import Recompute
from memseg.profiling.alive import removing_level
from memseg.profiling.timeline import Allocation, Category, Phase, Timeline
from memseg.reports.colours import CATEGORY_COLOURS, ink_on
from memseg.reports.phases import phase_spans
from memseg.reports.profile import MODEL_ITSELF, ProfileReport, ProfileRow
from memseg.reports.profile_view import measured_line, verdict_line
from memseg.reports.single_file import single_file
from memseg.units import format_bytes, format_seconds

_SCRIPTS = ("units", "dom", "step", "curve", "treemap", "tables", "layers", "main")
"""One script in this order."""
_CATEGORIES = list(CATEGORY_COLOURS)
_COMPUTED = {Category.AUTOCAST, Category.SAVED, Category.TEMPORARY, Category.WORKSPACE}
"""What no layer made of these, the model itself did; the others are there without being computed."""
_PHASES = list(Phase)
_LEVELS = list(Recompute)
_NONE = -1
"""As an index: there is none."""


def save_profile_page(report: ProfileReport, path: Path) -> None:
    """Write the page.

    Raises:
        OSError: the file cannot be written.
    """
    replace_file(path, profile_page(report))


def profile_page(report: ProfileReport) -> str:
    """The page, as HTML that needs nothing beside it."""
    title = f"{report.profile.model}, memseg profile"
    return single_file("profile", scripts=_SCRIPTS, title=title, data=_page_object(report))


def _page_object(report: ProfileReport) -> dict[str, Any]:
    """What the scripts read, once; `kinds`, `rows` and the steps are columns."""
    profile, card = report.profile, report.card
    timelines = {"steady step": profile.timeline}
    if profile.first_timeline != profile.timeline:
        timelines["first step"] = profile.first_timeline
    kinds = _Kinds(report)
    steps = [_step_object(name, timeline, kinds) for name, timeline in timelines.items()]
    found: dict[str, Any] = {
        "model": profile.model,
        "headline": report.headline(),
        "figures": _figures(report),
        "categories": [
            {"name": category, "colour": colour, "ink": ink_on(colour), "isComputed": category in _COMPUTED}
            for category, colour in CATEGORY_COLOURS.items()
        ],
        "modelItself": MODEL_ITSELF,
        "phases": _PHASES,
        "levels": _LEVELS,
        "steps": steps,
        "largestStep": int(report.is_first_step),
        **kinds.as_object(),
        "rows": _columns(report.rows(depth=None)),
        "notes": (
            f"Times are estimates from the rates that memseg cards {card.name} shows; about "
            f"{format_seconds(report.step_s)} a step. memseg {memseg.__version__}"
        ),
    }
    if report.judge_fit:
        found["verdict"] = {"fits": report.fits, "text": verdict_line(report)}
        label = f"{card.name} has {format_bytes(card.available_bytes)}"
        found["limit"] = {"size": card.available_bytes, "label": label}
    return found


def _figures(report: ProfileReport) -> list[dict[str, str]]:
    """What is told in large letters: the figures that are mistaken for one another, apart."""
    profile, memory = report.profile, report.memory
    tensors = report.timeline.peak_allocated_bytes
    allocated = f"in {report.peak_moment}"
    if memory.peak_allocated_bytes != tensors:
        allocated += f"; tensors and workspaces are {format_bytes(tensors)} of it, the rest is rounding and cuBLAS"
    found = [("Allocated peak", memory.peak_allocated_bytes, allocated)]
    if memory.peak_reserved_bytes is not None:
        more = memory.peak_reserved_bytes - memory.peak_allocated_bytes
        reserved = f"what the allocator takes from the driver: {format_bytes(more)} more than is ever allocated"
        found.append(("Reserved peak", memory.peak_reserved_bytes, reserved))
    if memory.device_total_bytes is not None:
        beside = [f"{one.name} {format_bytes(one.size_bytes)}" for one in memory.terms if not one.in_allocator]
        device = f"what nvidia-smi shows; with {', '.join(beside)}" if beside else "what nvidia-smi shows"
        found.append(("Device total", memory.device_total_bytes, device))
    if profile.first_timeline != profile.timeline:
        first, steady = profile.first_timeline.peak_allocated_bytes, profile.timeline.peak_allocated_bytes
        note = f"peak of its tensors and workspaces; in every later step {format_bytes(steady)}"
        found.append(("First step", first, note))
    if report.measured_bytes is not None:
        found.append(("Measured", report.measured_bytes, measured_line(tensors, report.measured_bytes)))
    return [{"name": name, "value": format_bytes(size), "note": note} for name, size, note in found]


class _Names:
    """Texts and their indices."""

    def __init__(self) -> None:
        self.index: defaultdict[str, int] = defaultdict(lambda: len(self.index))

    def __getitem__(self, name: str) -> int:
        return self.index[name]


class _Kind(NamedTuple):
    """What allocations can have in common; all but the size are indices."""

    size: int
    category: int
    layer: int
    operation: int
    tensor: int
    reader_phase: int
    reader_layer: int
    level: int
    """The lowest at which it is not kept."""


class _Kinds:
    """The kinds of allocations of a report, collected while its steps are written."""

    def __init__(self, report: ProfileReport) -> None:
        self._levels = report.profile.levels
        self._layers, self._operations, self._tensors = _Names(), _Names(), _Names()
        self._index: defaultdict[_Kind, int] = defaultdict(lambda: len(self._index))

    def index(self, one: Allocation) -> int:
        level = removing_level(one, self._levels)
        kind = _Kind(
            one.size_bytes,
            _CATEGORIES.index(one.category),
            self._layers[one.layer],
            self._operations[one.operation],
            self._tensors[_tensor_text(one)],
            _PHASES.index(one.reader[0]) if one.reader else _NONE,
            self._layers[one.reader[1]] if one.reader else _NONE,
            _LEVELS.index(level) if level else _NONE,
        )
        return self._index[kind]

    def as_object(self) -> dict[str, Any]:
        columns = zip(_Kind._fields, zip(*self._index, strict=True), strict=True)
        return {
            "kinds": dict(columns),
            "layers": list(self._layers.index),
            "operations": list(self._operations.index),
            "tensors": list(self._tensors.index),
        }


def _tensor_text(one: Allocation) -> str:
    """As "float32 2x64x512x1024"; "" where it was made for no tensor."""
    return f"{one.dtype} {'x'.join(map(str, one.shape)) or 'scalar'}" if one.dtype else ""


def _step_object(name: str, timeline: Timeline, kinds: _Kinds) -> dict[str, Any]:
    in_order = sorted(timeline.allocations, key=lambda one: one.born)
    born = [one.born for one in in_order]
    phase, layer = timeline.peak_moment
    return {
        "name": name,
        "instants": timeline.instants,
        "spans": phase_spans(timeline),
        "peak": timeline.peak_instant,
        "peakMoment": f"{phase} of {layer}" if layer else phase,
        "kind": [kinds.index(one) for one in in_order],
        "born": [later - earlier for earlier, later in zip([0, *born], born, strict=False)],
        "life": [one.died - one.born for one in in_order],
    }


def _columns(rows: list[ProfileRow]) -> dict[str, list[Any]]:
    return {
        field.name.removesuffix("_bytes").removesuffix("_s"): [getattr(row, field.name) for row in rows]
        for field in fields(ProfileRow)
    }
