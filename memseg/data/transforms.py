"""From pixels to tensors as networks take them: normalised, and padded to a size that they can work on."""

from enum import StrEnum

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from memseg.data.dataset import Pixels
from memseg.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of red, green, blue over ImageNet, 0 to 1; what torchvision's weights were trained with."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Their standard deviation."""


class Fit(StrEnum):
    """How an image of another size becomes one of the training size."""

    PAD = "pad"
    """Pad right and bottom; an image that is larger is refused."""
    CROP = "crop"
    """Cut out a part at random; pad where the image is smaller."""
    RESIZE = "resize"
    """Resize: image bilinear, target nearest. The ratio of height to width is not kept."""


def to_tensor(image: Pixels) -> Tensor:
    """The image (H, W, 3) as a float32 tensor (3, H, W), normalised as torchvision's models expect.

    >>> to_tensor(np.full((1, 1, 3), 255, np.uint8)).flatten()
    tensor([2.2489, 2.4286, 2.6400])
    """
    channels_last = torch.from_numpy(np.require(image, requirements=["C", "W"]))
    return normalise(channels_last.permute(2, 0, 1).contiguous())


def normalise(image: Tensor) -> Tensor:
    """The image uint8 (3, H, W) as float32, its channels less their mean and over their deviation on ImageNet."""
    tensor = image.to(torch.float32).div_(255)
    return tensor.sub_(torch.tensor(IMAGENET_MEAN).view(3, 1, 1)).div_(torch.tensor(IMAGENET_STD).view(3, 1, 1))


def pad_to(tensor: Tensor, size: tuple[int, int], *, fill: float = 0) -> Tensor:
    """The tensor (..., H, W) grown at the right and the bottom to `size` (height, width).

    Args:
        tensor: Normalised images, or targets.
        size: At least that of the tensor.
        fill: For images 0, which is the mean colour; for targets IGNORE_INDEX.

    Raises:
        InputError: the tensor is larger than `size`.

    >>> pad_to(torch.ones(1, 2), (2, 3), fill=255).tolist()
    [[1.0, 1.0, 255.0], [255.0, 255.0, 255.0]]
    """
    height, width = tensor.shape[-2:]
    if height > size[0] or width > size[1]:
        raise InputError(f"padding must not shrink: the image is {height}x{width}, got {size[0]}x{size[1]}")
    return F.pad(tensor, (0, size[1] - width, 0, size[0] - height), value=fill)


def pad_to_multiple(tensor: Tensor, stride: int, *, fill: float = 0) -> Tensor:
    """The tensor (..., H, W) grown at the right and the bottom until `stride` divides both sides; see `pad_to`.

    >>> pad_to_multiple(torch.zeros(3, 360, 480), 64).shape
    torch.Size([3, 384, 512])
    """
    height, width = (-(-side // stride) * stride for side in tensor.shape[-2:])
    return pad_to(tensor, (height, width), fill=fill)
