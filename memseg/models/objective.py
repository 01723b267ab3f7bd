"""What training minimises."""

import torch.nn.functional as F
from torch import Tensor, nn

from memseg.nn import IGNORE_INDEX, banded_cross_entropy


class Objective(nn.Module):
    """Weighted sum of the cross-entropies of a model's outputs.

    Coarse maps of logits are each brought to the target's size.

    Args:
        aux_weight: Weight shared by all outputs but the first, 0..1; the first gets the rest. The paper: 0.3.
        ignore_index: Label of pixels that do not count.

    Raises:
        ValueError: `aux_weight` is outside 0..1.
    """

    def __init__(self, aux_weight: float = 0.3, *, ignore_index: int = IGNORE_INDEX) -> None:
        super().__init__()
        if not 0 <= aux_weight <= 1:
            raise ValueError(f"aux_weight must be within 0..1, got {aux_weight}")
        self.aux_weight, self.ignore_index = aux_weight, ignore_index

    def forward(self, *outputs_and_target: Tensor) -> Tensor:
        """Of coarse logits (N, K, h, w), the main ones first, and last the target (N, H, W): a scalar."""
        main, *auxiliary, target = outputs_and_target
        total = self.cross_entropy(main, target)
        if not auxiliary:
            return total
        total = total * (1 - self.aux_weight)
        for logits in auxiliary:
            total = total + self.aux_weight / len(auxiliary) * self.cross_entropy(logits, target)
        return total

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """Of one output: a scalar."""
        return banded_cross_entropy(logits, target, ignore_index=self.ignore_index)


class ClassificationObjective(Objective):
    """The same for models with one label per image: logits (N, K), target (N,) of int64."""

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """Of one output: a scalar."""
        return F.cross_entropy(logits, target, ignore_index=self.ignore_index)
