"""Cross-entropy at full size, of logits that stay coarse.

At 2048x1024 with 19 classes one image's full-size logits are 159 MB in float32, and the plain loss makes three such
tensors. Here upsampling, softmax and the gradient are done in place in bands of rows that stay in the processor's
caches; what is kept for backward is the gradient of the coarse logits, which is as small as they are.

A band lies class by class, (K, rows, W), however the coarse logits lie: the passes over classes then run along rows of
pixels, whole vectors at a time. Only coarse rows are ever turned from one layout, or one precision, into the other.

Source: the definition of weights and smoothing, with its normaliser, is that of torch.nn.CrossEntropyLoss
(`cross_entropy_loss_label_smoothing` in ATen/native/LossNLL.cpp); smoothing is Szegedy et al., arXiv:1512.00567.
"""

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from memseg.nn.autograd import once_differentiable, wide_dtype, without_autocast
from memseg.nn.banded import banded
from memseg.nn.layout import band_limit
from memseg.nn.upsample import row_sources

IGNORE_INDEX = 255
"""The label of an unlabelled pixel, as in Cityscapes' trainIds; fits the uint8 target."""

_PIXEL_BYTES = 24
"""Of a pixel, whatever the number of classes: its label 8, whether it counts 1 and 4, and numbers of 4 of its own."""


class _Terms(NamedTuple):
    """What defines the loss of a pixel, besides its logits and its label."""

    ignore_index: int
    weight: Tensor | None
    smoothing: float


