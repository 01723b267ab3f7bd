"""The profile of a training step as values: for programs, for tables, for pages and pictures.

A trace holds thousands of allocations. Who is out of memory asks four things of it: what the bytes of the peak are for,
when the peak comes, which layers to do something about, and what. `ProfileReport` holds a profile with the settings it
was made for, and answers these; `profile_view`, `memory_curve` and `page` show the answers.

Times are estimates from a card's rates, not measurements: good for seeing where a step goes, not for comparing machines
to the percent.
"""

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

from memseg.planning.cards import Card
from memseg.profiling.alive import AliveTensor, alive_at_peak
from memseg.profiling.card_memory import CardMemory
from memseg.profiling.step import StepProfile
from memseg.profiling.timeline import Timeline

if TYPE_CHECKING:
    from rich.console import RenderableType

MODEL_ITSELF = "(model)"
"""What the model computes outside of its layers."""
MOST_ALIVE = 200
"""Tensors at the peak that are told to programs; thousands of small ones add nothing."""


class SortKey(StrEnum):
    """By what the table of layers is sorted: as they run, or the largest first."""

    ORDER = "order"
    PEAK = "peak"
    SAVED = "saved"
    PARAMETERS = "parameters"
    TIME = "time"


@dataclass(frozen=True)
class ProfileRow:
    """What one layer costs: a line of the table, of the CSV, an object in the JSON."""

    name: str
    saved_bytes: int
    peak_bytes: int
    """The most that is allocated, by everybody, while this layer makes something; 0 where it makes nothing."""
    parameter_bytes: int
    forward_s: float
    backward_s: float
    """With what is rebuilt."""
    flops: int = 0
    """Of forward and backward."""
    moved_bytes: int = 0
    """Read and written by forward and backward, apart from products."""


_SORT_VALUES: Mapping[SortKey, Callable[[ProfileRow], float]] = {
    SortKey.ORDER: lambda row: 0,
    SortKey.PEAK: lambda row: -row.peak_bytes,
    SortKey.SAVED: lambda row: -row.saved_bytes,
    SortKey.PARAMETERS: lambda row: -row.parameter_bytes,
    SortKey.TIME: lambda row: -(row.forward_s + row.backward_s),
}


@dataclass(frozen=True)
class ProfileReport:
    """A profile with the settings that it was made for, and what was measured beside it."""

    profile: StepProfile
    card: Card
    """Whose rates the times come from."""
    memory: CardMemory
    """On that card."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the step was asked to be, as the JSON has it: image, batch, norm, recompute, optimizer, ..."""
    judge_fit: bool = False
    """Whether to say if the peak fits the card."""
    measured_bytes: int | None = None
    """The peak of real steps, where they were run."""

    @property
    def timeline(self) -> Timeline:
        """Every allocation of the step that needs most: a steady one, or the first."""
        steady, first = self.profile.timeline, self.profile.first_timeline
        return first if first.peak_allocated_bytes > steady.peak_allocated_bytes else steady

    @property
    def is_first_step(self) -> bool:
        """Whether the first step needs the most."""
        return self.timeline is not self.profile.timeline

    @property
    def fits(self) -> bool:
        """Whether the card can run the step: its allocator gets by, and what is allocated leaves the card's reserve."""
        return self.memory.out_of_memory is None and self.memory.peak_allocated_bytes <= self.card.available_bytes

    @property
    def step_s(self) -> float:
        """Estimated seconds of the whole step, the optimizer's included."""
        return sum(self.card.seconds(work) for work in self.profile.work.values())

    @property
    def peak_moment(self) -> str:
        """Phase and layer of the peak, in words."""
        phase, layer = self.timeline.peak_moment
        step = " of the first step" if self.is_first_step else ""
        return f"{phase} of {layer}{step}" if layer else f"{phase} step{step}"

    @cached_property
    def alive(self) -> list[AliveTensor]:
        """What is alive at the peak, largest first."""
        return alive_at_peak(self.timeline, self.profile.levels)

    def __rich__(self) -> "RenderableType":
        """What `rich.print` shows."""
        from memseg.reports.profile_view import profile_view

        return profile_view(self, self.rows())

    def headline(self) -> str:
        """What was profiled, in one line."""
        parts = [self.profile.model]
        for name, value in self.settings.items():
            match name, value:
                case "image", _:
                    parts.append(value)
                case "norm", _:
                    parts.append(f"{value} norm")
                case "inputs", _:
                    parts.append(", ".join(value))
                case "card_number", _:
                    parts.append(f"card {value}")
                case "recompute", Mapping():
                    counts = Counter(value.values()).most_common()
                    parts.append("recompute " + ", ".join(f"{level} ({count})" for level, count in counts))
                case _:
                    parts.append(f"{name.replace('_', ' ')} {value}")
        return ", ".join([*parts, self.profile.precision])

    def rows(self, *, depth: int | None = 1, sort: SortKey = SortKey.ORDER) -> list[ProfileRow]:
        """The table of layers.

        Args:
            depth: 1 for segments (or the model's children) and the loss, more for the layers inside them, None for all.
            sort: By what.
        """
        rows = []
        for layer in self.profile.layers(depth):
            work = layer.forward + layer.backward
            rows.append(
                ProfileRow(
                    name=layer.row.name or MODEL_ITSELF,
                    saved_bytes=layer.row.saved_bytes,
                    peak_bytes=layer.row.peak_bytes,
                    parameter_bytes=layer.row.parameter_bytes,
                    forward_s=self.card.seconds(layer.forward),
                    backward_s=self.card.seconds(layer.backward),
                    flops=work.flops,
                    moved_bytes=work.moved_bytes,
                )
            )
        return sorted(rows, key=_SORT_VALUES[sort])


