"""What each segment of a model costs alone, at every recompute level: what the planner plans with.

Each segment is run by itself on fake tensors, between stand-ins for its neighbours: inputs that come from a leaf, so
that gradients arrive somewhere, and a root whose backward makes the output's gradient, so that both live exactly as
long as the segment's own graph lets them. Which inputs a segment keeps, and whether it keeps its output, is seen by
dropping every other reference to them.

Layers copy what lies in memory otherwise than they need it, so stand-ins are laid out as the neighbours do it: as in
the plain network for level `none`, as in the recomputing one for all others. Forward goes through the segments in
order, at every level of each before the next, and hands on how outputs lie; backward goes through them in reverse, and
hands on how gradients lie. So the network as a whole is never run.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from memseg.levels import NormMode, Precision, Recompute
from memseg.models.segmented import IMAGES, SegmentedModel
from memseg.nn.precision import computing
from memseg.planning.costs import (
    LOSS,
    TARGET,
    Arrival,
    BackwardMemory,
    LevelCost,
    ModelCosts,
    SegmentCost,
    SharedGradient,
    Stretch,
    Work,
)
from memseg.profiling.imagined_group import imagine_replicas
from memseg.profiling.jobs.job import OptimizerFactory, fused_adam
from memseg.profiling.kernels.compiled import compiled_kernels
from memseg.profiling.step import create_optimizer_state
from memseg.profiling.timeline import Allocation, Category, Phase, Timeline
from memseg.profiling.trace import StepTracer

_COPIES_GRADIENT = "aten.new_empty_strided"
"""What AccumulateGrad makes of a first gradient that lies otherwise than the parameter.
Source: torch/csrc/autograd/utils/grad_layout_contract.h, torch 2.14.1."""


@dataclass(frozen=True)
class _Layout:
    """Shape and strides of a tensor between segments."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    needs_grad: bool

    @staticmethod
    def of(tensor: Tensor) -> "_Layout":
        return _Layout(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.requires_grad)

    @property
    def size_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class _Gradient:
    """One that arrived at what a segment reads."""

    stride: tuple[int, ...]
    storage: int
    """The instant at which the storage that it lies in was made."""
    storage_bytes: int
    handed_on: int
    """The instant at which what made it had returned it, when autograd adds it to one that is there."""


@dataclass
class _Network:
    """What is known of the tensors between segments, of the plain or of the recomputing network."""

    layouts: dict[str, _Layout]
    grad_strides: dict[str, tuple[int, ...]]
    """Of the first gradient that arrives, to which those of other readers are added."""


