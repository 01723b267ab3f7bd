"""What one training step costs, before it runs: a timeline of allocations, and costs by segment for the planner."""

from memseg.profiling.costs import model_costs
from memseg.profiling.measure import measure_step, watch_allocator
from memseg.profiling.step import StepProfile, profile_step
from memseg.profiling.timeline import Allocation, Category, LayerRow, Phase, Timeline

__all__ = [
    "Allocation",
    "Category",
    "LayerRow",
    "Phase",
    "StepProfile",
    "Timeline",
    "measure_step",
    "model_costs",
    "profile_step",
    "watch_allocator",
]
