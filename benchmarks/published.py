"""Predicted peaks held against published ones of real GPUs.

    python -m benchmarks.prediction --published measured.tsv

measured.tsv has a row for each training run of MMSegmentation's model zoo: configuration, crop size, images on each
GPU, and the peak of torch.cuda.max_memory_allocated() on a V100, in GB with one decimal. It was taken in a run of its
own with cudnn.benchmark off, and GB is 1024 MiB: open-mmlab/mmsegmentation, issues 321, 1184 and 1215.

A row's network is built from MMSegmentation's own configuration and its step is traced as any user's is, for a CUDA
card, with DistributedDataParallel's buckets. Then the allocator is replayed: what was published counts its blocks. What
that time's PyTorch did otherwise is put in place around the trace (`benchmarks.old_torch`); nothing is fitted.

The first step and steady ones are alike here, as gradients were kept. cuBLAS took no workspace from the allocator then.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.old_torch import old_autograd
from memseg.errors import InputError
from memseg.profiling import DataParallel, foreign_job, trace_job
from memseg.profiling.allocator.replay import replay
from memseg.profiling.card_memory import training_events
from memseg.profiling.timeline import Phase
from memseg.units import GIB, parse_image

_PROCESSES = 4
_COLUMNS = {"config", "crop_size", "batch_per_gpu", "mem_GB"}


@dataclass(frozen=True)
class PublishedRun:
    """One row of the file."""

    config: str
    """Path in MMSegmentation 0.x."""
    crop_size: tuple[int, int]
    """(height, width) of the images in a batch."""
    batch_per_gpu: int
    memory_gb: float

    @property
    def name(self) -> str:
        """The configuration's file name without its suffix."""
        return Path(self.config).stem

    @property
    def peak_bytes(self) -> int:
        """As published, so within 0.05 GiB."""
        return round(self.memory_gb * GIB)


def read_runs(path: Path) -> list[PublishedRun]:
    """All rows, in order.

    Raises:
        InputError: no such file, or columns are missing.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; --published needs a table of published peaks") from None
    reader = csv.DictReader(text.splitlines(), delimiter="\t")
    if missing := _COLUMNS - set(reader.fieldnames or ()):
        raise InputError(
            f"{path}: must have the columns {', '.join(sorted(_COLUMNS))}; {', '.join(sorted(missing))} lack"
        )
    return [
        PublishedRun(row["config"], parse_image(row["crop_size"]), int(row["batch_per_gpu"]), float(row["mem_GB"]))
        for row in reader
    ]


def predicted_peaks(runs: list[PublishedRun]) -> Iterator[tuple[PublishedRun, int, tuple[Phase, str]]]:
    """Each run with the predicted peak of its allocator, bytes, and phase and layer of the peak.

    Raises:
        InputError: MMSegmentation is not installed.
    """
    try:
        from benchmarks.mmseg_networks import build_step, config_path
    except ImportError as error:
        raise InputError(
            f"--published needs MMSegmentation ({error}); pip install mmsegmentation==1.2.2 mmengine mmcv-lite==2.1.0 "
            "ftfy regex"
        ) from None
    for run in runs:
        step = build_step(config_path(run.name, run.batch_per_gpu), run.crop_size, run.batch_per_gpu)
        make = partial(
            foreign_job,
            step.module,
            (step.images, step.target),
            loss=lambda loss: loss,
            optimizer=step.optimizer,
            keep_gradients=True,
            keep_output=False,
            name=run.name,
        )
        with old_autograd():
            profile = trace_job(make, device="cuda", data_parallel=DataParallel(_PROCESSES))
        peak = replay(training_events(profile)).peak_allocated_bytes
        yield run, peak, profile.timeline.peak_moment
