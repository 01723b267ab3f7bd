"""What an LSTM's kernels keep and hold, held against the kernels and the allocator."""

from functools import partial

import pytest
import torch
from torch import nn

from memseg.profiling import foreign_job, measure_job, named_optimizer, trace_job
from memseg.profiling.kernels.lstm import workspace_bytes

aten = torch.ops.aten


def takes(dtype):
    """Whether oneDNN has a kernel of that type for this processor."""
    try:
        real_workspace_bytes(1, 1, 1, 1, dtype)
    except RuntimeError:
        return False
    return True


def real_workspace_bytes(steps, batch, inputs, units, dtype):
    x, state = torch.zeros(steps, batch, inputs, dtype=dtype), torch.zeros(batch, units, dtype=dtype)
    weights = [torch.zeros(4 * units, inputs, dtype=dtype), torch.zeros(4 * units, units, dtype=dtype)]
    bias = torch.zeros(4 * units, dtype=dtype)
    lstm, reverse, train = 2, False, True
    out = aten.mkldnn_rnn_layer(
        x, *weights, bias, bias, state, state, reverse, [], lstm, units, 1, True, False, False, train
    )
    return out[3].nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("units", [5, 16, 64, 100, 256])
@pytest.mark.parametrize("inputs", [3, 40, 256, 300])
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (7, 5), (31, 16)])
def test_the_workspace_is_the_kernels_own(steps, batch, inputs, units, dtype):
    if not takes(dtype):
        pytest.skip(f"oneDNN has no LSTM of {dtype} for this processor")
    real = real_workspace_bytes(steps, batch, inputs, units, dtype)
    assert workspace_bytes(steps, batch, inputs, units, dtype.itemsize) == real


class Recurrent(nn.Module):
    """(T, N, 64) to (T, N, 5); (N, T, ...) if the batch comes first."""

    def __init__(self, kind, units, dtype=torch.float32, **options):
        super().__init__()
        self.layers = kind(64, units, dtype=dtype, **options)
        self.last = nn.Linear(2 * units if self.layers.bidirectional else units, 5, dtype=dtype)

    def forward(self, x):
        return self.last(self.layers(x)[0])


@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}, {"bias": False}],
    ids=["plain", "two layers, both ways", "batch first", "no bias"],
)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_steps_of_recurrent_networks(kind, options):
    build = partial(Recurrent, kind, 128, **options)
    make = partial(foreign_job, build, torch.empty(32, 16, 64), optimizer=named_optimizer("adam"))
    assert trace_job(make).peak_allocated_bytes == pytest.approx(measure_job(make), rel=0.005)


class Used(nn.Module):
    """An LSTM behind a trained layer, and what is done with it."""

    def __init__(self, use):
        super().__init__()
        self.first, self.layers, self.last = nn.Linear(64, 64), nn.LSTM(64, 128), nn.Linear(128, 5)
        self.use = use

    def forward(self, x):
        return self.last(self.use(self.layers, self.first(x)))


def without_gradients(layers, x):
    with torch.no_grad():
        return layers(x)[0]


USES = {
    "last state": lambda layers, x: layers(x)[1][0][-1],
    "last cell": lambda layers, x: layers(x)[1][1][-1],
    "in eval mode": lambda layers, x: layers.eval()(x)[0],
    "without gradients": without_gradients,
}


@pytest.mark.parametrize("use", USES)
def test_an_lstm_however_it_is_used(use):
    make = partial(foreign_job, partial(Used, USES[use]), torch.empty(100, 32, 64), optimizer=None)
    assert trace_job(make).peak_allocated_bytes == pytest.approx(measure_job(make), rel=0.01)


def test_a_half_precision_lstm():
    if not takes(torch.bfloat16):
        pytest.skip("oneDNN has no LSTM of bfloat16 for this processor")

    make = partial(
        foreign_job,
        partial(Recurrent, nn.LSTM, 128, torch.bfloat16),
        torch.empty(64, 32, 64, dtype=torch.bfloat16),
        loss=lambda out: out.float().mean(),
        optimizer=named_optimizer("adam"),
    )
    assert trace_job(make).peak_allocated_bytes == pytest.approx(measure_job(make), rel=0.005)


def test_that_a_gpus_kernels_are_not_known_is_said():
    make = partial(foreign_job, partial(Recurrent, nn.LSTM, 16), torch.empty(32, 16, 64), optimizer=None)
    (uncounted,) = trace_job(make, device="cuda").uncounted
    assert "cuDNN" in uncounted
    assert "(layers)" in uncounted
    assert not trace_job(make).uncounted
    alone = partial(foreign_job, partial(nn.LSTM, 64, 16), torch.empty(32, 16, 64), optimizer=None)
    assert "(LSTM)" in trace_job(alone, device="cuda").uncounted[0]
