"""What one training step costs, before it runs: a timeline of allocations, and costs by segment for the planner."""

from memseg.profiling.costs import model_costs
from memseg.profiling.jobs.data_parallel import DataParallel
from memseg.profiling.jobs.foreign import foreign_job
from memseg.profiling.jobs.job import Job, named_optimizer
from memseg.profiling.jobs.segmented import measure_step, profile_step, segmented_job
from memseg.profiling.measure import measure_job, watch_allocator
from memseg.profiling.step import StepProfile, UntraceableError, trace_job
from memseg.profiling.timeline import Allocation, Category, LayerRow, Phase, Timeline

__all__ = [
    "Allocation",
    "Category",
    "DataParallel",
    "Job",
    "LayerRow",
    "Phase",
    "StepProfile",
    "Timeline",
    "UntraceableError",
    "foreign_job",
    "measure_job",
    "measure_step",
    "model_costs",
    "named_optimizer",
    "profile_step",
    "segmented_job",
    "trace_job",
    "watch_allocator",
]
