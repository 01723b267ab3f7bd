"""What training minimises."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memseg.nn import IGNORE_INDEX, banded_cross_entropy


class Objective(nn.Module):
    """Weighted sum of the cross-entropies of a model's outputs.

    Coarse maps of logits are each brought to the target's size.

    Args:
        aux_weight: Weight shared by all outputs but the first, 0..1; the first gets the rest. The paper: 0.3.
        ignore_index: Label of pixels that do not count.
        class_weights: What a pixel of each class counts, in the mean's divisor too; None for 1.
        label_smoothing: Share of each label that is spread evenly over all classes, 0..1.

    Raises:
        ValueError: `aux_weight` is outside 0..1.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        aux_weight: float = 0.3,
        *,
        ignore_index: int = IGNORE_INDEX,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= aux_weight <= 1:
            raise ValueError(f"aux_weight must be within 0..1, got {aux_weight}")
        self.aux_weight, self.ignore_index, self.label_smoothing = aux_weight, ignore_index, label_smoothing
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64)
        self.register_buffer("class_weights", weights, persistent=False)

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
        return banded_cross_entropy(
            logits,
            target,
            ignore_index=self.ignore_index,
            weight=self.class_weights,
            label_smoothing=self.label_smoothing,
        )

    def divisor(self, target: Tensor) -> Tensor:
        """What the mean over a target's pixels is divided by: how many are labelled, or the sum of their weights."""
        if self.class_weights is None:
            return torch.count_nonzero(target != self.ignore_index)
        counts = torch.bincount(target.flatten(), minlength=len(self.class_weights))[: len(self.class_weights)]
        return counts.double() @ self.class_weights


class ClassificationObjective(Objective):
    """The same for models with one label per image: logits (N, K), target (N,) of int64."""

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """Of one output: a scalar."""
        weights = None if self.class_weights is None else self.class_weights.to(logits)
        return F.cross_entropy(
            logits, target, weights, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing
        )
