"""Who works with whom: the processes of a run as a grid of replicas and stages.

                 stage 0   stage 1
    replica 0    rank 0    rank 1     along a row: a pipeline, through which tensors travel
    replica 1    rank 2    rank 3
                    across a column: the same weights; gradients and statistics are joined

Which rank is where is the plan's business: a stage may be of any rank, as the order of processes is that of machines.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Grid:
    """The place of this process."""

    ranks: tuple[tuple[int, ...], ...]
    """The process of each stage, for each replica."""
    replica: int
    stage: int
    across: dist.ProcessGroup | None
    """This stage's processes in all replicas; None with a single replica."""
    along: dist.ProcessGroup | None
    """This replica's stages; None with a single stage."""

    @classmethod
    def of(cls, ranks: tuple[tuple[int, ...], ...], device: torch.device) -> Self:
        """The grid of an initialised default group; each of its processes makes its own at once.

        Args:
            ranks: As in a plan: all processes, each once.
            device: Of this process.
        """
        mine = dist.get_rank()
        places = {rank: (replica, stage) for replica, row in enumerate(ranks) for stage, rank in enumerate(row)}
        replica, stage = places[mine]
        across = along = None
        if len(ranks) > 1 and len(ranks[0]) > 1:
            mesh = DeviceMesh(device.type, torch.tensor(ranks), mesh_dim_names=("replica", "stage"))
            across, along = mesh.get_group("replica"), mesh.get_group("stage")
        elif len(ranks) > 1:
            across = dist.group.WORLD
        elif len(ranks[0]) > 1:
            along = dist.group.WORLD
        return cls(ranks, replica, stage, across, along)

    @property
    def replicas(self) -> int:
        """Copies of the model."""
        return len(self.ranks)

    @property
    def stages(self) -> int:
        """Parts of the model."""
        return len(self.ranks[0])

    @property
    def is_first(self) -> bool:
        """Whether the model begins here."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether the model ends here."""
        return self.stage == self.stages - 1

    def group_rank(self, stage: int) -> int:
        """The rank within `along` of a stage of this replica; groups count their processes in the order of ranks."""
        assert self.along is not None
        return dist.get_group_rank(self.along, self.ranks[self.replica][stage])