def profile_object(report: ProfileReport, rows: Iterable[ProfileRow]) -> dict[str, Any]:
    """The profile for programs: bytes are integers, times seconds."""
    profile, memory = report.profile, report.memory
    found = {
        "model": profile.model,
        **report.settings,
        "precision": profile.precision.value,
        "device": report.card.kind,
        "card": report.card.name,
        "peak_allocated_bytes": memory.peak_allocated_bytes,
        "peak_reserved_bytes": memory.peak_reserved_bytes,
        "device_total_bytes": memory.device_total_bytes,
        "fits": report.fits,
        "peak_tensor_bytes": report.timeline.peak_allocated_bytes,
        "peak_moment": report.peak_moment,
        "first_step_peak_bytes": profile.first_timeline.peak_allocated_bytes,
        "steady_step_peak_bytes": profile.timeline.peak_allocated_bytes,
        "step_seconds": report.step_s,
        "uncounted": list(profile.uncounted),
        "by_category": {category.replace(" ", "_"): size for category, size in report.timeline.by_category().items()},
        "layers": [asdict(row) for row in rows],
        "alive_at_peak": [_alive_object(one) for one in report.alive[:MOST_ALIVE]],
    }
    if memory.replay is not None:
        found["beyond_tensors"] = {
            "terms": [asdict(term) for term in memory.terms],
            "reserved_but_not_allocated_bytes": memory.unallocated_bytes,
            "segments": memory.replay.num_segments,
        }
    if report.measured_bytes is not None:
        found["measured_peak_allocated_bytes"] = report.measured_bytes
    return found


def _alive_object(one: AliveTensor) -> dict[str, Any]:
    waits_for = None if one.waits_for is None else {"phase": str(one.waits_for[0]), "layer": one.waits_for[1]}
    return {**asdict(one), "category": str(one.category), "shape": list(one.shape), "waits_for": waits_for}


def profile_csv(rows: Iterable[ProfileRow]) -> str:
    """The table of layers with a header row; bytes and seconds, unrounded.

    >>> print(profile_csv([ProfileRow("stem", 4096, 9000, 256, 0.5, 1.25, 800, 64)]), end="")
    name,saved_bytes,peak_bytes,parameter_bytes,forward_s,backward_s,flops,moved_bytes
    stem,4096,9000,256,0.5,1.25,800,64
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(ProfileRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()
