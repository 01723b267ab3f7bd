"""A profile as a recording for PyTorch's own memory visualizer."""

from pathlib import Path

from memseg.profiling.allocator.replay import Event
from memseg.profiling.allocator.settings import AllocatorSettings
from memseg.profiling.allocator.snapshot import write_snapshot
from memseg.profiling.card_memory import named_events
from memseg.profiling.timeline import Allocation
from memseg.reports.profile import MODEL_ITSELF, ProfileReport

_TORCH_FRAMES = "operator", "layer", "phase", "category"


def save_recording(report: ProfileReport, path: Path, settings: AllocatorSettings | None = None) -> None:
    """Write a first step and two more as `torch.cuda.memory._dump_snapshot` would have recorded them.

    Args:
        report: Of a step on a CUDA card.
        path: Of the pickle; `python -m torch.cuda._memory_viz trace_plot PATH` and pytorch.org/memory_viz open it.
        settings: Of the allocator.

    Raises:
        OSError: the file cannot be written.
    """
    workspaces = [term.size_bytes for term in report.memory.terms if term.in_allocator]
    events: list[Event] = []
    names: dict[int, dict[str, str]] = {}
    for event, allocation in named_events(report.profile, workspaces):
        events.append(event)
        names[event.key] = _names(allocation)
    write_snapshot(events, path, names, settings)


def _names(one: Allocation | None) -> dict[str, str]:
    if one is None:
        return {"operator": "cuBLAS workspace", "category": "workspace"}
    names = one.operation or "-", one.layer or MODEL_ITSELF, str(one.phase), str(one.category)
    return dict(zip(_TORCH_FRAMES, names, strict=True))