def model_costs(
    build: Callable[[], SegmentedModel],
    *,
    image: tuple[int, int],
    batch: int,
    norm: NormMode = NormMode.BATCH,
    aux_weight: float = 0.3,
    optimizer: OptimizerFactory = fused_adam,
    precision: Precision = Precision.FLOAT32,
    device: str = "cpu",
    replicas: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ModelCosts:
    """Costs of one training step of a model, on fake tensors.

    Args:
        build: Makes the model; called where tensors are fake.
        image: (height, width) of the images.
        batch: Images in the batch; of one replica.
        norm: The mode that `build` gives its norms; recorded, not checked.
        aux_weight: Of the objective.
        optimizer: Makes the optimizer.
        precision: To compute in; `build` gives the parameters its `parameter_dtype`.
        device: "cpu" or "cuda": whose workspaces to count.
        replicas: Processes that `synced` norms share statistics with, this one included; of one they do as `batch`.
        progress: Called with how much is done, and of how much: a forward and a backward of each segment.

    Raises:
        InputError: the model cannot take images of that size.
    """
    with FakeTensorMode():
        model = build().train()
        model.check_image(image, batch=batch)
        imagine_replicas(model, replicas)
        dtype = next(model.parameters()).dtype
        images = torch.empty(batch, 3, *image, dtype=dtype).contiguous(memory_format=torch.channels_last)
        target = model.make_target(batch, image)
        given = {IMAGES: _Layout.of(images), TARGET: _Layout.of(target)}
        networks = {plain: _Network(dict(given), {}) for plain in (True, False)}
        parts = [
            *((name, module, model.reads[name]) for name, module in model.segments.items()),
            (LOSS, model.objective(aux_weight), (*model.outputs, TARGET)),
        ]
        segments = []
        for done, (name, module, reads) in enumerate(parts):
            progress(done, 2 * len(parts))
            segments.append(_Segment(name, module, reads, networks, optimizer, precision, device))
        costs = []
        for done, segment in enumerate(reversed(segments), len(parts)):
            progress(done, 2 * len(parts))
            costs.append(segment.cost(networks))
        progress(2 * len(parts), 2 * len(parts))
    return ModelCosts(
        model=model.name,
        num_classes=model.num_classes,
        image=image,
        batch=batch,
        norm=norm,
        precision=precision,
        image_bytes=images.nbytes,
        target_bytes=target.nbytes,
        segments=tuple(reversed(costs)),
    )


class _Segment:
    """One segment at all its levels: forward has run, backward runs in `cost`.

    A network whose segments rebuild their units is taken for the recomputing one, whatever the level of each.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        reads: tuple[str, ...],
        networks: Mapping[bool, _Network],
        optimizer: OptimizerFactory,
        precision: Precision,
        device: str,
    ) -> None:
        self.name, self.module, self.reads, self._device = name, module, reads, device
        self.trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        state = create_optimizer_state(optimizer(self.trainable)) if self.trainable else []
        self.optimizer_bytes = sum(tensor.nbytes for tensor in state)
        self.levels: tuple[Recompute, ...] = getattr(module, "levels", (Recompute.NONE,))
        self._steps = {}
        for level in dict.fromkeys((*self.levels, Recompute.UNITS)):
            layouts = networks[level is Recompute.NONE].layouts
            self._set_level(level)
            # Running statistics follow every level's batch, which autograd would mind for the backward of the others.
            with _unsafe_preserve_version_counter(tuple(module.buffers())):
                self._steps[level] = _Step(module, self.trainable, [layouts[read] for read in reads], precision, device)
        for level in (Recompute.NONE, Recompute.UNITS):
            networks[level is Recompute.NONE].layouts[name] = self._steps[level].out

    def cost(self, networks: Mapping[bool, _Network]) -> SegmentCost:
        """Run backward, after that of all segments behind."""
        costs = {}
        for level, step in self._steps.items():
            grad_strides = networks[level is Recompute.NONE].grad_strides
            self._set_level(level)
            cost = step.cost(level, grad_strides.get(self.name, step.out.stride))
            costs[level] = replace(cost, compiled_kernels=self._compiled_kernels(level))
            self.module.zero_grad(set_to_none=True)
            if level in (Recompute.NONE, Recompute.UNITS):
                for place, gradient in step.arrived.items():
                    grad_strides.setdefault(self.reads[place], gradient.stride)
        out = self._steps[Recompute.NONE].out
        return SegmentCost(
            name=self.name,
            reads=self.reads,
            output_bytes=out.size_bytes,
            output_needs_grad=out.needs_grad,
            parameter_bytes=sum(parameter.nbytes for parameter in self.module.parameters()),
            buffer_bytes=sum(buffer.nbytes for buffer in self.module.buffers()),
            gradient_bytes=sum(parameter.nbytes for parameter in self.trainable),
            optimizer_bytes=self.optimizer_bytes,
            levels=tuple(costs[level] for level in self.levels),
        )

    def _compiled_kernels(self, level: Recompute) -> int:
        if self._device != "cpu":
            return 0
        out = self._steps[level].out
        output = torch.empty(out.shape, dtype=out.dtype)
        return compiled_kernels(self.module, output, level, threads=torch.get_num_threads())

    def _set_level(self, level: Recompute) -> None:
        if hasattr(self.module, "recompute"):
            self.module.recompute = level  # type: ignore[assignment]


class _Step:
    """Forward and backward of one segment at one level, between stand-ins: forward has run, backward runs in `cost`."""

    def __init__(
        self, module: nn.Module, trainable: list[nn.Parameter], reads: list[_Layout], precision: Precision, device: str
    ) -> None:
        self._tracer = tracer = StepTracer(device=device)
        tracer.know([*module.parameters(), *module.buffers()], Category.PARAMETER)
        self.arrived: dict[int, _Gradient] = {}
        """Gradients of what is read, by its place among the inputs."""
        self._sizes = [layout.size_bytes for layout in reads]
        self._grad_stride: list[tuple[int, ...]] = []
        self._trainable = trainable
        self._accumulated: dict[int, int] = {}
        """The instant at which a parameter's gradient arrives, by that at which its storage was made."""
        with tracer:
            self._leaves = [torch.empty((), dtype=layout.dtype, requires_grad=layout.needs_grad) for layout in reads]
            fixed = tracer.allocated_bytes
            inputs = [
                _StandIn.apply(leaf, layout, partial(self._arrives, place))
                for place, (leaf, layout) in enumerate(zip(self._leaves, reads, strict=True))
            ]
            keys = [tracer.key(tensor) for tensor in inputs]
            before = tracer.allocated_bytes
            tracer.begin(Phase.FORWARD)
            tracer.reset_peak()
            with computing(precision, "cpu"):
                result = module(*inputs)
            self._forward_peak = tracer.peak_bytes - before
            self.out = _Layout.of(result)
            out_key = tracer.key(result)
            self._root = _Root.apply(result, self._grad_stride)
            del inputs, result
            self._saves_inputs = tuple(tracer.is_alive(key) for key in keys)
            self._saves_output = tracer.is_alive(out_key)
            self._output_born = tracer.born(out_key) if self._saves_output else None
            self._inputs_born = {
                place: tracer.born(key)
                for place, (key, saved) in enumerate(zip(keys, self._saves_inputs, strict=True))
                if saved
            }
            self._kept = tracer.allocated_bytes
        shared = sum(layout.size_bytes for layout, saved in zip(reads, self._saves_inputs, strict=True) if saved)
        own_output = self._saves_output * self.out.size_bytes
        self._saved_bytes = self._kept - fixed - shared - self._root.nbytes - own_output

    def cost(self, level: Recompute, grad_stride: tuple[int, ...]) -> LevelCost:
        """Run backward, where the gradient of the output lies as given; the whole cost."""
        tracer, has_backward = self._tracer, self.out.needs_grad
        self._grad_stride.append(grad_stride)
        if has_backward:
            with tracer, self._accumulations_seen():
                tracer.begin(Phase.BACKWARD)
                self._root.backward()
        del self._root  # whose graph knows this step
        timeline = tracer.timeline()
        work = tracer.take_work()
        return LevelCost(
            recompute=level,
            saved_bytes=self._saved_bytes,
            saves_inputs=self._saves_inputs,
            saves_output=self._saves_output,
            forward_peak_bytes=self._forward_peak,
            backward_memory=self._backward_memory(timeline) if has_backward else BackwardMemory(),
            backward_memory_adding=self._backward_memory(self._with_gradients_added(timeline))
            if has_backward
            else BackwardMemory(),
            forward=_total(work, Phase.FORWARD),
            backward=_total(work, Phase.BACKWARD),
            shared_gradients=tuple(self._shared_gradients()),
        )

    def _backward_memory(self, timeline: Timeline) -> BackwardMemory:
        gradient = _gradient_of_output(timeline)
        # Those who made it say what else its storage takes.
        others = (one for one in timeline.allocations if one is not gradient)
        curve = replace(timeline, allocations=(*others, replace(gradient, size_bytes=self.out.size_bytes))).curve
        ends = self._ends(timeline, gradient)
        bounds = sorted({*ends.values(), timeline.instants})

        def stretches(since: int) -> Iterator[Stretch]:
            """From letting go of one tensor that others may hold to letting go of the next."""
            for begin, end in pairwise([since, *(bound for bound in bounds if bound > since)]):
                gone = {what for what, died in ends.items() if died <= begin}
                yield Stretch(
                    max(curve[begin:end]) - self._kept - self.out.size_bytes,
                    inputs=tuple(sorted(what for what in gone if isinstance(what, int))),
                    output="output" in gone,
                    gradient="gradient" in gone,
                )

        arrivals = [
            Arrival(place, stretch)
            for place, arrived in sorted(self.arrived.items())
            for stretch in stretches(max(timeline.backward_start, arrived.handed_on))
        ]
        return BackwardMemory(tuple(stretches(timeline.backward_start)), tuple(arrivals))

    def _ends(self, timeline: Timeline, gradient: Allocation) -> dict[int | str, int]:
        """The instants at which backward lets go of inputs, by their places, of the output and of its gradient."""
        died = {one.born: one.died for one in timeline.allocations}
        ends: dict[int | str, int] = {place: died[born] for place, born in self._inputs_born.items()}
        ends["gradient"] = gradient.died
        if self._output_born is not None:
            ends["output"] = died[self._output_born]
        return ends

    @contextmanager
    def _accumulations_seen(self) -> Iterator[None]:
        """Note when each parameter's gradient arrives, and the storage that it lies in."""

        def note(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._accumulated[self._tracer.born(self._tracer.key(parameter.grad))] = self._tracer.instant

        hooks = [one.register_post_accumulate_grad_hook(note) for one in self._trainable]  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _with_gradients_added(self, timeline: Timeline) -> Timeline:
        """As if parameters had gradients: fresh ones go when they have been added, and none is copied to stay."""
        return replace(
            timeline,
            allocations=tuple(
                replace(one, died=self._accumulated.get(one.born, one.died))
                for one in timeline.allocations
                if not (one.born in self._accumulated and one.operation == _COPIES_GRADIENT)
            ),
        )

    def _arrives(self, place: int, gradient: Tensor) -> None:
        storage = self._tracer.born(self._tracer.key(gradient))
        size_bytes = gradient.untyped_storage().nbytes()
        self.arrived[place] = _Gradient(tuple(gradient.stride()), storage, size_bytes, self._tracer.instant - 1)

    def _shared_gradients(self) -> Iterator[SharedGradient]:
        places = defaultdict(list)
        for place, gradient in self.arrived.items():
            places[gradient.storage, gradient.storage_bytes].append(place)
        for (_, size), lying_there in places.items():
            if len(lying_there) > 1 or size != self._sizes[lying_there[0]]:
                yield SharedGradient(tuple(sorted(lying_there)), size)


def _gradient_of_output(timeline: Timeline) -> Allocation:
    """The second thing that backward makes: the first is the gradient of the root, a scalar."""
    _, gradient, *_ = (one for one in timeline.allocations if one.phase is Phase.BACKWARD)
    return gradient


def _total(work: Mapping[tuple[Phase, str], Work], phase: Phase) -> Work:
    return Work.total(part for (of, _), part in work.items() if of is phase)


class _StandIn(torch.autograd.Function):
    """An input of a segment: laid out as given, made of a leaf that is next to nothing."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, layout: _Layout, arrives: Callable[[Tensor], None]) -> Tensor:
        ctx.arrives = arrives
        return torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.arrives(grad)
        return None, None, None


class _Root(torch.autograd.Function):
    """A scalar whose backward makes the gradient of a segment's output, laid out as is known by then."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, grad_stride: list[tuple[int, ...]]) -> Tensor:
        ctx.shape, ctx.dtype, ctx.grad_stride = output.shape, output.dtype, grad_stride
        return output.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.empty_strided(ctx.shape, ctx.grad_stride[0], dtype=ctx.dtype), None
