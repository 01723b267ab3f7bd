"""A network as a file that runs without memseg: ONNX, or a program of torch.export.

What is exported is the plain network (`memseg.inference.plain`) from normalised images to full-size logits or labels.
A file that answers otherwise than the network is worse than none, so each is run before it is written: ONNX in
onnxruntime, a program after it has been read again, on random images and on pictures.
"""

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import memseg
from memseg.data import ClassList
from memseg.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from memseg.errors import InputError
from memseg.files import replace_file
from memseg.models import SegmentedModel
from memseg.units import format_image

LARGEST_DIFFERENCE = 1e-3
"""Of a logit from the network's own, over the network's largest."""
LARGEST_CHANGED = 1e-3
"""Share of the pixels whose label may be another: those where two classes are as good as equal."""
METADATA_FILE = "memseg.json"
"""Name of the metadata inside a program; in ONNX each entry is one of metadata_props."""
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Answer = Callable[[Tensor], Tensor]


class Format(StrEnum):
    """Of an exported file."""

    ONNX = "onnx"
    TORCH = "torch"
    """A program of torch.export, which torch.export.load reads."""


class _Whole(nn.Module):
    """What is exported: logits (N, K, H, W) of images (N, 3, H, W), or the strongest class of each pixel (N, H, W)."""

    def __init__(self, model: SegmentedModel, *, labels: bool) -> None:
        super().__init__()
        self.model, self.labels = model, labels
        self.dtype = torch.uint8 if model.num_classes <= 2**8 else torch.int64

    def forward(self, images: Tensor) -> Tensor:
        logits = cast(Tensor, self.model(images))
        return logits.argmax(1).to(self.dtype) if self.labels else logits


def check_packages(wanted: Format) -> None:
    """Do nothing where all that a format needs is installed.

    Raises:
        InputError: packages are missing; all of them are named.
    """
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if wanted is Format.ONNX and missing:
        raise InputError(
            f"exporting ONNX needs {', '.join(_ONNX_PACKAGES)}; not installed: {', '.join(missing)}; "
            "pip install 'memseg[export]' brings them"
        )


def metadata_of(
    model: SegmentedModel, size: tuple[int, int], *, labels: bool, dynamic: bool, classes: ClassList | None = None
) -> dict[str, str]:
    """What a user of the file has to know, as ONNX keeps it: text by name, lists as JSON."""
    known = {
        "memseg_version": memseg.__version__,
        "model": model.name,
        "image": format_image(size),
        "dynamic": json.dumps(dynamic),
        "output": "labels" if labels else "logits",
        "output_stride": str(model.output_stride),
        "num_classes": str(model.num_classes),
        "mean": json.dumps(IMAGENET_MEAN),
        "std": json.dumps(IMAGENET_STD),
    }
    if classes is not None:
        known |= {"classes": json.dumps(classes.names), "colours": json.dumps(classes.colours)}
    return known


@torch.no_grad()
def export_network(
    model: SegmentedModel,
    out: Path,
    *,
    wanted: Format,
    size: tuple[int, int],
    batch: int = 1,
    labels: bool = False,
    dynamic: bool = False,
    classes: ClassList | None = None,
    pictures: Sequence[Tensor] = (),
    progress: Callable[[str], None] = lambda text: None,
) -> float:
    """Write a network to a file, if the file answers as the network does.

    Args:
        model: On the CPU, in float32 and eval mode.
        out: The file; it appears whole, or not at all.
        wanted: Its format.
        size: (height, width) of the images.
        batch: Images at a time.
        labels: Whether it makes class maps, uint8 (int64 for more than 256 classes), instead of logits.
        dynamic: Whether batch, height and width are free; sides stay multiples of the output stride, twice it or more.
        classes: Of the network, for the metadata.
        pictures: Batches (batch, 3, *size) that the answers are compared on, besides random ones.
        progress: Told what is being done.

    Returns:
        The largest difference found: of a logit, over the largest logit; or the share of labels.

    Raises:
        InputError: packages are missing, the network does not take such images or cannot be exported, or the file
            would answer otherwise than the network; nothing has been written.
        OSError: the disk is full or cannot be written.
    """
    check_packages(wanted)
    model.check_image(size)
    if not out.parent.is_dir():
        raise InputError(f"the folder of {out} must exist, {out.parent} does not; make it first")
    if not model.is_dense and labels:
        raise InputError(f"labels are class maps, and {model.name} has one class for a whole image")
    whole = _Whole(model, labels=labels).eval()
    trials = [torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0)), *pictures]
    example, shapes = _example(model, trials[0], dynamic)
    progress("exporting")
    metadata = metadata_of(model, size, labels=labels, dynamic=dynamic, classes=classes)
    make = _onnx if wanted is Format.ONNX else _program
    try:
        content, answer = make(whole, example, shapes, metadata)
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{model.name} cannot be exported as {wanted}: {reason}") from error
    progress("checking")
    if dynamic:
        trials.append(example)
    worst = max(_difference(answer(images), cast(Tensor, whole(images)), labels) for images in trials)
    limit = LARGEST_CHANGED if labels else LARGEST_DIFFERENCE
    if not worst <= limit:
        what = "share of other labels" if labels else "difference of a logit, over the largest logit,"
        raise InputError(
            f"{out} would not answer as {model.name} does: the {what} must be at most {limit:g}, is {worst:.3g}; "
            f"nothing was written; try the other format"
        )
    replace_file(out, content)
    return worst


def _example(model: SegmentedModel, images: Tensor, dynamic: bool) -> tuple[Tensor, dict[str, Any] | None]:
    """Images to record with, and which of their sizes are free."""
    if not dynamic:
        return images, None
    # A batch of 1, or a coarsest map of one row, would be taken as fixed.
    stride = model.output_stride
    if min(images.shape[2:]) < 2 * stride:
        raise InputError(
            f"with free sizes each side must be at least {2 * stride}, twice the output stride of {model.name}, "
            f"got {format_image((images.shape[2], images.shape[3]))}"
        )
    free = {
        0: torch.export.Dim("batch"),
        2: stride * torch.export.Dim("rows", min=2),
        3: stride * torch.export.Dim("columns", min=2),
    }
    generator = torch.Generator().manual_seed(1)
    return torch.randn(max(2, len(images)), *images.shape[1:], generator=generator), {"images": free}


def _program(
    whole: _Whole, example: Tensor, shapes: dict[str, Any] | None, metadata: Mapping[str, str]
) -> tuple[bytes, Answer]:
    buffer = io.BytesIO()
    program = torch.export.export(whole, (example,), dynamic_shapes=shapes)
    torch.export.save(program, buffer, extra_files={METADATA_FILE: json.dumps(metadata)})
    buffer.seek(0)
    return buffer.getvalue(), torch.export.load(buffer).module()


def _onnx(
    whole: _Whole, example: Tensor, shapes: dict[str, Any] | None, metadata: Mapping[str, str]
) -> tuple[bytes, Answer]:
    import onnxruntime

    output = "labels" if whole.labels else "logits"
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # Of packages that the exporter asks for and that are not ours to mend.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            whole,
            (example,),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["images"],
            output_names=[output],
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    for name, value in metadata.items():
        proto.metadata_props.add(key=name, value=value)
    content: bytes = proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return content, lambda images: torch.from_numpy(session.run([output], {"images": images.numpy()})[0])


def _difference(found: Tensor, expected: Tensor, labels: bool) -> float:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if labels:
        return (found != expected).double().mean().item()
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
