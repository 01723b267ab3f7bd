"""An LSTM on the CPU: one oneDNN kernel for each layer and direction, which keeps a workspace for its backward.

Of what is read off its fake form all is right but this workspace, which is empty there. It holds, for every step of the
sequence, gates, states and gradients of states, each in a part of its own that begins on a page. Rows are padded to
64 bytes, and to one such piece more where that would be a multiple of 256 values.

While it runs, the kernel holds its bias, its weights in layouts of its own and, of float32, the gates of all steps once
more. Backward holds gradients of half-precision weights and outputs in float32. Pages that a scratchpad only begins are
left out: 8 to 60 KB were seen.

A GRU or a plain RNN is run step by step by operators that a trace sees.

Source: oneDNN 3.12, src/cpu/rnn/rnn_utils.hpp (set_conf, set_offsets, get_good_ld); ATen/native/mkldnn/RNN.cpp. What a
part holds was found by the sizes that the workspace has; tests hold it to the byte.
"""

from typing import Any

import torch
from torch import Tensor

from memseg.nn.autograd import HALF_DTYPES
from memseg.profiling.kernels.convolution_shape import round_up
from memseg.profiling.kernels.transient import Transient

_PAGE, _PIECE, _ALIAS = 4096, 64, 256
_GATES, _BLOCK = 4, 64
_FLOAT = 4
"""Bytes of a value that is float32 whatever the type of the layer: cell states and all gradients."""


def lstm_layer(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, w4: Tensor, hidden: Tensor, cell: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `aten.mkldnn_rnn_layer` returns: output (T, N, hidden), last states, and the workspace in bytes."""
    (steps, batch, inputs), units = x.shape, hidden.shape[-1]
    # The kernel looks at neither `train` nor what wants a gradient.
    size_bytes = workspace_bytes(steps, batch, inputs, units, x.element_size()) if torch.is_grad_enabled() else 0
    return (
        x.new_empty(steps, batch, units),
        torch.empty_like(hidden),
        torch.empty_like(cell),
        x.new_empty(size_bytes, dtype=torch.uint8),
    )


def workspace_bytes(steps: int, batch: int, inputs: int, units: int, itemsize: int) -> int:
    """Kept from forward to backward by one layer in one direction.

    Args:
        steps: Length of the sequences.
        batch: How many there are.
        inputs: Values of one step that the layer reads.
        units: Values of its state.
        itemsize: Bytes of one value.
    """
    cells, states, widest = steps * batch, 2 * (steps + 1) * batch, max(inputs, units)
    return sum(
        round_up(size_bytes, _PAGE)
        for size_bytes in (
            cells * _row(_GATES * units, itemsize),
            cells * _row(units, itemsize),
            states * _row(widest, itemsize),
            *[states * _row(widest, _FLOAT)] * 2,
            states * units * itemsize,
            states * units * _FLOAT,
        )
    )


def lstm_forward(x: Tensor, w1: Tensor, w2: Tensor, *_: Any) -> list[Transient]:
    """What `aten.mkldnn_rnn_layer` holds beside what it returns."""
    units, itemsize = w2.shape[1], x.element_size()
    row = _GATES * round_up(units, _BLOCK) * itemsize if x.dtype in HALF_DTYPES else _row(_GATES * units, itemsize)
    weights = (w1.shape[1] + units) * row
    return [Transient(4, _contiguous_bytes(x) + weights + _GATES * units * itemsize + _scratchpad_bytes(x, units))]


def lstm_backward(x: Tensor, w1: Tensor, w2: Tensor, *rest: Any) -> list[Transient]:
    """What `aten.mkldnn_rnn_layer_backward` holds beside what it returns."""
    steps, batch, units, itemsize = x.shape[0], x.shape[1], w2.shape[1], x.element_size()
    gates, widths = _GATES * units, (w1.shape[1], units)
    in_float = sum(widths) * _row(gates, _FLOAT)
    if x.dtype in HALF_DTYPES:
        weights = sum(gates * round_up(width, _BLOCK // 2) * itemsize for width in widths) + in_float
        gradients = (steps + 2) * batch * units * _FLOAT
    else:
        # Turned they are copied only where their rows have to be padded.
        rows = (_row(width, _FLOAT) for width in widths)
        turned = sum(gates * row for row, width in zip(rows, widths, strict=True) if row > width * _FLOAT)
        weights, gradients = in_float + turned, 0
    held = weights + gradients + 2 * batch * units * itemsize + 2 * gates * _FLOAT
    grad: Tensor | None = rest[7]
    # Where only the last state is read, the output's gradient is made of zeros.
    of_output = steps * batch * units * itemsize if grad is None else _contiguous_bytes(grad)
    return [Transient(7, _contiguous_bytes(x) + of_output + held + _scratchpad_bytes(x, units))]


def _scratchpad_bytes(x: Tensor, units: int) -> int:
    """Gates of all steps, or of one, and two states of one step."""
    steps = 1 if x.dtype in HALF_DTYPES else x.shape[0]
    return steps * x.shape[1] * _row(_GATES * units, _FLOAT) + 2 * x.shape[1] * _row(units, _FLOAT)


def _contiguous_bytes(x: Tensor) -> int:
    return 0 if x.is_contiguous() else x.numel() * x.element_size()


def _row(values: int, itemsize: int) -> int:
    padded = round_up(values, _PIECE // itemsize)
    return (padded + _PIECE // itemsize if padded % _ALIAS == 0 else padded) * itemsize
