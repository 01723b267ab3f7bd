"""What a convolution allocates on a CPU while it runs, outputs included: predicted and measured.

    python -m benchmarks.convolution_workspace [--json]

The prediction (`memseg.profiling.kernels.workspace`) is the one that a trace on fake tensors makes; the measurement
adds up the allocator's own events. On x86 with AVX-512 and without AMX they are equal, but where a row says otherwise.
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
    groups: int = 1
    batch: int = 2
    transposed: bool = False
    bias: bool = False
    wants_input_gradient: bool = True
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    """Whether maps are channels-last; the weight is contiguous, as a module keeps it."""

    @property
    def label(self) -> str:
        """Name, type and layout."""
        return ", ".join(
            [self.name, str(self.dtype).removeprefix("torch."), *(["channels-last"] if self.channels_last else [])]
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input (N, C, H, W), weight and bias."""
        outer, inner = self.out_channels, self.in_channels // self.groups
        if self.transposed:
            outer, inner = self.in_channels, self.out_channels // self.groups
        weight = torch.ones(outer, inner, self.kernel_size, self.kernel_size, dtype=self.dtype)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        x = torch.ones(self.batch, self.in_channels, *self.size, dtype=self.dtype).contiguous(memory_format=layout)
        return x, weight, torch.ones(self.out_channels, dtype=self.dtype) if self.bias else None

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(N, out_channels, H / stride, W / stride); times the stride if transposed."""
        out: Tensor = torch.ops.aten.convolution(x, weight, bias, *self._geometry())
        return out

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor) -> object:
        """Gradients of the input, where it is wanted, of the weight, and of the bias, where there is one."""
        sizes = [self.out_channels] if self.bias else None
        wanted = [self.wants_input_gradient, True, self.bias]
        return torch.ops.aten.convolution_backward(grad, x, weight, sizes, *self._geometry(), wanted)

    def _geometry(self) -> tuple[object, ...]:
        padding = 0 if self.transposed or self.kernel_size == self.stride else self.dilation * (self.kernel_size // 2)
        return [self.stride] * 2, [padding] * 2, [self.dilation] * 2, self.transposed, [0, 0], self.groups


_SHAPES: tuple[dict[str, object], ...] = (
    {"name": "stem 7x7", "in_channels": 3, "out_channels": 64, "kernel_size": 7, "size": (128, 256), "stride": 2,
     "wants_input_gradient": False},
    {"name": "patches 4x4", "in_channels": 3, "out_channels": 96, "kernel_size": 4, "size": (112, 112), "stride": 4,
     "wants_input_gradient": False, "bias": True},
    {"name": "bottleneck 1x1", "in_channels": 256, "out_channels": 128, "kernel_size": 1, "size": (32, 64)},
    {"name": "shortcut 1x1 stride 2", "in_channels": 256, "out_channels": 512, "kernel_size": 1, "size": (32, 64),
     "stride": 2},
    {"name": "dense layer 3x3", "in_channels": 128, "out_channels": 32, "kernel_size": 3, "size": (64, 128)},
    {"name": "blend 3x3", "in_channels": 256, "out_channels": 128, "kernel_size": 3, "size": (32, 64), "bias": True},
    {"name": "context 3x3 dilated", "in_channels": 512, "out_channels": 128, "kernel_size": 3, "size": (8, 16),
     "dilation": 2},
    {"name": "3x3 stride 2", "in_channels": 64, "out_channels": 128, "kernel_size": 3, "size": (32, 64), "stride": 2},
    {"name": "3x3 in groups of 16", "in_channels": 256, "out_channels": 256, "kernel_size": 3, "size": (16, 32),
     "groups": 16},
    {"name": "depthwise 3x3", "in_channels": 240, "out_channels": 240, "kernel_size": 3, "size": (16, 32),
     "groups": 240},
    {"name": "depthwise 5x5", "in_channels": 120, "out_channels": 120, "kernel_size": 5, "size": (16, 32),
     "groups": 120},
    {"name": "depthwise 5x5 stride 2", "in_channels": 72, "out_channels": 72, "kernel_size": 5, "size": (32, 64),
     "groups": 72, "stride": 2},
    {"name": "depthwise 7x7", "in_channels": 96, "out_channels": 96, "kernel_size": 7, "size": (28, 28),
     "groups": 96, "bias": True},
    {"name": "pyramid 3x3, wider than the map", "in_channels": 256, "out_channels": 64, "kernel_size": 3,
     "size": (16, 32), "dilation": 36},
    {"name": "transposed 2x2", "in_channels": 128, "out_channels": 64, "kernel_size": 2, "size": (32, 64),
     "stride": 2, "transposed": True, "bias": True},
)  # fmt: skip

CONVOLUTIONS = tuple(
    Convolution(**shape, dtype=dtype, channels_last=channels_last)  # type: ignore[arg-type]
    for shape in _SHAPES
    for dtype in (torch.float32, torch.bfloat16, torch.float64)
    for channels_last in (False, True)
)


def compare(convolution: Convolution) -> Row:
    """Peak bytes of forward and backward, predicted and measured, and the bytes of all operands together."""
    x, weight, bias = convolution.tensors()
    grad = torch.ones_like(convolution.forward(x, weight, bias))
    # The first call makes oneDNN's primitives, which it keeps.
    convolution.backward(grad, x, weight)
    return {
        "name": convolution.label,
        "operand_bytes": x.nbytes + weight.nbytes + grad.nbytes,
        "forward_predicted_bytes": _predicted(lambda x, weight: convolution.forward(x, weight, bias), x, weight),
        "forward_measured_bytes": _measured(lambda: convolution.forward(x, weight, bias)),
        "backward_predicted_bytes": _predicted(convolution.backward, grad, x, weight),
        "backward_measured_bytes": _measured(lambda: convolution.backward(grad, x, weight)),
    }


def _predicted(run: Callable[..., object], *real: Tensor) -> int:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
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
