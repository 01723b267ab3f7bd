"""The profile of one whole training step on one card.

A step is traced once, but told twice. Optimizer state is born when the first step ends, so the first step's forward and
backward run without it, and its optimizer does more. What is traced is forward, backward, the optimizer of the first
step and the optimizer of the second, in this order; first step and steady state are put together from these parts.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from memseg.errors import InputError, MemsegError
from memseg.levels import Precision, Recompute
from memseg.planning.costs import Work
from memseg.profiling.jobs.data_parallel import DataParallel, make_buckets
from memseg.profiling.jobs.job import LOSS, Job, run_batch
from memseg.profiling.jobs.placement import Placement, card_of, check_placement, placed
from memseg.profiling.kernels.cuda_semantics import cuda_semantics, foreach_by_default
from memseg.profiling.timeline import Category, LayerRow, Phase, Timeline, nearest_layer
from memseg.profiling.trace import StepTracer

_NO_VALUES = "is not supported for tensor subclasses"
"""What torch says where a tensor's values are asked for as an array."""


class UntraceableError(InputError):
    """A model runs something that tensors without values cannot."""


@dataclass(frozen=True)
class LayerProfile:
    """One line of the per-layer table."""

    row: LayerRow
    forward: Work
    backward: Work
    """Includes what is rebuilt."""

    @property
    def is_empty(self) -> bool:
        """Whether it neither holds nor computes anything."""
        return not self.row.parameter_bytes and not self.row.saved_bytes and self.forward + self.backward == Work(0, 0)


@dataclass(frozen=True)
class StepProfile:
    """What one training step allocates and computes."""

    model: str
    inputs: tuple[str, ...]
    """Each tensor of the batch in words, as "float32 2x3x1024x2048"."""
    loss: str
    """Its name; "" where it goes without saying."""
    timeline: Timeline
    """Of the second and every later step."""
    first_timeline: Timeline
    """Of the first step, at whose end the optimizer's state is born."""
    work: Mapping[tuple[Phase, str], Work]
    """By phase and layer."""
    names: tuple[str, ...]
    """All layers in order, "block1" before "block1.denselayer1"; "" where the model itself computes."""
    levels: Mapping[str, tuple[Recompute, ...]] = field(default_factory=dict)
    """Of each segment, the recompute levels that it has."""
    device: str = "cpu"
    """"cpu" or "cuda": whose kernels were counted."""
    precision: Precision = Precision.FLOAT32
    accumulation: int = 1
    placement: Placement = field(default_factory=dict)
    """Cards of layers, by index; empty with one card."""
    uncounted: tuple[str, ...] = ()
    """What takes memory that nobody here knows, in words, with the first layer that runs it."""

    @property
    def peak_allocated_bytes(self) -> int:
        """The most that is allocated at once, in any step."""
        return max(self.timeline.peak_allocated_bytes, self.first_timeline.peak_allocated_bytes)

    def on_card(self, index: int) -> "StepProfile":
        """What of it is on one of several cards: tensors by where they lie, work by the layers' placement."""
        return replace(
            self,
            timeline=self.timeline.on_card(index),
            first_timeline=self.first_timeline.on_card(index),
            work={key: work for key, work in self.work.items() if card_of(self.placement, key[1]) == index},
            names=tuple(name for name in self.names if card_of(self.placement, name) == index),
        )

    def layers(self, depth: int | None = 1) -> list[LayerProfile]:
        """The per-layer table.

        Args:
            depth: 1 for segments (or the model's children) and the loss, more for the layers inside them, None for all.
        """
        shown = [name for name in self.names if depth is None or name.count(".") < depth]
        inner = {name.rpartition(".")[0] for name in shown if name}
        # A layer whose parts are shown too keeps its line only for what is its own.
        rows = self.timeline.layers(shown)
        forward, backward = (gather(self.work, phase, shown) for phase in (Phase.FORWARD, Phase.BACKWARD))
        profiles = [LayerProfile(row, forward[row.name], backward[row.name]) for row in rows]
        return [one for one in profiles if (one.row.name and one.row.name not in inner) or not one.is_empty]


