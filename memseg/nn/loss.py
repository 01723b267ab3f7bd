"""Cross-entropy at full size, of logits that stay coarse.

At 2048x1024 with 19 classes one image's full-size logits are 159 MB in float32, and the plain loss makes three such
tensors. Here upsampling, log-softmax and the gradient are done in bands of rows; what is kept for backward is the
gradient of the coarse logits, which is as small as they are.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = 255
"""The label of an unlabelled pixel, as in Cityscapes' trainIds; fits the uint8 target."""

_BAND_BYTES = 16 * 2**20
"""Of one band of full-size logits: little beside the maps around it, and still hundreds of rows at small sizes."""


def banded_cross_entropy(logits: Tensor, target: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Mean cross-entropy of bilinearly upsampled logits (align_corners=False) over the labelled pixels.

    Args:
        logits: (N, K, h, w), at any size.
        target: (N, H, W), uint8 or int64, values 0..K-1 or `ignore_index`.
        ignore_index: Label of pixels that do not count.

    Returns:
        A scalar; 0 where no pixel is labelled (torch's own cross-entropy gives nan).

    Raises:
        ValueError: shapes or dtype do not fit each other.
    """
    if logits.dim() != 4 or target.dim() != 3 or logits.shape[0] != target.shape[0]:
        raise ValueError(
            "logits must be (N, K, h, w) and target (N, H, W) with the same N, "
            f"got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    if target.dtype not in (torch.uint8, torch.int64):
        raise ValueError(f"target must be uint8 or int64, got {target.dtype}")
    return cast(Tensor, _BandedCrossEntropy.apply(logits, target, ignore_index))


def bands(height: int, row_bytes: int) -> list[slice]:
    """Rows 0..height in bands of about 16 MiB of full-size logits, `row_bytes` each."""
    rows = max(1, min(height, _BAND_BYTES // max(1, row_bytes)))
    return [slice(start, min(start + rows, height)) for start in range(0, height, rows)]


def upsample_rows(coarse: Tensor, size: tuple[int, int], rows: slice) -> Tensor:
    """Rows `rows` of F.interpolate(coarse, size, mode="bilinear"), as (N, K, len(rows), W)."""
    upper, lower, weight = _row_sources(coarse, size[0], rows)
    between = torch.lerp(coarse[:, :, upper], coarse[:, :, lower], weight)
    return F.interpolate(between, (between.shape[2], size[1]), mode="bilinear", align_corners=False)


def _row_sources(coarse: Tensor, height: int, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """The coarse row above and below each fine row, and the weight of the one below."""
    fine = torch.arange(rows.start, rows.stop, device=coarse.device, dtype=torch.float64)
    position = ((fine + 0.5) * (coarse.shape[2] / height) - 0.5).clamp(min=0)
    upper = position.long()
    lower = (upper + 1).clamp(max=coarse.shape[2] - 1)
    return upper, lower, (position - upper).to(coarse.dtype).unsqueeze(1)


def _add_row_gradient(grad_coarse: Tensor, grad_rows: Tensor, height: int, rows: slice) -> None:
    """Add to the coarse gradient what the upsampled rows hand back."""
    upper, lower, weight = _row_sources(grad_coarse, height, rows)
    batch, classes, count, _ = grad_rows.shape
    between = torch.ops.aten.upsample_bilinear2d_backward(
        grad_rows,
        list(grad_rows.shape[2:]),
        [batch, classes, count, grad_coarse.shape[3]],
        False,
        None,
        None,
    )
    grad_coarse.index_add_(2, lower, between * weight)
    grad_coarse.index_add_(2, upper, between.mul_(1 - weight))


class _BandedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        batch, classes = logits.shape[:2]
        size = (target.shape[1], target.shape[2])
        wanted = ctx.needs_input_grad[0]
        count = (target != ignore_index).sum().clamp(min=1)
        total = logits.new_zeros(())
        grad = torch.zeros_like(logits) if wanted else None
        for rows in bands(size[0], batch * classes * size[1] * logits.element_size()):
            log_probabilities = upsample_rows(logits, size, rows).log_softmax(1)
            labels = target[:, rows].long()
            labelled = labels != ignore_index
            labels = labels.where(labelled, 0).unsqueeze(1)
            picked = log_probabilities.gather(1, labels).squeeze(1)
            total -= picked.where(labelled, 0).sum()
            if grad is None:
                continue
            grad_rows = log_probabilities.exp_()
            grad_rows.scatter_add_(1, labels, grad_rows.new_full((1, 1, 1, 1), -1).expand_as(labels))
            grad_rows.mul_(labelled.unsqueeze(1))
            _add_row_gradient(grad, grad_rows, size[0], rows)
        if grad is not None:
            ctx.save_for_backward(grad.div_(count))
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_loss, None, None