def banded_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean cross-entropy of bilinearly upsampled logits (align_corners=False) over the labelled pixels.

    Value and gradient are those of torch's `interpolate` and `cross_entropy`, without full-size tensors. Autocast does
    not reach inside: half-precision logits are computed with in float32, and so is their gradient until it is handed
    back. It is kept in float32, because its numbers, divided by millions of pixels, are too small for float16 before a
    gradient scaler has multiplied them: 4 bytes a coarse logit, 20 MB for the example above with two images.

    Args:
        logits: (N, K, h, w), of any float dtype and layout, at any size; the gradient has the same.
        target: (N, H, W), uint8 or int64, values 0..K-1 or `ignore_index`.
        ignore_index: Label of pixels that do not count.
        weight: (K,), of the classes, not negative. A pixel counts as its label's weight, in the mean's divisor too.
            Values are checked where they lie on the CPU; on an accelerator that would wait for it at every step.
        label_smoothing: Share of the target that is spread evenly over all classes, 0..1.

    Returns:
        A scalar, float64 for float64 logits, else float32; 0 where no pixel is labelled, or all that are have weight 0
        (torch's own cross-entropy gives nan or inf).

    Raises:
        ValueError: shapes or dtypes do not fit each other, or `weight` or `label_smoothing` is out of range.
        RuntimeError: a label is no class (on CUDA, a device-side assertion), or the gradient is differentiated again.

    >>> logits = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1)  # probabilities 1/4 and 3/4
    >>> target = torch.tensor([[[0, 0, 1, IGNORE_INDEX]]])
    >>> value = banded_cross_entropy(logits, target, weight=torch.tensor([1.0, 2.0]))
    >>> f"{value:.4f}, {(2 * math.log(4) + 2 * math.log(4 / 3)) / (1 + 1 + 2):.4f}"
    '0.8370, 0.8370'
    """
    if logits.dim() != 4 or target.dim() != 3 or logits.shape[0] != target.shape[0]:
        raise ValueError(
            "logits must be (N, K, h, w) and target (N, H, W) with the same N, "
            f"got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    if target.dtype not in (torch.uint8, torch.int64):
        raise ValueError(f"target must be uint8 or int64, got {target.dtype}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be within 0..1, got {label_smoothing}")
    if weight is not None:
        _check_weight(weight, logits.shape[1])
        weight = weight.detach().to(logits.device, wide_dtype(logits.dtype))
    return cast(Tensor, _BandedCrossEntropy.apply(logits, target, _Terms(ignore_index, weight, label_smoothing)))


def _check_weight(weight: Tensor, classes: int) -> None:
    if weight.shape != (classes,) or not weight.is_floating_point():
        raise ValueError(
            f"weight must be floats of shape ({classes},), one for each class, "
            f"got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    readable = weight.device.type == "cpu" and not isinstance(weight, FakeTensor)
    if readable and not ((weight >= 0) & weight.isfinite()).all():
        raise ValueError(f"weight must be finite and not negative, got {weight.min():g} to {weight.max():g}")


def bands(height: int, row_bytes: int, limit: int) -> list[slice]:
    """Rows 0..height, `row_bytes` each, in bands of up to `limit` bytes, at least a row."""
    rows = max(1, min(height, limit // max(1, row_bytes)))
    return [slice(start, min(start + rows, height)) for start in range(0, height, rows)]


def upsample_rows(coarse: Tensor, size: tuple[int, int], rows: slice) -> Tensor:
    """Rows `rows` of F.interpolate(coarse, size, mode="bilinear"), as contiguous (N, K, len(rows), W).

    In float32 where `coarse` is in half precision. Beside the result there are, for a while, its rows at width w.
    """
    batch, classes, height, width = coarse.shape
    sources = row_sources(height, size[0], rows.start, rows.stop, coarse.device)
    source = coarse[:, :, sources.read].to(wide_dtype(coarse.dtype), memory_format=torch.contiguous_format)
    between = sources.mix(source, dim=2)
    fine = between.shape[2]
    flat = between.view(batch, classes * fine, width)
    return F.interpolate(flat, size[1], mode="linear").view(batch, classes, fine, size[1])


def _add_row_gradient(grad_coarse: Tensor, grad_rows: Tensor, height: int, rows: slice) -> None:
    """Add to the coarse gradient (K, h, w) what the upsampled rows (K, len(rows), W) hand back, of `height` in all."""
    classes, coarse_height, coarse_width = grad_coarse.shape
    sources = row_sources(coarse_height, height, rows.start, rows.stop, grad_rows.device)
    # Down first: then there is less to go across.
    shares = sources.shares(grad_rows.dtype)
    across = (shares @ grad_rows).view(1, -1, grad_rows.shape[2])
    grad_read = torch.ops.aten.upsample_linear1d_backward(
        across, [across.shape[2]], [1, across.shape[1], coarse_width], False, None
    )
    grad_coarse[:, sources.read].add_(grad_read.view(classes, -1, coarse_width))


def _sums_and_gradient(band: Tensor, target: Tensor, terms: _Terms) -> Tensor:
    """Sums of the losses of a band's pixels and of their labels' weights, (2,); the logits become the losses' gradient.

    A pixel wants `own` of its label and, with smoothing, `spread` of every class. With q the two together and z the
    logits less the highest one, its loss is -sum(q * log p) = -(sum(q * z) + sum(q) * log(max p)), where nothing
    underflows, and its gradient sum(q) * p - q.

    Args:
        band: Logits (K, rows, W), overwritten.
        target: (rows, W).
        terms: Their weights (K,) in the band's dtype.
    """
    labels = target.long().unsqueeze(0)  # A uint8 would be compared with -1 as with 255.
    ignored = labels == terms.ignore_index
    labels = labels.masked_fill(ignored, 0)
    band.sub_(band.amax(0, keepdim=True))
    wanted = band.gather(0, labels)
    counted = ignored.logical_not().to(band.dtype)
    own = counted if terms.weight is None else terms.weight[labels].mul_(counted)
    total_weight = own.sum()
    whole = own = own * (1 - terms.smoothing)
    wanted.mul_(own)
    spread = _spread(terms, band)
    if spread is not None:
        wanted.addcmul_((spread @ band.flatten(1)).view_as(own), counted)
        whole = torch.addcmul(own, counted, spread.sum())
    torch.softmax(band, 0, out=band)
    total = wanted.addcmul_(whole, band.amax(0, keepdim=True).log_()).sum().neg_()
    band.mul_(whole)
    if spread is not None:
        band.addcmul_(spread.view(-1, 1, 1), counted, value=-1)
    band.scatter_add_(0, labels, own.neg_())
    return torch.stack((total, total_weight))


def _spread(terms: _Terms, band: Tensor) -> Tensor | None:
    """What smoothing asks of each class (K,)."""
    if terms.smoothing == 0:
        return None
    weight = band.new_ones(len(band)) if terms.weight is None else terms.weight
    return weight * (terms.smoothing / len(band))


def _planned_for(logits: Tensor, target: Tensor) -> list[slice]:
    row_bytes = target.shape[2] * (logits.shape[1] * wide_dtype(logits.dtype).itemsize + _PIXEL_BYTES)
    return bands(target.shape[1], row_bytes, band_limit(logits))


def _narrow(
    logits: Tensor, target: Tensor, weight: Any, ignored: int, smoothing: float, grad: Tensor
) -> tuple[Any, ...]:
    height = min(target.shape[1], 2 * _planned_for(logits, target)[0].stop)
    part = slice(0, 1), slice(None), slice(0, -(-height * logits.shape[2] // target.shape[1]))
    return logits[part], target[:1, :height], weight, ignored, smoothing, grad[part] if len(grad) else grad


@banded(
    mutates=["grad"],
    narrow=_narrow,
    fake=lambda logits, *_: logits.new_empty(2, dtype=wide_dtype(logits.dtype)),
)
def cross_entropy_sums(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignored: int, smoothing: float, grad: Tensor
) -> Tensor:
    """Sums of the losses of all pixels and of their labels' weights, (2,), of logits (N, K, h, w), target (N, H, W).

    The gradient of the first is added to `grad`, which is like the logits, or has no images if nobody wants it.
    """
    terms = _Terms(ignored, weight, smoothing)
    height, width = target.shape[1:]
    sums = logits.new_zeros(2, dtype=wide_dtype(logits.dtype))
    for image in range(len(logits)):
        for rows in _planned_for(logits, target):
            band = upsample_rows(logits[image : image + 1], (height, width), rows).squeeze(0)
            sums += _sums_and_gradient(band, target[image, rows], terms)
            if len(grad):
                _add_row_gradient(grad[image], band, height, rows)
            del band  # Before the next one is made.
    return sums


class _BandedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, terms: _Terms) -> Tensor:
        dtype, wanted = wide_dtype(logits.dtype), ctx.needs_input_grad[0]
        grad = torch.zeros_like(logits if wanted else logits[:0], dtype=dtype)
        with without_autocast(logits.device.type):
            sums = cross_entropy_sums(logits, target, terms.weight, terms.ignore_index, terms.smoothing, grad)
        total, total_weight = sums.unbind()
        # Where nothing counts, dividing by infinity leaves 0.
        divisor = total_weight.masked_fill(total_weight == 0, math.inf)
        if wanted:
            ctx.save_for_backward(grad.div_(divisor))
            ctx.dtype = logits.dtype
        return total / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * grad_loss).to(ctx.dtype), None, None