def gather(work: Mapping[tuple[Phase, str], Work], phase: Phase, names: Iterable[str]) -> dict[str, Work]:
    """Work of a phase for each name; a layer counts to the longest name that is it or holds it."""
    totals = dict.fromkeys(names, Work(0, 0))
    for (of, layer), amount in work.items():
        name = nearest_layer(layer, totals)
        if of is phase and name in totals:
            totals[name] += amount
    return totals


def trace_job(
    make: Callable[[], Job],
    *,
    device: str = "cpu",
    data_parallel: DataParallel | None = None,
    placement: Placement | None = None,
    num_cards: int = 1,
    real: bool = False,
) -> StepProfile:
    """Trace a training step, first and steady.

    Args:
        make: Makes the step; called where tensors are fake.
        device: "cpu" or "cuda": whose kernels to count.
        data_parallel: How DistributedDataParallel would hold gradients; None without it.
        placement: Cards of layers, by index; None with one card.
        num_cards: That there are.
        real: Run on real tensors of the CPU, which takes memory and time, instead of fake ones.

    Raises:
        UntraceableError: the step needs values that fake tensors do not have.
        UnknownNameError: `placement` names what is no layer.
        InputError: the step fails, and where.
    """
    with _quiet(), nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True):
        job = make()
        if job.accumulation < 1:
            raise InputError(f"accumulation must be at least 1, got {job.accumulation}")
        tracer = StepTracer(job.layers, device=device)
        with ExitStack() as around:
            if placement:
                layers = dict(job.layers)
                check_placement(placement, layers, num_cards)
                around.enter_context(placed(tracer, layers, placement))
            if device == "cuda":
                around.enter_context(cuda_semantics(job.precision))
            around.enter_context(_telling_where(job, tracer))
            profile = _trace(job, tracer, device, data_parallel)
            return replace(profile, placement=placement or {})


def _trace(job: Job, tracer: StepTracer, device: str, data_parallel: DataParallel | None) -> StepProfile:
    """The timelines are taken here, while what outlives the step is still alive."""
    if device == "cuda" and job.optimizer is not None:
        foreach_by_default(job.optimizer)
    owners = list(_owners(job))
    for name, tensors in owners:
        tracer.know(tensors, Category.PARAMETER, name)
    tracer.know(job.inputs, Category.INPUT)
    buckets = make_buckets(job.model.parameters(), data_parallel) if data_parallel else []
    tracer.know([*buckets, *job.buffers], Category.COMMUNICATION)
    if job.keep_gradients:
        for name, tensors in owners:
            tracer.know(make_gradients(tensors), Category.GRADIENT, name)
    work: list[Mapping[tuple[Phase, str], Work]] = []
    with tracer.tracing():
        for _ in range(min(job.accumulation, 2)):
            loss = None
            loss = run_batch(job, begin=tracer.begin, layer=tracer.layer)
            work.append(tracer.take_work())
        for name, tensors in owners:
            tracer.know([one.grad for one in tensors if one.grad is not None], Category.GRADIENT, name)
        first_update = tracer.begin(Phase.OPTIMIZER)
        if job.optimizer is not None:
            job.optimizer.step()
            tracer.know(optimizer_state(job.optimizer, device), Category.OPTIMIZER_STATE)
            tracer.take_work()
        second_update = tracer.begin(Phase.OPTIMIZER)
        if job.optimizer is not None:
            job.optimizer.step()
            work.append(tracer.take_work())
    seen = tracer.timeline()
    del loss
    repeated = work[:1] + work[1:2] * (job.accumulation - 1) + work[-1:] if job.accumulation > 1 else work
    return StepProfile(
        model=job.name,
        inputs=tuple(_describe(tensor) for tensor in job.inputs),
        loss=job.loss_name,
        timeline=_steady(seen, first_update, second_update),
        first_timeline=_first(seen, second_update),
        work=_add(repeated),
        names=("", *(name for name, _ in job.layers), LOSS),
        levels=job.levels,
        device=device,
        precision=job.precision,
        accumulation=job.accumulation,
        uncounted=_uncounted(job, device),
    )


def _uncounted(job: Job, device: str) -> tuple[str, ...]:
    modules = job.model.named_modules()
    recurrent = next((name for name, module in modules if isinstance(module, nn.RNNBase)), None)
    if device != "cuda" or recurrent is None:
        return ()
    return (
        f"what cuDNN keeps of recurrent layers for backward; the CPU's way is shown instead ({recurrent or job.name})",
    )


