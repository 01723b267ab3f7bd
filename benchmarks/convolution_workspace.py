"""What a float32 convolution allocates on a CPU while it runs, outputs included: predicted and measured.

    python -m benchmarks.convolution_workspace [--json]

The prediction (`memseg.profiling.workspace`) is the one that a trace on fake tensors makes; the measurement adds up the
allocator's own events. Forward is exact. The gradient of a weight may be off by that weight's own size: where oneDNN
shares it out over images and rows, each thread beyond the first sums up a part of its own.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.result import Row, tell
from memseg.profiling.measure import watch_allocator
from memseg.profiling.trace import StepTracer
from memseg.profiling.workspace import blocked_weight_bytes


@dataclass(frozen=True)
class Convolution:
    """A convolution and the shape it is applied to."""

    name: str
    in_channels: int
    out_channels: int
    kernel_size: int
    size: tuple[int, int]
    """(height, width) of the input."""
    stride: int = 1
    dilation: int = 1
    batch: int = 2
    wants_input_gradient: bool = True
    channels_last: bool = False
    """Whether maps are channels-last; the weight is contiguous, as a module keeps it."""

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Input (N, C, H, W) and weight."""
        weight = torch.ones(self.out_channels, self.in_channels, self.kernel_size, self.kernel_size)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return torch.ones(self.batch, self.in_channels, *self.size).contiguous(memory_format=layout), weight

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """(N, out_channels, H / stride, W / stride)."""
        padding = self.dilation * (self.kernel_size // 2)
        return torch.conv2d(x, weight, None, self.stride, padding, self.dilation)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor) -> object:
        """Gradients of the input, where it is wanted, and of the weight."""
        padding = self.dilation * (self.kernel_size // 2)
        geometry = [self.stride] * 2, [padding] * 2, [self.dilation] * 2, False, [0, 0], 1
        wanted = [self.wants_input_gradient, True, False]
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, wanted)


CONVOLUTIONS = (
    Convolution("stem 7x7", 3, 64, 7, (128, 256), stride=2, wants_input_gradient=False),
    Convolution("bottleneck 1x1", 256, 128, 1, (32, 64)),
    Convolution("dense layer 3x3", 128, 32, 3, (32, 64)),
    Convolution("dense layer 3x3, larger", 128, 32, 3, (128, 256)),
    Convolution("blend 3x3", 256, 128, 3, (32, 64)),
    Convolution("context 3x3 dilated", 512, 128, 3, (8, 16), dilation=2),
    Convolution("3x3 stride 2", 64, 128, 3, (32, 64), stride=2),
    Convolution("3x3 of odd channels", 20, 37, 3, (31, 45)),
    Convolution("logits 1x1, one image", 128, 19, 1, (64, 128), batch=1),
    Convolution("blend 3x3, channels-last", 256, 128, 3, (32, 64), channels_last=True),
    Convolution("bottleneck 1x1, channels-last", 256, 128, 1, (32, 64), channels_last=True),
    Convolution("dense layer 3x3, channels-last", 128, 32, 3, (128, 256), channels_last=True),
    Convolution("context 3x3 dilated, channels-last", 512, 128, 3, (8, 16), dilation=2, channels_last=True),
    Convolution("3x3 of odd channels, channels-last", 20, 37, 3, (31, 45), channels_last=True),
)


def compare(convolution: Convolution) -> Row:
    """Peak bytes of forward and backward, predicted and measured, and the bytes of the weight as oneDNN lays it out."""
    x, weight = convolution.tensors()
    grad = torch.ones_like(convolution.forward(x, weight))
    return {
        "name": convolution.name,
        "blocked_weight_bytes": blocked_weight_bytes(weight),
        "forward_predicted_bytes": _predicted(lambda x, weight, _: convolution.forward(x, weight), x, weight, grad),
        "forward_measured_bytes": _measured(lambda: convolution.forward(x, weight)),
        "backward_predicted_bytes": _predicted(
            lambda x, weight, grad: convolution.backward(grad, x, weight), x, weight, grad
        ),
        "backward_measured_bytes": _measured(lambda: convolution.backward(grad, x, weight)),
    }


def _predicted(run: Callable[[Tensor, Tensor, Tensor], object], *real: Tensor) -> int:
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in real]
        tracer = StepTracer()
        with tracer:
            run(*fake)
        return tracer.peak_bytes


def _measured(run: Callable[[], object]) -> int:
    with watch_allocator() as peak:
        run()
    return peak.peak_bytes


def main() -> None:
    """Compare all of them."""
    parser = argparse.ArgumentParser(description="Convolution workspaces on the CPU, predicted and measured.")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args()
    tell([compare(convolution) for convolution in CONVOLUTIONS], as_json=arguments.json)


if __name__ == "__main__":
    main()
