"""A plan carried out on processes: one per card."""

from memseg.running.launch import end_with_parent, launch
from memseg.running.limits import is_out_of_memory, lift_memory_limit, limit_memory
from memseg.running.pipeline import PipelineRunner
from memseg.running.runner import Runner, SingleRunner

__all__ = [
    "PipelineRunner",
    "Runner",
    "SingleRunner",
    "end_with_parent",
    "is_out_of_memory",
    "launch",
    "lift_memory_limit",
    "limit_memory",
]
