"""A plan carried out on processes: one per card."""

from memseg.running.grid import Grid
from memseg.running.launch import Nodes, end_with_parent, launch
from memseg.running.limits import is_out_of_memory, lift_memory_limit, limit_memory
from memseg.running.mean_loss import MeanLoss
from memseg.running.pipeline import PipelineRunner
from memseg.running.runner import Batch, Runner
from memseg.running.whole import WholeRunner

__all__ = [
    "Batch",
    "Grid",
    "MeanLoss",
    "Nodes",
    "PipelineRunner",
    "Runner",
    "WholeRunner",
    "end_with_parent",
    "is_out_of_memory",
    "launch",
    "lift_memory_limit",
    "limit_memory",
]
