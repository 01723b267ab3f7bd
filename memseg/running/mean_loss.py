"""The mean over all labelled pixels of a step, of which no process sees more than a part.

A step's pixels come in parts: passes that are accumulated, shares of replicas, micro-batches. Each part can take the
mean over its own pixels, but the mean of means is another number where parts differ in what is labelled, and how much
the whole step has is known only once its last image has been read. So each part's mean is weighted by

    its labelled pixels, by the weights of their classes where these have some / all pixels of the step

a constant that is known beforehand, and what has been summed up is put right once, at the end: two numbers are added up
over all processes, and the gradients, if any pixel was unlabelled, multiplied by

    all pixels of the step / labelled pixels of the step, weighted likewise

The result is the gradient of the mean over the labelled pixels of the whole step, whoever computed it.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from memseg.models.objective import Objective


class MeanLoss:
    """The loss of one part after the other, and their sum over all processes.

    Args:
        objective: The mean over the labelled pixels of one part.
        pixels: Of the whole step, labelled or not; None where a step is a single part, whose mean is the loss itself.
        replicas: Whose gradients will be averaged, where they ought to be summed.
        device: Of this process.
    """

    def __init__(self, objective: Objective, *, pixels: int | None, replicas: int, device: torch.device) -> None:
        self._objective, self._pixels, self._replicas = objective, pixels, replicas
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        """Of losses and of what pixels count, of this process's parts."""

    def __call__(self, *outputs_and_target: Tensor) -> Tensor:
        """What to run backward from, of one part: its coarse outputs, and last its target."""
        mean: Tensor = self._objective(*outputs_and_target)
        if self._pixels is None:
            self._sums += torch.stack((mean.detach().double(), torch.ones_like(self._sums[1])))
            return mean
        labelled = self._objective.divisor(outputs_and_target[-1])
        self._sums += torch.stack((mean.detach() * labelled.double(), labelled.double()))
        return mean * (labelled * (self._replicas / self._pixels)).to(mean.dtype)

    def finish(self, parameters: Iterable[nn.Parameter]) -> float:
        """The step's loss, known in every process; the gradients of `parameters` become its own.

        Every process calls it, after its last backward. Without any labelled pixel the loss is 0, and so are gradients.
        """
        if dist.get_world_size() > 1:
            dist.all_reduce(self._sums)
        loss, labelled = self._sums.tolist()
        self._sums.zero_()
        factor = self._pixels / labelled if self._pixels and labelled else 1.0
        if factor != 1:
            torch._foreach_mul_([one.grad for one in parameters if one.grad is not None], factor)
        return float(loss / labelled if labelled else loss)