def _owners(job: Job) -> Iterator[tuple[str, list[Tensor]]]:
    """Parameters and buffers by layer; what no named layer has is the model's own."""
    known: set[int] = set()
    for name, module in [*job.layers, *(("", module) for module in job.model.modules())]:
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        yield name, [tensor for tensor in tensors if id(tensor) not in known]
        known |= {id(tensor) for tensor in tensors}


def make_gradients(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Gradients of zero for those that are trained and have none."""
    for tensor in tensors:
        if tensor.requires_grad and tensor.grad is None:
            tensor.grad = torch.zeros_like(tensor)
    return [tensor.grad for tensor in tensors if tensor.grad is not None]


def optimizer_state(optimizer: torch.optim.Optimizer, device: str = "cpu") -> list[Tensor]:
    """The tensors that an optimizer keeps on a type of device from step to step.

    Beside a GPU, counts of steps stay on the host, unless a fused or capturable optimizer reads them there.
    """
    found = []
    for group in optimizer.param_groups:
        on_host = {"step"} if device == "cuda" and not (group.get("fused") or group.get("capturable")) else set()
        for parameter in group["params"]:
            held = optimizer.state.get(parameter, {})
            found += [value for key, value in held.items() if isinstance(value, Tensor) and key not in on_host]
    return found


def create_optimizer_state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Make an optimizer's state by a step with gradients of zero, and return its tensors.

    The step changes parameters and counts as one; whoever wants neither restores both.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer_state(optimizer)


def _first(seen: Timeline, second_update: int) -> Timeline:
    allocations = [
        replace(one, died=min(one.died, second_update)) for one in seen.allocations if one.born < second_update
    ]
    return Timeline(tuple(allocations), second_update, seen.backward_start)


def _steady(seen: Timeline, first_update: int, second_update: int) -> Timeline:
    state = [one for one in seen.allocations if one.category is Category.OPTIMIZER_STATE]
    others = [
        one
        for one in seen.allocations
        if one.category is not Category.OPTIMIZER_STATE and not first_update <= one.born < second_update
    ]

    def moved(instant: int) -> int:
        instant = max(instant - (second_update - first_update), min(instant, first_update))
        return len(state) + instant

    end = moved(seen.instants)
    allocations = [
        *(replace(one, born=index, died=end, phase=Phase.SETUP) for index, one in enumerate(state)),
        *(replace(one, born=moved(one.born), died=moved(one.died)) for one in others),
    ]
    return Timeline(tuple(allocations), end, moved(seen.backward_start))


def _add(parts: Iterable[Mapping[tuple[Phase, str], Work]]) -> dict[tuple[Phase, str], Work]:
    total: dict[tuple[Phase, str], Work] = {}
    for part in parts:
        for key, work in part.items():
            total[key] = total[key] + work if key in total else work
    return total


def _describe(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {'x'.join(map(str, tensor.shape)) or 'scalar'}"


@contextmanager
def _telling_where(job: Job, tracer: StepTracer) -> Iterator[None]:
    """Turn what fails in a traced step into an error that names the layer and a way round."""
    try:
        yield
    except MemsegError:
        raise
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise _untraceable(job, tracer, str(error.func)) from error
    except Exception as error:
        if _NO_VALUES in str(error):
            raise _untraceable(job, tracer, ".numpy()") from error
        message = " ".join(str(error).split())
        raise InputError(
            f"{job.name} does not run on {', '.join(map(_describe, job.inputs))}: {tracer.where()} fails with "
            f"{type(error).__name__}: {message[:400]}"
        ) from error


def _untraceable(job: Job, tracer: StepTracer, operation: str) -> UntraceableError:
    return UntraceableError(
        f"{job.name}: {tracer.where()} runs {operation}, whose result depends on values, which tensors without memory "
        "lack. Take the values out of forward (compute them from shapes, or once before training), leave the layer "
        "out, or trace a small batch on real tensors: real=True in Python, --real on the command line"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs a traceback of its own where a fake operation fails; the error that is raised says it all."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
