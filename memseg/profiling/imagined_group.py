"""A process group of which only this process is there: what collectives allocate, without anybody to talk to.

torch has a backend that returns from every collective at once, whatever it was given. Here it makes a group that nobody
is told of: whether the process has a default group, and which, stays as it is.
"""

import torch
from torch import distributed, nn

from memseg.nn import BatchNorm2d

_NAME = "memseg: imagined replicas"


def imagined_group(processes: int) -> "distributed.ProcessGroup":
    """A group of so many processes, this being the first; it lives as long as it is held.

    Args:
        processes: At least 1.

    What its collectives return is not computed: only shapes, and memory, are as in a real one.
    """
    # Where torch has no distributed, nobody asks for a group.
    from torch._C._distributed_c10d import FakeProcessGroup, FakeStore
    from torch.distributed.distributed_c10d import GroupName

    group = distributed.ProcessGroup(FakeStore(), 0, processes)
    backend = FakeProcessGroup._create_internal(0, processes)
    group._register_backend(torch.device("cpu"), distributed.ProcessGroup.BackendType.CUSTOM, backend)
    group._set_group_name(GroupName(_NAME))
    return group


def imagine_replicas(model: nn.Module, replicas: int) -> None:
    """Have a model's norms sync over so many processes, none of which but this one is there."""
    if replicas > 1:
        group = imagined_group(replicas)
        for module in model.modules():
            if isinstance(module, BatchNorm2d):
                module.process_group = group
